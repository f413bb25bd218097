"""Checks of the arguments of attention operators."""

import math
from numbers import Real

import torch

from core.argument_checks import check_alike, check_tensors_given, shapes_of
from core.block_mask import BlockSparseMask
from core.errors import LayoutError, ParameterError, UnsupportedCallError

BLOCK_MULTIPLE = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse query, key and value whose shapes, dtypes or devices do not fit together."""
    check_tensors_given(query=query, key=key, value=value)
    wrong = None
    if not query.dim() == key.dim() == value.dim() == 4:
        wrong = "query, key and value must be [B, H, N, D]"
    elif key.shape != value.shape or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        wrong = "key and value must be alike and share B and D with query"
    elif key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        wrong = "query heads must be a multiple of key heads"
    elif query.shape[3] == 0:
        wrong = "the head dimension must be at least 1"
    if wrong is not None:
        raise LayoutError(f"{wrong}; got {shapes_of(query=query, key=key, value=value)}")
    if query.dtype not in DTYPES:
        raise UnsupportedCallError(
            f"block-sparse operators support fp16, bf16, fp32 and fp64, got {query.dtype}"
        )
    check_alike(query=query, key=key, value=value)


def check_mask(query: torch.Tensor, key: torch.Tensor, block_mask: BlockSparseMask) -> None:
    """Refuse a mask of other lengths, heads or device, or of blocks that no kernel takes."""
    if not isinstance(block_mask, BlockSparseMask):
        raise LayoutError(
            f"expected a BlockSparseMask, got {type(block_mask).__name__}; from_blocks makes one "
            "from a bool matrix of blocks"
        )
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


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The factor on the scores, ``1 / sqrt(D)`` where none is given; refuses what is no positive number."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, Real) or not 0.0 < scale < math.inf:
        raise ParameterError(f"scale must be positive and finite, got {scale!r}")
    return float(scale)


def check_extras(
    query: torch.Tensor,
    key: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_sizes: torch.Tensor | None = None,
) -> None:
    """Refuse key lengths, a bias and sizes that do not fit the tensors."""
    given = {"key_lengths": key_lengths, "bias": bias, "key_sizes": key_sizes}
    check_tensors_given(**{name: tensor for name, tensor in given.items() if tensor is not None})
    if key_lengths is not None and (
        key_lengths.shape != query.shape[:1]
        or key_lengths.dtype not in (torch.int32, torch.int64)
        or key_lengths.device != query.device
    ):
        raise LayoutError(
            f"key_lengths must be [{query.shape[0]}] int32 or int64 on {query.device}; got "
            f"{tuple(key_lengths.shape)} {key_lengths.dtype} on {key_lengths.device}"
        )
    heads = dict.fromkeys((1, key.shape[1], query.shape[1]))
    if bias is not None and (
        bias.dim() != 3
        or bias.shape[0] not in (1, query.shape[0])
        or bias.shape[1] not in heads
        or bias.shape[2] != key.shape[2]
        or not bias.is_floating_point()
        or bias.device != query.device
    ):
        raise LayoutError(
            f"bias must be floating [1 or {query.shape[0]}, {' or '.join(map(str, heads))}, "
            f"{key.shape[2]}] on {query.device}; got {tuple(bias.shape)} {bias.dtype} on {bias.device}"
        )
    heads = dict.fromkeys((1, key.shape[1]))
    if key_sizes is not None and (
        key_sizes.dim() != 3
        or key_sizes.shape[0] not in (1, query.shape[0])
        or key_sizes.shape[1] not in heads
        or key_sizes.shape[2] > key.shape[2]
        or key_sizes.dtype == torch.bool
        or key_sizes.is_complex()
        or key_sizes.device != query.device
    ):
        raise LayoutError(
            f"key_sizes must be numbers [1 or {query.shape[0]}, {' or '.join(map(str, heads))}, "
            f"at most {key.shape[2]}] on {query.device}; got {tuple(key_sizes.shape)} {key_sizes.dtype} on "
            f"{key_sizes.device}"
        )
    if key_sizes is not None and bias is not None:
        raise UnsupportedCallError(
            "block-sparse attention takes bias or key_sizes; add log(sizes) to the bias"
        )
