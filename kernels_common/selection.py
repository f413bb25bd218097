"""Choice of key blocks by importance, as lists.

Entries are ranked by falling importance, ties by rising index, so that every form chooses the same blocks.
Shape letters: B batch, H heads, M blocks.
"""

from numbers import Real

import torch

from core.argument_checks import check_block_shape, check_tensors_given
from core.block_mask import BlockSparseMask, block_count
from core.errors import LayoutError, ParameterError
from core.level_mask import level_lists
from kernels_common.triton_choice import runs_triton

# Sums of importances are taken in multiples of 2^-36 as integers: exact in any order.
MASS_UNIT = 2.0**36
# 0.29 * 100 is below 29 in floating point; a product this near to the next integer counts as it.
ROUNDING = 1e-4


def select_top_k(
    importance: torch.Tensor,
    keep: int | float | torch.Tensor,
    block_size: tuple[int, int],
    query_length: int,
    key_length: int,
    *,
    forced: torch.Tensor | None = None,
) -> BlockSparseMask:
    """The most important key blocks of every row, without a device synchronisation.

    Args:
        importance (Tensor): ``[B or 1, H or 1, Mq, Mk]``, not negative.
        keep (int | float | Tensor): blocks per row. An int is their number, >= 1; a float in (0, 1] a share
            of Mk, rounded down but at least 1. A tensor ``[H or 1]`` on the device of ``importance`` holds
            one of either kind per head, ``[H or 1, Mq]`` one per head and row; it is trusted.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        query_length (int): query tokens.
        key_length (int): key tokens.
        forced (Tensor, Optional): blocks kept in any case, bool, broadcastable to ``importance``. They are
            not counted in ``keep``: that many of the others are chosen. Default: none

    Returns:
        BlockSparseMask: lists on the device of ``importance``.

    Raises:
        LayoutError: shapes or devices do not fit together.
        ParameterError: ``keep`` is out of its range.
    """
    importance, forced = _check(importance, forced, block_size, query_length, key_length)
    counts = _block_counts("keep", keep, importance)
    if runs_triton(importance):
        from kernels_common.selection_triton import select_top_k_triton

        lists = select_top_k_triton(importance, counts, forced)
        return BlockSparseMask(*lists, block_size, query_length, key_length)
    kept = top_k_blocks(importance, counts, forced)
    return BlockSparseMask.from_blocks(kept, block_size, query_length, key_length)


def select_mass(
    importance: torch.Tensor,
    mass: float | torch.Tensor,
    block_size: tuple[int, int],
    query_length: int,
    key_length: int,
    *,
    include_crossing: bool,
    min_blocks: int | float = 1,
    max_blocks: int | float = 1.0,
    forced: torch.Tensor | None = None,
) -> BlockSparseMask:
    """The fewest key blocks of every row that hold a share of its importance; no device synchronisation.

    Args:
        importance (Tensor): ``[B or 1, H or 1, Mq, Mk]``, not negative, rows summing to about 1
            (at most 1000).
        mass (float | Tensor): share of the row's sum, > 0; from 1 on every block is kept. A tensor ``[H]`` on
            the device of ``importance`` holds one per head, and is trusted.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        query_length (int): query tokens.
        key_length (int): key tokens.
        include_crossing (bool): whether the block with which the sum reaches ``mass`` is kept. True: the kept
            blocks hold at least ``mass`` (energy threshold of gilbert-block). False: at most ``mass``
            (SpargeAttn, arXiv 2502.18137).
        min_blocks (int | float): fewest blocks per row, as ``keep`` of :func:`select_top_k`. Default: 1
        max_blocks (int | float): most blocks per row, likewise. Default: 1.0, all
        forced (Tensor, Optional): blocks kept in any case, bool, broadcastable to ``importance``. They count
            in none of the other numbers: shares are of the sum over the others. Default: none

    Returns:
        BlockSparseMask: lists on the device of ``importance``.

    Raises:
        LayoutError: shapes or devices do not fit together.
        ParameterError: ``mass``, ``min_blocks`` or ``max_blocks`` is out of its range.
    """
    importance, forced = _check(importance, forced, block_size, query_length, key_length)
    shares = _shares(mass, importance)
    bounds = (
        _block_number("min_blocks", min_blocks, importance.shape[3]),
        _block_number("max_blocks", max_blocks, importance.shape[3]),
    )
    if bounds[0] > bounds[1]:
        raise ParameterError(f"min_blocks {min_blocks} must not exceed max_blocks {max_blocks}")
    if runs_triton(importance):
        from kernels_common.selection_triton import select_mass_triton

        lists = select_mass_triton(importance, shares, bounds, forced, include_crossing=include_crossing)
        return BlockSparseMask(*lists, block_size, query_length, key_length)
    kept = mass_blocks(importance, shares, bounds, forced, include_crossing=include_crossing)
    return BlockSparseMask.from_blocks(kept, block_size, query_length, key_length)


def lists_from_blocks(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of kept blocks: what :meth:`BlockSparseMask.from_blocks` makes, without its sort on GPUs.

    Args:
        blocks (Tensor): ``[B or 1, H or 1, Mq, Mk]`` bool; True is kept.

    Returns:
        tuple[Tensor, Tensor]: counts ``[B or 1, H or 1, Mq]`` and ascending indices
        ``[B or 1, H or 1, Mq, Mk]``, both int32; entries past a count are undefined.

    Raises:
        LayoutError: not bool with four dimensions.
    """
    check_tensors_given(blocks=blocks)
    if blocks.dtype != torch.bool or blocks.dim() != 4:
        raise LayoutError(f"blocks must be bool [B, H, Mq, Mk], got {blocks.dtype} {tuple(blocks.shape)}")
    if runs_triton(blocks):
        from kernels_common.selection_triton import lists_from_blocks_triton

        return lists_from_blocks_triton(blocks)
    mask = BlockSparseMask.from_blocks(blocks, (1, 1), *blocks.shape[2:])
    return mask.counts, mask.indices


def lists_from_levels(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of levels: what :meth:`LevelMask.from_levels` makes, by one launch on GPUs.

    Args:
        levels (Tensor): ``[B or 1, H or 1, Mq, Mk]`` int8: 1, 2, 4 or 8; others leave the block out.

    Returns:
        tuple[Tensor, Tensor]: counts per level ``[B or 1, H or 1, Mq, 4]`` and indices
        ``[B or 1, H or 1, Mq, Mk]``, level by level and ascending, both int32; entries past the counts are
        undefined.

    Raises:
        LayoutError: not int8 with four dimensions.
    """
    check_tensors_given(levels=levels)
    if levels.dtype != torch.int8 or levels.dim() != 4:
        raise LayoutError(f"levels must be int8 [B, H, Mq, Mk], got {levels.dtype} {tuple(levels.shape)}")
    if runs_triton(levels):
        from kernels_common.selection_triton import lists_from_levels_triton

        return lists_from_levels_triton(levels)
    return level_lists(levels)


def top_k_blocks(
    importance: torch.Tensor, counts: int | torch.Tensor, forced: torch.Tensor | None
) -> torch.Tensor:
    """Kept blocks by a sort, ``[B, H, Mq, Mk]`` bool.

    Args:
        importance (Tensor): ``[B, H, Mq, Mk]``.
        counts (int | Tensor): blocks to choose, or ``[H or 1, Mq or 1]`` int32, one per head and row.
        forced (Tensor, Optional): ``[B, H, Mq, Mk]`` bool.
    """
    _, order = _ranked(importance, forced)
    return _first(order, counts if isinstance(counts, int) else counts[..., None], forced)


def mass_blocks(
    importance: torch.Tensor,
    shares: torch.Tensor,
    bounds: tuple[int, int],
    forced: torch.Tensor | None,
    *,
    include_crossing: bool,
) -> torch.Tensor:
    """Kept blocks by a sort and a cumulative sum, ``[B, H, Mq, Mk]`` bool.

    Args:
        importance (Tensor): ``[B, H, Mq, Mk]``.
        shares (Tensor): share of the importance to keep per head, ``[H or 1]`` float64.
        bounds (tuple[int, int]): fewest and most blocks to choose.
        forced (Tensor, Optional): ``[B, H, Mq, Mk]`` bool.
        include_crossing (bool): keep the block that reaches the share.
    """
    ranked, order = _ranked(importance, forced)
    sums = (ranked.clamp(min=0.0).to(torch.float64) * MASS_UNIT).to(torch.int64).cumsum(-1)
    total, share = sums[..., -1:], shares[:, None, None]
    target = share * total.to(torch.float64)
    below = (sums < target if include_crossing else sums <= target).sum(-1) + int(include_crossing)
    found = below.masked_fill(total[..., 0] == 0, 0).where(share[..., 0] < 1.0, importance.shape[3])
    return _first(order, found.clamp(*bounds)[..., None], forced)


def _ranked(importance: torch.Tensor, forced: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Importances in order of rank, forced blocks last with -1, and the blocks' indices."""
    candidates = importance.clamp(min=0.0)
    if forced is not None:
        candidates = candidates.masked_fill(forced, -1.0)
    return candidates.sort(dim=-1, descending=True, stable=True)


def _first(order: torch.Tensor, counts: int | torch.Tensor, forced: torch.Tensor | None) -> torch.Tensor:
    """The first ``counts`` (broadcastable to ``[B, H, Mq, 1]``) blocks of every row, and the forced ones."""
    chosen = (torch.arange(order.shape[-1], device=order.device) < counts).expand(order.shape)
    kept = torch.zeros_like(chosen, memory_format=torch.contiguous_format).scatter_(-1, order, chosen)
    return kept if forced is None else kept | forced


def _check(
    importance: torch.Tensor,
    forced: torch.Tensor | None,
    block_size: tuple[int, int],
    query_length: int,
    key_length: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Importance, and forced blocks expanded to its shape."""
    check_tensors_given(importance=importance)
    check_block_shape(block_size, query_length, key_length)
    expected = (block_count(query_length, block_size[0]), block_count(key_length, block_size[1]))
    shape = tuple(importance.shape)
    if not importance.is_floating_point() or len(shape) != 4 or shape[2:] != expected:
        raise LayoutError(
            f"importance for {query_length} x {key_length} tokens in blocks of {block_size} must be floating "
            f"[B, H, {expected[0]}, {expected[1]}], got {importance.dtype} {shape}"
        )
    importance = importance.detach()
    if forced is None:
        return importance, None
    check_tensors_given(forced=forced)
    trailing = zip(reversed(forced.shape), reversed(shape), strict=False)
    fits = forced.dim() <= 4 and all(size in (1, wanted) for size, wanted in trailing)
    if forced.dtype != torch.bool or not fits or forced.device != importance.device:
        raise LayoutError(
            f"forced must be bool, broadcastable to {shape}, on {importance.device}; got {forced.dtype} "
            f"{tuple(forced.shape)} on {forced.device}"
        )
    return importance, forced.expand(shape)


def _block_number(name: str, number: int | float, blocks: int) -> int:
    """A number of blocks, or a share of ``blocks``, as a number from 1 to ``blocks``."""
    if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
        return min(number, blocks)
    if isinstance(number, float) and 0.0 < number <= 1.0:
        return max(1, int(number * blocks + ROUNDING))
    raise ParameterError(f"{name} must be an int >= 1 or a share of the blocks in (0, 1], got {number!r}")


def _block_counts(
    name: str, number: int | float | torch.Tensor, importance: torch.Tensor
) -> int | torch.Tensor:
    """Blocks to choose: a number, or ``[H or 1, Mq or 1]`` int32 on the device, one per head and row."""
    blocks = importance.shape[3]
    if not isinstance(number, torch.Tensor):
        return _block_number(name, number, blocks)
    _check_per_head(name, number, importance, rows=True)
    if number.dim() == 1:
        number = number[:, None]
    if number.is_floating_point():
        number = number.to(torch.float64) * blocks + ROUNDING
    return number.clamp(1, blocks).to(torch.int32)


def _shares(mass: float | torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Share of the importance to keep per head, ``[H or 1]`` float64 on the device."""
    if isinstance(mass, torch.Tensor):
        _check_per_head("mass", mass, importance)
        return mass.to(torch.float64)
    if not isinstance(mass, Real) or not mass > 0.0:
        raise ParameterError(f"mass must be a share of the importance > 0, got {mass!r}")
    return torch.full((1,), float(mass), dtype=torch.float64, device=importance.device)


def _check_per_head(
    name: str, numbers: torch.Tensor, importance: torch.Tensor, *, rows: bool = False
) -> None:
    heads, lines = importance.shape[1:3]
    shape = tuple(numbers.shape)
    allowed = [(heads,), (1,)] + [(heads, lines), (1, lines)] * rows
    if shape not in allowed or numbers.device != importance.device:
        per_row = f" or [{heads}, {lines}]" if rows else ""
        raise LayoutError(
            f"{name} must be a number or [{heads}]{per_row} on {importance.device}, got {shape} on "
            f"{numbers.device}"
        )
