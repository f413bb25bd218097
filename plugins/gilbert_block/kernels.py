"""Pooling levels of whole rows of blocks in Triton: thresholds found bit by bit, no sort.

One program takes one row, as in `kernels_common.selection_triton`, and chooses the blocks of every level
together with those of the finer ones: the finest choice that a block is in is its level.

Shape letters: K key blocks padded to a power of two.
"""

import torch
import triton
import triton.language as tl

from kernels_common.selection_triton import (
    COUNT_UNIT,
    candidate_bits,
    crossing,
    first_ranks,
    masses_of,
    nth_largest,
    row_launch,
)


@triton.jit
def _candidates(importance_ptr, forced_ptr, query_blocks, key_blocks, columns):
    """Bit patterns of a row, -1 past the blocks and where a block is forced; and the forced blocks."""
    row = tl.program_id(0)
    inside = columns < key_blocks
    forced_row = forced_ptr + (row % query_blocks).to(tl.int64) * key_blocks
    forced = tl.load(forced_row + columns, mask=inside, other=0) != 0
    return candidate_bits(row, importance_ptr, key_blocks, columns, inside & (forced == 0)), forced


@triton.jit
def _first(bits, number):
    """The ``number`` entries of the highest rank, or all if there are fewer."""
    number = tl.minimum(number, tl.sum((bits >= 0).to(tl.int32), 0))
    return first_ranks(bits, nth_largest(bits, number), number)


@triton.jit
def _store_levels(levels, forced, levels_ptr, key_blocks, columns):
    pointers = levels_ptr + tl.program_id(0).to(tl.int64) * key_blocks + columns
    tl.store(pointers, tl.where(forced, 1, levels).to(tl.int8), mask=columns < key_blocks)


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "number_1", "number_2", "number_4", "number_8"])
def rank_levels_kernel(
    importance_ptr,
    forced_ptr,
    levels_ptr,
    query_blocks,
    key_blocks,
    number_1,
    number_2,
    number_4,
    number_8,
    K: tl.constexpr,
):
    """Levels of one row from the numbers of blocks up to each: grid ``(B * H * Mq,)``."""
    columns = tl.arange(0, K)
    bits, forced = _candidates(importance_ptr, forced_ptr, query_blocks, key_blocks, columns)
    levels = tl.where(_first(bits, number_8), 8, 0)
    levels = tl.where(_first(bits, number_4), 4, levels)
    levels = tl.where(_first(bits, number_2), 2, levels)
    levels = tl.where(_first(bits, number_1), 1, levels)
    _store_levels(levels, forced, levels_ptr, key_blocks, columns)


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "least"])
def mass_levels_kernel(
    importance_ptr,
    forced_ptr,
    levels_ptr,
    query_blocks,
    key_blocks,
    least,
    BOUNDS: tl.constexpr,
    K: tl.constexpr,
):
    """Levels of one row from the share of its importance up to each: grid ``(B * H * Mq,)``."""
    columns = tl.arange(0, K)
    bits, forced = _candidates(importance_ptr, forced_ptr, query_blocks, key_blocks, columns)
    masses = masses_of(bits)
    total = tl.sum(masses, 0)
    held = tl.where(bits >= 0, masses * COUNT_UNIT + 1, 0)
    levels = tl.zeros([K], dtype=tl.int32)
    end = tl.full([], 0, tl.int32) + least
    for place in tl.static_range(len(BOUNDS)):
        if BOUNDS[place] < 1.0:
            limit = (total.to(tl.float64) * BOUNDS[place]).to(tl.int64)
            pattern, passed = crossing(bits, held, limit * COUNT_UNIT + (COUNT_UNIT - 1))
            ties = (limit - passed // COUNT_UNIT) // tl.maximum(masses_of(pattern), 1)
            within = tl.where(total > 0, passed % COUNT_UNIT + ties, 0).to(tl.int32)
            opens = (within > end) | (place == 0)
            end = tl.where(opens, tl.maximum(within + 1, end), end)
        else:
            end = tl.maximum(end, key_blocks)
        chosen = _first(bits, end)
        levels = tl.where((levels == 0) & chosen, 1 << place, levels)
    _store_levels(levels, forced, levels_ptr, key_blocks, columns)


def rank_levels(importance: torch.Tensor, numbers: tuple[int, ...], forced: torch.Tensor) -> torch.Tensor:
    """Launch the kernel; as :func:`plugins.gilbert_block.levels.levels_by_rank`.

    Args:
        importance (Tensor): ``[B, H, Mq, Mk]`` fp32, not negative.
        numbers (tuple[int, ...]): for each level the number of blocks that have it or a finer one.
        forced (Tensor): ``[Mq, Mk]`` bool.

    Raises:
        UnsupportedCallError: more than 16384 key blocks.
    """
    levels = torch.empty(importance.shape, dtype=torch.int8, device=importance.device)
    with torch.cuda.device_of(importance):
        rank_levels_kernel[(importance.shape[:3].numel(),)](
            importance.contiguous(), forced.contiguous().view(torch.uint8), levels, *importance.shape[2:],
            *numbers, **row_launch(importance.shape[3]),
        )  # fmt: skip
    return levels


def mass_levels(
    importance: torch.Tensor, bounds: tuple[float, ...], least: int, forced: torch.Tensor
) -> torch.Tensor:
    """Launch the kernel; as :func:`plugins.gilbert_block.levels.levels_by_mass`.

    Args:
        importance (Tensor): ``[B, H, Mq, Mk]`` fp32, not negative.
        bounds (tuple[float, ...]): for each level the share of the importance that has it or a finer one;
            the kernel is compiled for them.
        least (int): blocks that level 1 has at least.
        forced (Tensor): ``[Mq, Mk]`` bool.

    Raises:
        UnsupportedCallError: more than 16384 key blocks.
    """
    levels = torch.empty(importance.shape, dtype=torch.int8, device=importance.device)
    with torch.cuda.device_of(importance):
        mass_levels_kernel[(importance.shape[:3].numel(),)](
            importance.contiguous(), forced.contiguous().view(torch.uint8), levels, *importance.shape[2:],
            least, BOUNDS=bounds, **row_launch(importance.shape[3]),
        )  # fmt: skip
    return levels
