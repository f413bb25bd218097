"""Checks of the arguments of block-sparse operators."""

import torch

from core.block_mask import BlockSparseMask
from core.errors import LayoutError, UnsupportedCallError

BLOCK_MULTIPLE = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse query, key and value whose shapes, dtypes or devices do not fit together."""
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
            f"block-sparse operators support fp16, bf16, fp32 and fp64, got {query.dtype}"
        )


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


def check_extras(
    query: torch.Tensor, key: torch.Tensor, key_lengths: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    """Refuse key lengths and a bias that do not fit the tensors."""
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
