"""Blocks that are kept in any case, and the number of blocks that adapts to each row.

Shape letters: B batch, H heads, M blocks.
"""

import torch

from core.block_mask import BlockSparseMask, block_count
from core.layout import TokenLayout
from kernels_common.selection import ROUNDING, lists_from_blocks

# A row whose first blocks hold less than the share gets so many times their number.
ADAPTATIONS = ((0.6, 3), (0.9, 2))


def forced_blocks(layout: TokenLayout, block_size: tuple[int, int]) -> torch.Tensor:
    """Blocks with text on either side, and those on the diagonal.

    Args:
        layout (TokenLayout): where text stands in the order of the blocks.
        block_size (tuple[int, int]): tokens of a (query block, key block).

    Returns:
        Tensor: ``[Mq, Mk]`` bool.
    """
    length, text = layout.sequence_length, layout.text_slice
    rows, columns = (torch.arange(block_count(length, size)) * size for size in block_size)
    row_ends, column_ends = rows + block_size[0], columns + block_size[1]
    forced = (rows[:, None] < column_ends) & (columns < row_ends[:, None])
    if layout.text_length:
        forced |= ((rows < text.stop) & (row_ends > text.start))[:, None]
        forced |= (columns < text.stop) & (column_ends > text.start)
    return forced


def adaptive_top_k(
    importance: torch.Tensor,
    keep_ratio: float,
    block_size: tuple[int, int],
    query_length: int,
    key_length: int,
    forced: torch.Tensor,
) -> BlockSparseMask:
    """As many blocks of every row as ``keep_ratio`` says, or more where these hold too little.

    Rows whose first blocks hold less than 60 % of the importance get three times as many, below 90 % twice.
    Forced blocks are kept as well and count in none of these numbers.

    Args:
        importance (Tensor): ``[B, H, Mq, Mk]``, not negative.
        keep_ratio (float): share of the key blocks to begin with, in (0, 1].
        block_size (tuple[int, int]): tokens of a (query block, key block).
        query_length (int): query tokens.
        key_length (int): key tokens.
        forced (Tensor): ``[Mq, Mk]`` bool.
    """
    candidates = importance.clamp(min=0.0).masked_fill(forced, 0.0)
    ranked, order = candidates.masked_fill(forced, -1.0).sort(dim=-1, descending=True, stable=True)
    first = max(1, int(keep_ratio * importance.shape[3] + ROUNDING))
    held = ranked[..., :first].clamp(min=0.0).sum(-1)
    total = candidates.sum(-1)
    counts = torch.full_like(held, first)
    for share, times in reversed(ADAPTATIONS):
        counts = torch.where(held < share * total, float(first * times), counts)
    chosen = torch.arange(importance.shape[3], device=importance.device) < counts[..., None]
    blocks = torch.zeros_like(chosen).scatter_(-1, order, chosen) | forced
    return BlockSparseMask(*lists_from_blocks(blocks), block_size, query_length, key_length)
