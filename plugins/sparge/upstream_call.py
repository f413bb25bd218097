"""What the functions of `upstream` share: checks, prediction, and the call of the operator."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch

from core.argument_checks import check_tensors_given, shapes_of
from core.block_mask import BlockSparseMask, block_count
from core.errors import LayoutError, ParameterError, UnsupportedCallError
from kernels_common.block_sparse_attention import attend_blocks
from kernels_common.selection import lists_from_blocks
from kernels_common.strategy import multiplied_share
from kernels_common.tensor_checks import DTYPES, check_tensors
from plugins.sparge.precision import FP8_CAPABILITY
from plugins.sparge.prediction import executed_density, predict_mask

BLOCK_SIZE = (128, 64)
LAYOUTS = ("HND", "NHD")
NO_SKIP = 50.0  # upstream's default: a tile that far below holds less than fp32 can add
Threshold = float | torch.Tensor
Output = torch.Tensor | tuple[torch.Tensor, float]
# What each threshold must be: in words, and as a test that no NaN passes.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "topk": ("in (0, 1]", lambda number: 0 < number <= 1),
    "cdfthreshd": ("in (0, 1]", lambda number: 0 < number <= 1),
    "simthreshd1": ("a number", lambda number: not math.isnan(number)),
    "pvthreshd": ("at least 0, in log2 units", lambda number: number >= 0),
}


class UpstreamCall(NamedTuple):
    """Checked tensors ``[B, H, N, D]``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    tensor_layout: str
    is_causal: bool


def open_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    smooth_k: bool,
    tensor_layout: str,
    *,
    is_causal: bool,
) -> UpstreamCall:
    """Refuse what no function does, and bring the tensors to ``[B, H, N, D]``."""
    check_tensors_given(q=q, k=k, v=v)
    if attn_mask is not None:
        raise UnsupportedCallError("attn_mask is not supported; pass None, or is_causal=True")
    if dropout_p != 0.0:
        raise UnsupportedCallError(f"dropout is not supported, got dropout_p={dropout_p}; pass 0.0")
    if not smooth_k:
        raise UnsupportedCallError("smooth_k=False is not supported; keys are always centred, pass True")
    if tensor_layout not in LAYOUTS:
        raise ParameterError(f"tensor_layout must be one of {', '.join(LAYOUTS)}, got {tensor_layout!r}")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise LayoutError(f"q, k and v must have 4 dimensions, got {q.dim()}, {k.dim()} and {v.dim()}")
    if tensor_layout == "NHD":
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    check_tensors(q, k, v)
    if 0 in (*q.shape, *k.shape):
        raise LayoutError(f"q, k and v must not be empty; got {shapes_of(q=q, k=k, v=v)}")
    if is_causal and q.shape[2] != k.shape[2]:
        raise UnsupportedCallError(
            f"is_causal needs as many keys as queries, got {q.shape[2]} queries and {k.shape[2]} keys"
        )
    return UpstreamCall(q, k, v, tensor_layout, is_causal)


def predict_blocks(
    call: UpstreamCall,
    scale: float | None,
    similarity: Threshold,
    cdf: Threshold | None,
    topk: Threshold | None,
    attention_sink: bool,
) -> BlockSparseMask:
    """The mask of one rule, ``cdf`` or ``topk``; see `upstream.spas_sage2_attn_meansim_topk_cuda`."""
    if (cdf is None) == (topk is None):
        raise ParameterError("give either cdfthreshd or topk, and None for the other")
    sink = None
    if attention_sink:
        sink = torch.arange(block_count(call.key.shape[2], BLOCK_SIZE[1]), device=call.query.device) == 0
    gate = _read("simthreshd1", similarity, call)
    return predict_mask(
        call.query,
        call.key,
        BLOCK_SIZE,
        top_k=None if topk is None else _read("topk", topk, call),
        cdf=None if cdf is None else _read("cdfthreshd", cdf, call),
        similarity_threshold=None if isinstance(gate, float) and gate < 0 else gate,
        scale=scale,
        forced=sink,
        causal=call.is_causal,
    )


def _read(name: str, threshold: Threshold, call: UpstreamCall) -> Threshold:
    """A number, or one per head on the device of the call; those on a GPU are trusted: reading them waits."""
    numbers: list[Any] = [threshold]
    if isinstance(threshold, torch.Tensor):
        heads = call.query.shape[1]
        if threshold.shape != (heads,):
            raise LayoutError(f"{name} must be a number or [{heads}], got {tuple(threshold.shape)}")
        numbers = threshold.tolist() if threshold.device.type == "cpu" else []
    wanted, fits = RANGES[name]
    for number in numbers:
        if not isinstance(number, Real) or not fits(float(number)):
            raise ParameterError(f"{name} must be {wanted}, got {number!r}")
    if isinstance(threshold, torch.Tensor):
        return threshold.to(call.query.device, torch.float32)
    return float(threshold)


def read_mask(call: UpstreamCall, mask_id: torch.Tensor | None, attention_sink: bool) -> BlockSparseMask:
    """The mask of a dense block matrix, ``[B, H, Mq, Mk]`` bool or integer."""
    lengths = (call.query.shape[2], call.key.shape[2])
    blocks = (block_count(lengths[0], BLOCK_SIZE[0]), block_count(lengths[1], BLOCK_SIZE[1]))
    expected = (*call.query.shape[:2], *blocks)
    if mask_id is None:
        raise ParameterError(f"mask_id is missing; pass bool or integer {expected}")
    check_tensors_given(mask_id=mask_id)
    if tuple(mask_id.shape) != expected or mask_id.is_floating_point() or mask_id.is_complex():
        raise LayoutError(
            f"mask_id must be bool or integer {expected}, one entry per {BLOCK_SIZE[0]} queries x "
            f"{BLOCK_SIZE[1]} keys, got {mask_id.dtype} {tuple(mask_id.shape)}"
        )
    kept = mask_id.to(call.query.device) != 0
    if attention_sink:
        kept[..., 0] = True
    return BlockSparseMask(*lists_from_blocks(kept), BLOCK_SIZE, *lengths)


def attend_call(
    call: UpstreamCall,
    mask: BlockSparseMask,
    scale: float | None,
    pvthreshd: Threshold,
    quantization: str,
    output_dtype: torch.dtype | None,
    return_sparsity: bool,
) -> Output:
    """Output in the layout of the call, with the share of work left out if it is asked for."""
    if output_dtype is not None and output_dtype not in DTYPES:
        raise ParameterError(f"output_dtype must be a floating torch.dtype or None, got {output_dtype!r}")
    skip = _skip_threshold(call, pvthreshd)
    result = attend_blocks(
        call.query,
        call.key,
        call.value,
        mask,
        scale=scale,
        causal=call.is_causal,
        quantization="none" if call.is_causal else quantization,
        skip_threshold=skip,
    )
    output = result.output if output_dtype is None else result.output.to(output_dtype)
    if call.tensor_layout == "NHD":
        output = output.transpose(1, 2)
    if not return_sparsity:
        return output
    scores = executed_density(mask, causal=call.is_causal)
    products = scores if result.skipped is None else scores * multiplied_share(mask, result.skipped)
    return output, min(max(1.0 - float(scores + products) / 2, 0.0), 1.0)


def _skip_threshold(call: UpstreamCall, pvthreshd: Threshold) -> torch.Tensor | None:
    threshold = _read("pvthreshd", pvthreshd, call)
    if isinstance(threshold, float) and threshold >= NO_SKIP:
        return None
    if call.is_causal:
        raise UnsupportedCallError(
            f"pvthreshd is not supported with is_causal; leave it at {NO_SKIP:g}, which skips nothing"
        )
    return torch.as_tensor(threshold, dtype=torch.float32, device=call.query.device).expand(
        call.query.shape[1]
    )


def sage2_precision(q: torch.Tensor) -> str:
    """INT8 and FP8, or INT8 alone on a GPU that has no FP8."""
    old = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < FP8_CAPABILITY
    return "int8_fp16" if old else "int8_fp8"
