"""Choice of key blocks in Triton: one program per row, which stays in registers.

The threshold is found bit by bit: floats that are not negative order as their bit patterns do, so at most 31
comparisons of the whole row with a candidate settle it exactly, without a sort. The kept blocks are then
moved to the front by a prefix sum.

Shape letters: K key blocks padded to a power of two.
"""

import torch
import triton
import triton.language as tl

from core.errors import UnsupportedCallError
from core.level_mask import LEVELS

MAX_KEY_BLOCKS = 16384
BLOCKS_PER_WARP = 512
_MASS_UNIT = tl.constexpr(2.0**36)  # as kernels_common.selection.MASS_UNIT
_LIMIT = tl.constexpr(0x44800000)  # the pattern of 1024.0, which no importance reaches
COUNT_UNIT = tl.constexpr(1 << 16)  # sums of masses are held above sums of up to as many ones


@triton.jit
def nth_largest(bits, count):
    """A pattern that ``count`` entries reach, or, where ties forbid that, the largest that more reach."""
    pattern = tl.full([], 0, tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    while bit > 0:
        reached = tl.sum((bits >= (pattern | bit)).to(tl.int32), 0)
        pattern = tl.where(reached >= count, pattern | bit, pattern)
        bit = tl.where(reached == count, 0, bit >> 1)
    return pattern


@triton.jit
def crossing(bits, held, limit):
    """The pattern of the entry with which ``held``, summed by rank, passes ``limit``; the sum before it.

    ``held`` holds a mass and a 1 per entry, so that the search ends when one entry is left.
    """
    pattern = tl.full([], 0, tl.int32)
    bit = tl.full([], 1 << 30, tl.int32)
    reached = tl.sum(held, 0)
    passed = reached * 0
    while bit > 0:
        larger = tl.sum(tl.where(bits >= (pattern | bit), held, 0), 0)
        beyond = larger > limit
        pattern = tl.where(beyond, pattern | bit, pattern)
        reached = tl.where(beyond, larger, reached)
        passed = tl.where(beyond, passed, larger)
        bit = tl.where((reached - passed) % COUNT_UNIT == 1, 0, bit >> 1)
    return tl.min(tl.where(bits >= pattern, bits, _LIMIT), 0), passed


@triton.jit
def _forced(
    row, forced_ptr, stride_fb, stride_fh, stride_fr, stride_fc, heads, query_blocks, columns, inside
):
    """Forced blocks of a row."""
    batch, head, line = row // query_blocks // heads, row // query_blocks % heads, row % query_blocks
    base = forced_ptr + batch.to(tl.int64) * stride_fb + head.to(tl.int64) * stride_fh
    pointers = base + line.to(tl.int64) * stride_fr + columns * stride_fc
    return tl.load(pointers, mask=inside, other=0) != 0


@triton.jit
def candidate_bits(row, importance_ptr, key_blocks, columns, candidate):
    """Bit patterns of a row's importances, -1 where a block is no candidate."""
    values = tl.load(importance_ptr + row.to(tl.int64) * key_blocks + columns, mask=candidate, other=0.0)
    return tl.where(candidate, tl.maximum(values.to(tl.float32).to(tl.int32, bitcast=True), 0), -1)


@triton.jit
def masses_of(bits):
    """Importances in multiples of 2^-36."""
    return (tl.maximum(bits, 0).to(tl.float32, bitcast=True) * _MASS_UNIT).to(tl.int64)


@triton.jit
def _store_list(kept, columns, row, counts_ptr, indices_ptr, key_blocks):
    """Count and ascending indices of one row."""
    places = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(indices_ptr + row.to(tl.int64) * key_blocks + places, columns, mask=kept)
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def first_ranks(bits, pattern, count):
    """The ``count`` entries of the highest rank; no entry below ``pattern`` is among them, all above are."""
    larger = bits > pattern
    ties = bits == pattern
    rank = tl.cumsum(ties.to(tl.int32), 0)
    return larger | (ties & (rank <= count - tl.sum(larger.to(tl.int32), 0)))


# Sizes and strides change with the sequence length; specialising on them would recompile.
@triton.jit(
    do_not_specialize=[
        "number", "stride_nh", "stride_nr", "stride_fb", "stride_fh", "stride_fr", "stride_fc",
        "heads", "query_blocks", "key_blocks",
    ]
)  # fmt: skip
def top_k_kernel(
    importance_ptr,
    number,
    forced_ptr,
    counts_ptr,
    indices_ptr,
    stride_nh,
    stride_nr,
    stride_fb,
    stride_fh,
    stride_fr,
    stride_fc,
    heads,
    query_blocks,
    key_blocks,
    K: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """List of one row: grid ``(B * H * Mq,)``. ``number`` is one for all, or points to several."""
    row = tl.program_id(0)
    columns = tl.arange(0, K)
    inside = columns < key_blocks
    forced = columns < 0
    if HAS_FORCED:
        forced = _forced(
            row, forced_ptr, stride_fb, stride_fh, stride_fr, stride_fc, heads, query_blocks, columns, inside
        )
    bits = candidate_bits(row, importance_ptr, key_blocks, columns, inside & (forced == 0))
    wanted = tl.sum((bits >= 0).to(tl.int32), 0)
    if SEVERAL:
        own = row // query_blocks % heads * stride_nh + row % query_blocks * stride_nr
        wanted = tl.minimum(wanted, tl.load(number + own))
    else:
        wanted = tl.minimum(wanted, number)
    kept = first_ranks(bits, nth_largest(bits, wanted), wanted) | forced
    _store_list(kept, columns, row, counts_ptr, indices_ptr, key_blocks)


@triton.jit(
    do_not_specialize=[
        "stride_shares", "stride_fb", "stride_fh", "stride_fr", "stride_fc",
        "heads", "query_blocks", "key_blocks", "min_blocks", "max_blocks",
    ]
)  # fmt: skip
def mass_kernel(
    importance_ptr,
    shares_ptr,
    forced_ptr,
    counts_ptr,
    indices_ptr,
    stride_shares,
    stride_fb,
    stride_fh,
    stride_fr,
    stride_fc,
    heads,
    query_blocks,
    key_blocks,
    min_blocks,
    max_blocks,
    K: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    INCLUDE_CROSSING: tl.constexpr,
):
    """List of one row: grid ``(B * H * Mq,)``."""
    row = tl.program_id(0)
    columns = tl.arange(0, K)
    inside = columns < key_blocks
    forced = columns < 0
    if HAS_FORCED:
        forced = _forced(
            row, forced_ptr, stride_fb, stride_fh, stride_fr, stride_fc, heads, query_blocks, columns, inside
        )
    bits = candidate_bits(row, importance_ptr, key_blocks, columns, inside & (forced == 0))
    candidates = tl.sum((bits >= 0).to(tl.int32), 0)
    masses = masses_of(bits)
    total = tl.sum(masses, 0)
    share = tl.load(shares_ptr + row // query_blocks % heads * stride_shares)
    target = share * total.to(tl.float64)
    limit = target.to(tl.int64)  # sums within the share are at most this
    if INCLUDE_CROSSING:  # sums below the share
        limit = tl.where(limit.to(tl.float64) == target, limit - 1, limit)

    held = tl.where(bits >= 0, masses * COUNT_UNIT + 1, 0)
    pattern, passed = crossing(bits, held, limit * COUNT_UNIT + (COUNT_UNIT - 1))
    room = (limit - passed // COUNT_UNIT) // tl.maximum(
        masses_of(pattern), 1
    )  # entries that tie with the crossing one
    found = (passed % COUNT_UNIT + room).to(tl.int32)
    if INCLUDE_CROSSING:
        found += 1
    known = (share < 1.0) & (total > 0)  # otherwise no entry crosses
    found = tl.where(known, found, tl.where(share < 1.0, 0, candidates))
    wanted = tl.minimum(tl.minimum(tl.maximum(found, min_blocks), max_blocks), candidates)
    if (wanted != found) | (known == 0):
        pattern = nth_largest(bits, wanted)
    kept = first_ranks(bits, pattern, wanted) | forced
    _store_list(kept, columns, row, counts_ptr, indices_ptr, key_blocks)


@triton.jit(do_not_specialize=["key_blocks"])
def lists_kernel(blocks_ptr, counts_ptr, indices_ptr, key_blocks, K: tl.constexpr):
    """List of one row of kept blocks: grid ``(B * H * Mq,)``."""
    row = tl.program_id(0)
    columns = tl.arange(0, K)
    pointers = blocks_ptr + row.to(tl.int64) * key_blocks + columns
    kept = tl.load(pointers, mask=columns < key_blocks, other=0) != 0
    _store_list(kept, columns, row, counts_ptr, indices_ptr, key_blocks)


@triton.jit(do_not_specialize=["key_blocks"])
def level_lists_kernel(
    levels_ptr, counts_ptr, indices_ptr, key_blocks, LEVELS: tl.constexpr, K: tl.constexpr
):
    """List of one row of levels 1, 2, 4, ..., one level after the other: grid ``(B * H * Mq,)``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, K)
    levels = tl.load(levels_ptr + row * key_blocks + columns, mask=columns < key_blocks, other=0)
    start = row * key_blocks
    for place in tl.static_range(LEVELS):
        listed = levels == (1 << place)
        places = start + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(indices_ptr + places, columns, mask=listed)
        count = tl.sum(listed.to(tl.int32), 0)
        tl.store(counts_ptr + row * LEVELS + place, count)
        start += count


def select_top_k_triton(
    importance: torch.Tensor, counts: int | torch.Tensor, forced: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of what :func:`kernels_common.selection.top_k_blocks` keeps.

    Returns:
        tuple[Tensor, Tensor]: counts ``[B, H, Mq]`` and indices ``[B, H, Mq, Mk]``, both int32.

    Raises:
        UnsupportedCallError: more than 16384 key blocks.
    """
    lists, launch = _lists(importance)
    strides = [0, 0]
    if isinstance(counts, torch.Tensor):
        strides = [step * (size > 1) for step, size in zip(counts.stride(), counts.shape, strict=True)]
    with torch.cuda.device_of(importance):
        top_k_kernel[(lists[0].numel(),)](
            importance.contiguous(), counts, _bytes(forced), *lists, *strides, *_strides(forced),
            *importance.shape[1:], HAS_FORCED=forced is not None,
            SEVERAL=isinstance(counts, torch.Tensor), **launch,
        )  # fmt: skip
    return lists


def select_mass_triton(
    importance: torch.Tensor,
    shares: torch.Tensor,
    bounds: tuple[int, int],
    forced: torch.Tensor | None,
    *,
    include_crossing: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of what :func:`kernels_common.selection.mass_blocks` keeps.

    Returns:
        tuple[Tensor, Tensor]: counts ``[B, H, Mq]`` and indices ``[B, H, Mq, Mk]``, both int32.

    Raises:
        UnsupportedCallError: more than 16384 key blocks.
    """
    lists, launch = _lists(importance)
    with torch.cuda.device_of(importance):
        mass_kernel[(lists[0].numel(),)](
            importance.contiguous(), shares.contiguous(), _bytes(forced), *lists, int(len(shares) > 1),
            *_strides(forced), *importance.shape[1:], *bounds, HAS_FORCED=forced is not None,
            INCLUDE_CROSSING=include_crossing, **launch,
        )  # fmt: skip
    return lists


def lists_from_blocks_triton(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; as :func:`kernels_common.lists_from_blocks`."""
    lists, launch = _lists(blocks)
    with torch.cuda.device_of(blocks):
        lists_kernel[(lists[0].numel(),)](
            blocks.contiguous().view(torch.uint8), *lists, blocks.shape[3], **launch
        )
    return lists


def lists_from_levels_triton(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; as :func:`kernels_common.selection.lists_from_levels`."""
    lists, launch = _lists(levels, len(LEVELS))
    with torch.cuda.device_of(levels):
        level_lists_kernel[(levels.shape[:3].numel(),)](
            levels.contiguous(), *lists, levels.shape[3], LEVELS=len(LEVELS), **launch
        )
    return lists


def _lists(
    rows: torch.Tensor, *counts_per_row: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, int]]:
    """Empty counts and indices for rows ``[B, H, Mq, Mk]``, and how to launch a program per row."""
    launch = row_launch(rows.shape[3])
    counts = torch.empty((*rows.shape[:3], *counts_per_row), dtype=torch.int32, device=rows.device)
    indices = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    return (counts, indices), launch


def row_launch(key_blocks: int) -> dict[str, int]:
    """How to launch a program per row of so many key blocks.

    Raises:
        UnsupportedCallError: more than 16384 key blocks.
    """
    if key_blocks > MAX_KEY_BLOCKS:
        raise UnsupportedCallError(
            f"the selection kernels hold up to {MAX_KEY_BLOCKS} key blocks, got {key_blocks}; "
            "use larger blocks"
        )
    padded = max(32, triton.next_power_of_2(key_blocks))
    return {"K": padded, "num_warps": max(1, padded // BLOCKS_PER_WARP)}


def _bytes(forced: torch.Tensor | None) -> torch.Tensor | None:
    return None if forced is None else forced.view(torch.uint8)


def _strides(forced: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if forced is None else forced.stride()
