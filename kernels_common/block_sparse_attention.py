"""Block-sparse attention: one operator, several backends.

The public function checks the call and settles the backend, then enters one custom operator
(``sparse_attn::block_sparse_attention``) with a fake kernel, so that ``torch.compile(fullgraph=True)``
holds around it. The chosen backend is an argument of the operator: a graph always runs what was
resolved when it was traced.
"""

import importlib.util
import math
from typing import Any, Literal, overload

import torch

from core.block_mask import BlockSparseMask
from core.errors import LayoutError, ParameterError, UnsupportedCallError
from kernels_common.block_sparse_reference import block_sparse_attention_reference
from kernels_common.block_sparse_torch import block_sparse_attention_torch

BACKENDS = ("reference", "torch", "triton", "gluon")
BLOCK_MULTIPLE = 16
TRITON_MAX_HEAD_DIM = 256
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*TRITON_DTYPES, torch.float64)

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def resolve_backend(query: torch.Tensor, block_mask: BlockSparseMask, backend: str = "auto") -> str:
    """Backend that :func:`block_sparse_attention` runs for such a call.

    ``"auto"`` is ``"triton"`` for fp16, bf16 and fp32 of up to 256 dimensions on CUDA devices where triton
    is installed, otherwise ``"torch"``. Any other name is checked and returned. ``"gluon"``, the kernel for
    Hopper GPUs, runs on request only.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        block_mask (BlockSparseMask): the mask of the call.
        backend (str): ``"auto"`` or one of ``BACKENDS``. Default: ``"auto"``

    Returns:
        str: one of ``BACKENDS``.

    Raises:
        UnsupportedCallError: the backend does not exist or does not support these tensors.
    """
    obstacle = _triton_obstacle(query)
    if backend == "auto":
        return "triton" if query.device.type == "cuda" and obstacle is None else "torch"
    if backend not in BACKENDS:
        raise UnsupportedCallError(
            f"block-sparse backend must be auto, {', '.join(BACKENDS)}; got {backend!r}"
        )
    if backend == "gluon":
        obstacle = _gluon_obstacle(query, block_mask)
    if backend in ("triton", "gluon") and obstacle is not None:
        raise UnsupportedCallError(f"{obstacle}; use backend='torch' or 'auto'")
    return backend


def _gluon_obstacle(query: torch.Tensor, block_mask: BlockSparseMask) -> str | None:
    """Why the gluon backend cannot take such a call, or None."""
    if not _TRITON_INSTALLED:
        return "backend 'gluon' needs the triton package, which is not installed"
    from kernels_common.block_sparse_gluon import gluon_obstacle

    return gluon_obstacle(query, block_mask.block_size)


def _triton_obstacle(query: torch.Tensor) -> str | None:
    """Why the triton backend cannot take ``query``, or None."""
    if not _TRITON_INSTALLED:
        return "backend 'triton' needs the triton package, which is not installed"
    if query.dtype not in TRITON_DTYPES:
        return f"backend 'triton' supports fp16, bf16 and fp32, got {query.dtype}"
    if query.shape[-1] > TRITON_MAX_HEAD_DIM:
        return f"backend 'triton' supports head dimensions up to {TRITON_MAX_HEAD_DIM}, got {query.shape[-1]}"
    return None


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float | None = ...,
    key_lengths: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float | None = ...,
    key_lengths: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the kept blocks of ``block_mask``. Forward only.

    ``softmax(scale * query @ key^T + bias)`` over the keys of the kept blocks, times ``value``. A query that
    sees no key (empty row, no valid key, bias -inf everywhere) gets output 0 and log-sum-exp -inf.
    Tensors may have any strides; lengths need not be multiples of the block.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]`` fp32, bf16, fp16 (fp64 with ``"reference"`` and ``"torch"``).
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        block_mask (BlockSparseMask): kept blocks; batch and head dimensions 1 or B and Hq; blocks of
            multiples of 16 tokens (64 and 128 are fast). Its lists are trusted: call
            ``block_mask.check()`` on lists of unknown origin.
        scale (float, Optional): factor on the scores, > 0. Default: ``1 / sqrt(D)``
        key_lengths (Tensor, Optional): ``[B]`` int32 or int64: only the first ``key_lengths[b]`` keys of
            batch entry b are valid. Default: all
        bias (Tensor, Optional): ``[B or 1, 1 or Hkv or Hq, Nk]`` floats added to the scaled scores of every
            query, in natural log units: ``log(n)`` for a key that stands for n merged tokens, -inf for a
            key to leave out. Used in fp32. Default: none
        return_lse (bool): also return the log-sum-exp. Default: False
        backend (str): ``"auto"`` (see :func:`resolve_backend`), ``"triton"``, ``"torch"``,
            ``"reference"`` or ``"gluon"`` (Hopper, without key_lengths and bias). Default: ``"auto"``

    Returns:
        Tensor or tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``;
        with ``return_lse`` also the natural log-sum-exp of the scores ``[B, Hq, Nq]`` fp32.

    Raises:
        LayoutError: shapes, dtypes or devices do not fit together.
        ParameterError: ``scale`` is not positive and finite.
        UnsupportedCallError: the backend does not support the call, or a gradient is asked for.
    """
    _check_tensors(query, key, value)
    _check_mask(query, key, block_mask)
    _check_extras(query, key, key_lengths, bias)
    inputs = (query, key, value) if bias is None else (query, key, value, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise UnsupportedCallError(
            "block_sparse_attention has no backward; call it under torch.no_grad() or detach its inputs"
        )
    if backend == "gluon" and (key_lengths is not None or bias is not None):
        raise UnsupportedCallError("backend 'gluon' supports neither key_lengths nor bias; use 'auto'")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ParameterError(f"scale must be positive and finite, got {scale}")
    output, lse = block_sparse_attention_op(
        query,
        key,
        value,
        block_mask.counts,
        block_mask.indices,
        key_lengths,
        bias,
        *block_mask.block_size,
        scale,
        resolve_backend(query, block_mask, backend),
    )
    return (output, lse) if return_lse else output


@torch.library.custom_op("sparse_attn::block_sparse_attention", mutates_args=())
def block_sparse_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator behind :func:`block_sparse_attention`; its arguments are taken as checked."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
    block_size = (query_block, key_block)
    extras: dict[str, Any] = {"scale": scale, "key_lengths": key_lengths, "bias": bias}
    if backend == "reference":
        block_mask = BlockSparseMask(counts, indices, block_size, query.shape[2], key.shape[2])
        output, lse = block_sparse_attention_reference(query, key, value, block_mask, **extras)
        return torch.empty_like(query).copy_(output), lse
    if backend == "torch":
        return block_sparse_attention_torch(query, key, value, counts, indices, block_size, **extras)
    # Triton is imported where it is launched, so that everything else works without it.
    if backend == "gluon":
        from kernels_common.block_sparse_gluon import block_sparse_attention_gluon

        return block_sparse_attention_gluon(query, key, value, counts, indices, block_size, scale=scale)
    from kernels_common.block_sparse_triton import block_sparse_attention_triton

    return block_sparse_attention_triton(query, key, value, counts, indices, block_size, **extras)


@block_sparse_attention_op.register_fake
def _(query, key, value, counts, indices, key_lengths, bias, query_block, key_block, scale, backend):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise LayoutError(f"query, key and value must be [B, H, N, D]; got {shapes}")
    if key.shape != value.shape or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise LayoutError(f"key and value must be alike and share B and D with query; got {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise LayoutError(f"query heads must be a multiple of key heads; got {shapes}")
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise LayoutError(
            "query, key and value must share dtype and device; got "
            + ", ".join(f"{part.dtype} on {part.device}" for part in (query, key, value))
        )
    if query.dtype not in DTYPES:
        raise UnsupportedCallError(
            f"block_sparse_attention supports fp16, bf16, fp32 and fp64, got {query.dtype}"
        )


def _check_mask(query: torch.Tensor, key: torch.Tensor, block_mask: BlockSparseMask) -> None:
    lengths = (block_mask.query_length, block_mask.key_length)
    if lengths != (query.shape[2], key.shape[2]):
        raise LayoutError(
            f"the mask is for {lengths} query and key tokens, got {(query.shape[2], key.shape[2])}"
        )
    batch, heads = block_mask.counts.shape[:2]
    if batch not in (1, query.shape[0]) or heads not in (1, query.shape[1]):
        raise LayoutError(
            f"the mask's batch and heads {(batch, heads)} must each be 1 or those of query, "
            f"{tuple(query.shape[:2])}"
        )
    if block_mask.counts.device != query.device or block_mask.indices.device != query.device:
        raise LayoutError(
            f"the mask is on {block_mask.device}, query on {query.device}; move it with mask.to()"
        )
    if any(size <= 0 or size % BLOCK_MULTIPLE for size in block_mask.block_size):
        raise UnsupportedCallError(
            f"mask blocks must be multiples of {BLOCK_MULTIPLE} tokens, got {block_mask.block_size}"
        )


def _check_extras(
    query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    if key_lengths is not None and (
        key_lengths.shape != query.shape[:1]
        or key_lengths.dtype not in (torch.int32, torch.int64)
        or key_lengths.device != query.device
    ):
        raise LayoutError(
            f"key_lengths must be [{query.shape[0]}] int32 or int64 on {query.device}; got "
            f"{tuple(key_lengths.shape)} {key_lengths.dtype} on {key_lengths.device}"
        )
    if bias is not None and (
        bias.dim() != 3
        or bias.shape[0] not in (1, query.shape[0])
        or bias.shape[1] not in (1, key.shape[1], query.shape[1])
        or bias.shape[2] != key.shape[2]
        or not bias.is_floating_point()
        or bias.device != query.device
    ):
        raise LayoutError(
            f"bias must be floating [1 or {query.shape[0]}, 1 or {key.shape[1]} or {query.shape[1]}, "
            f"{key.shape[2]}] on {query.device}; got {tuple(bias.shape)} {bias.dtype} on {bias.device}"
        )
