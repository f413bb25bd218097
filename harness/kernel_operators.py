"""Every attention operator that is checked and timed: ours, torch's and those of installed packages.

An operator is data: a name, a family, how it is prepared for a case and how far its results may be from
their definition. To add one, add an entry to the function of its family.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from core import UnsupportedCallError, attention
from core.dense import BACKENDS as DENSE_BACKENDS
from core.dense import resolve_dense_backend
from core.dense_packages import PACKAGES
from harness.kernel_cases import Case
from kernels_common.block_sparse_attention import block_sparse_attention
from kernels_common.block_sparse_backends import BACKENDS as BLOCK_SPARSE_BACKENDS
from kernels_common.block_sparse_backends import CallFeatures, resolve_backend

DENSE, BLOCK_SPARSE, QUANTIZED, POOLED = "dense", "block-sparse", "8-bit", "pooled"
DENSE_BACKWARD, BACKWARD, PREPARATION = "dense backward", "backward", "preparation"
PREDICTION_DENSITY = 0.25

Outputs = tuple[torch.Tensor, ...]
Tolerance = Mapping[torch.dtype, float]

# Unit roundoff is 2^-9 in bf16 and 2^-11 in fp16; weights and output are each rounded once.
FORWARD = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Means of keys and values are rounded too.
POOLED_FORWARD = {dtype: 2 * tolerance for dtype, tolerance in FORWARD.items()}
# Gradients of scores are rounded before their products, and are differences of like numbers.
GRADIENTS = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
# Weights and values in e4m3 (4 significant bits), scores in INT8.
FP8_WEIGHTS = dict.fromkeys(FORWARD, 0.045)
INT8_SCORES = dict.fromkeys(FORWARD, 0.016)


@dataclass(frozen=True)
class Operator:
    """One way to compute attention.

    Args:
        name (str): the backend, as it is asked for.
        family (str): what is computed; operators of a family are alternatives.
        prepare (Callable): given a case, the call to check and time; raises UnsupportedCallError or
            ImportError where it is not to be had.
        error (Callable): largest relative error of the call's results, given the case, the results and
            the (batch entry, head) pairs to compare.
        tolerance (Mapping): largest error that the arithmetic explains, by dtype.
        is_default (Callable): whether ``backend="auto"`` runs it for a case.
        work (float): floating-point operations per executed (query, key) pair and head dimension.
    """

    name: str
    family: str
    prepare: Callable[[Case], Callable[[], Outputs]]
    error: Callable[[Case, Outputs, Sequence[tuple[int, int]]], float]
    tolerance: Tolerance
    is_default: Callable[[Case], bool]
    work: float

    @property
    def is_masked(self) -> bool:
        """Whether it takes a block pattern."""
        return self.family in (BLOCK_SPARSE, QUANTIZED, POOLED, BACKWARD) and self.name != "sage"


def all_operators() -> list[Operator]:
    """Every operator, family by family."""
    return [
        *dense_operators(),
        *block_sparse_operators(),
        *quantized_operators(),
        *pooled_operators(),
        *backward_operators(),
        *preparation_operators(),
    ]


def dense_operators() -> list[Operator]:
    """Dense attention, exact by every backend but SageAttention."""

    def operator(name: str) -> Operator:
        exact = name != "sage"
        return Operator(
            name,
            DENSE if exact else QUANTIZED,
            lambda case: _forward(attention, case, backend=name),
            forward_error,
            FORWARD if exact else dict.fromkeys(FORWARD, PACKAGES["sage"].tolerance),
            lambda case: resolve_dense_backend(case.query, case.key, case.value) == name,
            4.0,
        )

    return [operator(name) for name in DENSE_BACKENDS]


def block_sparse_operators() -> list[Operator]:
    """Every backend of `kernels_common.block_sparse_attention`."""

    def operator(name: str) -> Operator:
        return Operator(
            name,
            BLOCK_SPARSE,
            lambda case: _forward(block_sparse_attention, _ordered_for(name, case), case.mask, backend=name),
            forward_error,
            FORWARD,
            lambda case: resolve_backend(case.query, case.mask) == name,
            4.0,
        )

    return [operator(name) for name in BLOCK_SPARSE_BACKENDS]


def quantized_operators() -> list[Operator]:
    """8-bit block-sparse attention, quantisation included or not; and SpargeAttn's, where it is installed."""

    def operator(name: str, tolerance: Tolerance) -> Operator:
        return Operator(
            name,
            QUANTIZED,
            lambda case: _forward(block_sparse_attention, case, case.mask, quantization=name),
            forward_error,
            tolerance,
            _always_default,
            4.0,
        )

    sparge = Operator(
        "spas_sage_attn", QUANTIZED, _prepare_sparge, forward_error, FP8_WEIGHTS, _never_default, 4.0
    )
    alone = Operator(
        "int8_fp8 (kernel alone)",
        QUANTIZED,
        _prepare_quantized_kernel,
        forward_error,
        FP8_WEIGHTS,
        _never_default,
        4.0,
    )
    return [operator("int8_fp8", FP8_WEIGHTS), alone, operator("int8_fp16", INT8_SCORES), sparge]


def pooled_operators() -> list[Operator]:
    """Attention to pooled key blocks, pooling included."""

    def prepare(case: Case) -> Callable[[], Outputs]:
        from kernels_common.pooled_attention import pooled_attention

        return _forward(pooled_attention, case, case.level_mask)

    return [
        Operator("pooled_attention", POOLED, prepare, forward_error, POOLED_FORWARD, _always_default, 4.0)
    ]


def backward_operators() -> list[Operator]:
    """Gradients by query, key and value, without the forward pass."""

    def dense(name: str) -> Operator:
        return Operator(
            name,
            DENSE_BACKWARD,
            lambda case: _backward(attention, case, backend=name),
            gradient_error,
            GRADIENTS,
            _never_default,
            10.0,
        )

    sparse = Operator(
        "block_sparse_attention",
        BACKWARD,
        lambda case: _backward(block_sparse_attention, case, case.mask),
        gradient_error,
        GRADIENTS,
        _always_default,
        10.0,
    )
    return [*(dense(name) for name in DENSE_BACKENDS if name != "sage"), sparse]


def preparation_operators() -> list[Operator]:
    """What comes before a sparse or 8-bit kernel: quantisation, and prediction of a mask."""
    return [
        Operator(
            "quantisation (int8_fp8)",
            PREPARATION,
            _prepare_quantization,
            _quantization_error,
            dict.fromkeys(FORWARD, 2.0**-5),  # a value in e4m3 is off by up to 2^-4, half of that in the mean
            _always_default,
            0.0,
        ),
        Operator(
            "prediction (mean-pool importance and top-k lists)",
            PREPARATION,
            _prepare_prediction,
            _prediction_error,
            dict.fromkeys(FORWARD, 2.0**-16),  # computed in fp32 from every dtype
            _always_default,
            0.0,
        ),
    ]


def forward_error(case: Case, outputs: Outputs, heads: Sequence[tuple[int, int]]) -> float:
    """Largest relative error of an output ``[B, H, N, D]`` among ``heads``."""
    return _largest_error(case, outputs, heads, gradients=False)


def gradient_error(case: Case, outputs: Outputs, heads: Sequence[tuple[int, int]]) -> float:
    """Largest relative error of gradients by query, key and value among ``heads``."""
    return _largest_error(case, outputs, heads, gradients=True)


def _largest_error(
    case: Case, outputs: Outputs, heads: Sequence[tuple[int, int]], *, gradients: bool
) -> float:
    errors = []
    for batch, head in heads:
        expected = case.definition(batch, head, gradients=gradients)
        for output, right in zip(outputs, expected, strict=True):
            errors.append((output[batch, head].to(right.dtype) - right).norm() / right.norm())
    return float(torch.stack(errors).max())  # NaN if any is


def _forward(
    function: Callable[..., torch.Tensor], case: Case, *extra: Any, **options: Any
) -> Callable[[], Outputs]:
    def run() -> Outputs:
        with torch.no_grad():
            return (function(case.query, case.key, case.value, *extra, **options),)

    return run


def _backward(
    function: Callable[..., torch.Tensor], case: Case, *extra: Any, **options: Any
) -> Callable[[], Outputs]:
    inputs = [part.detach().requires_grad_() for part in (case.query, case.key, case.value)]
    with torch.enable_grad():
        output = function(*inputs, *extra, **options)
    return lambda: torch.autograd.grad(output, inputs, case.grad_output, retain_graph=True)


def _ordered_for(name: str, case: Case) -> Case:
    """The case with tensors in the memory order that a backend works in, so that no call copies."""
    if name != "flash4":
        return case
    tensors = {
        part: getattr(case, part).transpose(1, 2).contiguous().transpose(1, 2)
        for part in ("query", "key", "value")
    }
    return replace(case, **tensors)


def _prepare_sparge(case: Case) -> Callable[[], Outputs]:
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    if case.levels is None or case.block_size != (64, 128) or case.query.dtype == torch.float32:
        raise UnsupportedCallError("spas_sage_attn takes 16-bit tensors and mask blocks of 64 x 128")
    blocks = (case.levels > 0).to(torch.int8)
    return _forward(block_sparse_sage2_attn_cuda, case, mask_id=blocks, output_dtype=case.query.dtype)


def _prepare_quantized_kernel(case: Case) -> Callable[[], Outputs]:
    """The kernel for Hopper GPUs on operands that are quantised beforehand."""
    features = CallFeatures(quantization="int8_fp8")
    resolve_backend(case.query, case.mask, "gluon", features)  # says what is missing
    from kernels_common.block_sparse_quantized_gluon import block_sparse_attention_quantized_gluon
    from kernels_common.quantization import quantize_query_key
    from kernels_common.quantization_triton import quantize_value_fp8_triton

    operands, mask = quantize_query_key(case.query, case.key), case.mask
    value, value_scale = quantize_value_fp8_triton(case.value, interleaved=True)

    def run() -> Outputs:
        output, _ = block_sparse_attention_quantized_gluon(
            operands.query, operands.query_scale, operands.key, operands.key_scale, value, value_scale,
            mask.counts, mask.indices, mask.block_size, scale=case.query.shape[3] ** -0.5,
            dtype=case.query.dtype,
        )  # fmt: skip
        return (output,)

    return run


def _prepare_quantization(case: Case) -> Callable[[], Outputs]:
    from kernels_common.quantization import quantize_query_key, quantize_value_fp8

    def run() -> Outputs:
        return (*quantize_query_key(case.query, case.key), *quantize_value_fp8(case.value))

    return run


def _quantization_error(case: Case, outputs: Outputs, heads: Sequence[tuple[int, int]]) -> float:
    from kernels_common.quantization import dequantize_value

    *_, value_fp8, scale = outputs
    value = dequantize_value(value_fp8, scale, case.value.shape[2])
    return float((value.float() - case.value.float()).norm() / case.value.float().norm())


def _prepare_prediction(case: Case) -> Callable[[], Outputs]:
    from kernels_common.block_importance import mean_pool_importance
    from kernels_common.block_statistics import block_means
    from kernels_common.selection import select_top_k

    def run() -> Outputs:
        query, key = (block_means(part, 128).mean for part in (case.query, case.key))
        importance = mean_pool_importance(query, key)
        length = case.query.shape[2]
        mask = select_top_k(importance, PREDICTION_DENSITY, (128, 128), length, length)
        return importance, mask.counts, mask.indices

    return run


def _prediction_error(case: Case, outputs: Outputs, heads: Sequence[tuple[int, int]]) -> float:
    """Distance of the importance of ``heads`` from the softmax over mean keys."""
    errors = []
    for batch, head in heads:
        query, key = (
            torch.stack([block.double().mean(0) for block in part[batch, head].split(128)])
            for part in (case.query, case.key)
        )
        expected = torch.softmax(query @ key.T * query.shape[1] ** -0.5, -1)
        errors.append((outputs[0][batch, head] - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())


def _always_default(case: Case) -> bool:
    return True


def _never_default(case: Case) -> bool:
    return False
