"""Pooled attention: block-sparse attention whose key blocks are seen whole or through means of their keys.

Block-sparse attention drops key blocks. Here a block of little weight is kept as the means of runs of 2, 4 or
8 of its keys and values, at that part of its cost: the levels of pyramid sparse attention (arXiv 2512.04025).
A pooled key that stands for n tokens has ``log(n)`` added to its score, so that the weights stay a
distribution over tokens.

The public function checks the call and settles the backend, then enters one custom operator
(``sparse_attn::pooled_attention``) with a fake kernel and a gradient.
"""

from typing import Any, Literal, overload

import torch

from core.block_mask import BlockSparseMask
from core.errors import LayoutError, UnsupportedCallError
from core.level_mask import LevelMask
from kernels_common.pooled_attention_backward_torch import pooled_attention_backward_torch
from kernels_common.pooled_attention_reference import pooled_attention_reference
from kernels_common.pooled_attention_torch import pooled_attention_torch
from kernels_common.tensor_checks import check_mask, check_tensors, resolve_scale
from kernels_common.triton_choice import triton_obstacle

POOLED_BACKENDS = ("reference", "torch", "triton")


def resolve_pooled_backend(query: torch.Tensor, backend: str = "auto") -> str:
    """Backend that :func:`pooled_attention` runs for such a call.

    ``"auto"`` is ``"triton"`` for fp16, bf16 and fp32 of up to 256 dimensions on CUDA devices where triton
    is installed, otherwise ``"torch"``. Any other name is checked and returned.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        backend (str): ``"auto"`` or one of ``POOLED_BACKENDS``. Default: ``"auto"``

    Returns:
        str: one of ``POOLED_BACKENDS``.

    Raises:
        UnsupportedCallError: the backend does not exist or does not support these tensors.
    """
    obstacle = triton_obstacle(query)
    if backend == "auto":
        return "triton" if query.device.type == "cuda" and obstacle is None else "torch"
    if backend not in POOLED_BACKENDS:
        raise UnsupportedCallError(
            f"pooled attention's backend must be auto, {', '.join(POOLED_BACKENDS)}; got {backend!r}"
        )
    if backend == "triton" and obstacle is not None:
        raise UnsupportedCallError(f"{obstacle}; use backend='torch' or 'auto'")
    return backend


@overload
def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    level_mask: LevelMask,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    level_mask: LevelMask,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    level_mask: LevelMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the listed blocks of ``level_mask``, each at its level.

    ``softmax(scale * query @ key_L^T + log(n))`` over the pooled keys of the listed blocks, times the pooled
    values; ``key_L`` are the means of runs of L keys and n their number, which is L but for the last run of
    the sequence. A query that sees no key gets output 0 and log-sum-exp -inf. Tensors may have any strides;
    lengths need not be multiples of the block. Output and log-sum-exp are differentiable in query, key and
    value.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]`` fp32, bf16, fp16 (fp64 with ``"reference"`` and ``"torch"``).
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        level_mask (LevelMask): listed blocks and their levels; batch and head dimensions 1 or B and Hq;
            blocks of multiples of 16 tokens (key blocks of 64 and 128 are fast). Its lists are trusted: call
            ``level_mask.check()`` on lists of unknown origin.
        scale (float, Optional): factor on the scores, > 0. Default: ``1 / sqrt(D)``
        return_lse (bool): also return the log-sum-exp. Default: False
        backend (str): ``"auto"`` (see :func:`resolve_pooled_backend`), ``"triton"``, ``"torch"`` or
            ``"reference"``. Default: ``"auto"``

    Returns:
        Tensor or tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``;
        with ``return_lse`` also the natural log-sum-exp of the scores ``[B, Hq, Nq]`` fp32.

    Raises:
        LayoutError: shapes, dtypes or devices do not fit together.
        ParameterError: ``scale`` is not positive and finite.
        UnsupportedCallError: the backend does not support the call.
    """
    check_tensors(query, key, value)
    if not isinstance(level_mask, LevelMask):
        raise LayoutError(
            f"expected a LevelMask, got {type(level_mask).__name__}; LevelMask.from_levels makes one from an "
            "int8 matrix of levels"
        )
    # One level's lists are a block mask of the same shape.
    level_one = BlockSparseMask(
        level_mask.counts[..., 0],
        level_mask.indices,
        level_mask.block_size,
        level_mask.query_length,
        level_mask.key_length,
    )
    check_mask(query, key, level_one)
    scale = resolve_scale(scale, query.shape[3])
    output, lse = pooled_attention_op(
        query,
        key,
        value,
        level_mask.counts,
        level_mask.indices,
        *level_mask.block_size,
        scale,
        resolve_pooled_backend(query, backend),
    )
    return (output, lse) if return_lse else output


@torch.library.custom_op("sparse_attn::pooled_attention", mutates_args=())
def pooled_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator behind :func:`pooled_attention`; its arguments are taken as checked."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
    block_size = (query_block, key_block)
    if backend == "triton":
        # Triton is imported where it is launched, so that everything else works without it.
        from kernels_common.pooled_attention_triton import pooled_attention_triton

        return pooled_attention_triton(query, key, value, counts, indices, block_size, scale=scale)
    level_mask = LevelMask(counts, indices, block_size, query.shape[2], key.shape[2])
    with torch.autocast(query.device.type, enabled=False):  # it would round the products
        if backend == "torch":
            return pooled_attention_torch(query, key, value, level_mask, scale=scale)
        output, lse = pooled_attention_reference(query, key, value, level_mask, scale=scale)
    return torch.empty_like(query).copy_(output), lse


@pooled_attention_op.register_fake
def _(query, key, value, counts, indices, query_block, key_block, scale, backend):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparse_attn::pooled_attention_backward", mutates_args=())
def pooled_attention_backward_op(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value: in Triton for ``"triton"``, else in plain torch."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    block_size = (query_block, key_block)
    gradients, inputs = (grad_output, grad_lse), (query, key, value)
    if backend == "triton":
        from kernels_common.pooled_attention_backward_triton import pooled_attention_backward_triton

        return pooled_attention_backward_triton(
            *gradients, *inputs, output, lse, counts, indices, block_size, scale=scale
        )
    level_mask = LevelMask(counts, indices, block_size, query.shape[2], key.shape[2])
    with torch.autocast(query.device.type, enabled=False):  # it would round the products
        return pooled_attention_backward_torch(*gradients, *inputs, level_mask, scale=scale)


@pooled_attention_backward_op.register_fake
def _(grad_output, grad_lse, query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise UnsupportedCallError(
        "pooled_attention has no second derivative; take its gradient without create_graph"
    )


pooled_attention_backward_op.register_autograd(_refuse_second_derivative)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, counts, indices, *parameters = inputs
    ctx.set_materialize_grads(False)  # the gradient of a log-sum-exp that nobody uses stays None
    ctx.save_for_backward(query, key, value, *output, counts, indices)
    ctx.parameters = parameters


def _backward(ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: gradient checkpointing allows no second time
    gradients = pooled_attention_backward_op(
        torch.zeros_like(saved[3]) if grad_output is None else grad_output,
        grad_lse,
        *saved,
        *ctx.parameters,
    )
    return *gradients, *(None,) * 6


pooled_attention_op.register_autograd(_backward, setup_context=_save_for_backward)
