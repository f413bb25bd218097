"""Exact, spatial and temporal attention of the sampled rows in one read of keys and values (Triton).

Every program of the first kernel takes one head, a tile of sampled rows and a share of the keys. Scores and
exponentials are computed once, against the peak of all keys; a pattern weighs those of its keys alone. The
second kernel merges the shares and compares the outputs. Nothing of size R x S is read or written.

Shape letters: R sampled rows of a tile, N keys of a tile, D head dimension padded to a power of two.
"""

import functools

import torch
import triton
import triton.language as tl

from plugins.svg_smart.patterns import KEYS_PER_WORD, HeadPatterns

LOG2_E = tl.constexpr(1.4426950408889634)
# The largest weight is 2^15: a pattern without the peak of all keys has smaller ones, and fp16 ends at 2^-24.
HEADROOM = tl.constexpr(15.0)
PROGRAMS = 512  # enough for several on each multiprocessor
ROWS_PER_TILE = 32
ROWS_PER_COMPARISON = 16


@triton.jit
def _sees(seen_ptr, place, words, word, MASK_M: tl.constexpr, TILE_N: tl.constexpr):
    """Keys of tile ``word`` that queries at some places of a pattern's order see, ``[R, N]`` bool.

    A word is read in halves: shifts of 64 bits take several instructions.
    """
    half_ptrs = seen_ptr + (place // MASK_M * words + word) * 2
    bit = tl.arange(0, TILE_N)[None, :]
    bits = tl.where(bit < 32, tl.load(half_ptrs)[:, None], tl.load(half_ptrs + 1)[:, None])
    return ((bits >> (bit & 31)) & 1) != 0


@triton.jit
def _add(weights, value_tile, acc, total, rescale):
    """Add a tile's weights ``[R, N]`` and weighted values to the sums of a pattern."""
    acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc * rescale[:, None])
    return acc, total * rescale + tl.sum(weights, 1)


@triton.jit(
    do_not_specialize=["length", "rows_count", "query_blocks", "words", "keys_per_split", "scale_log2"]
)
def sampled_attention_kernel(  # noqa: PLR0915 (compiled code)
    query_ptr, key_ptr, value_ptr, rows_ptr, places_ptr, seen_ptr, acc_ptr, peak_ptr, total_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, length, rows_count, query_blocks, words, keys_per_split, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, TILE_N: tl.constexpr,
    MASK_M: tl.constexpr,
):  # fmt: skip
    """Partial outputs, peaks and totals of one (head, split, tile): grid ``(B * H, splits, tiles)``."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    token = tl.load(rows_ptr + row, mask=row < rows_count, other=0)
    spatial_place = tl.load(places_ptr + token)
    temporal_place = tl.load(places_ptr + length + token)
    temporal_ptr = seen_ptr + query_blocks * words * 2

    query_ptrs = query_ptr + batch * stride_qb + head * stride_qh + token[:, None] * stride_qn
    query_tile = tl.load(query_ptrs + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)
    key_ptr += batch * stride_kb + head * stride_kh
    value_ptr += batch * stride_vb + head * stride_vh
    peak = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    exact_acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    spatial_acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    temporal_acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    exact = tl.zeros([BLOCK_R], dtype=tl.float32)
    spatial = tl.zeros([BLOCK_R], dtype=tl.float32)
    temporal = tl.zeros([BLOCK_R], dtype=tl.float32)
    begin = tl.program_id(1) * keys_per_split
    for start in range(begin, tl.minimum(begin + keys_per_split, length), TILE_N):
        column = start + tl.arange(0, TILE_N)
        inside = column < length
        inner = inside[:, None] & (dims[None, :] < HEAD_DIM)
        offset = column.to(tl.int64)[:, None]
        key_tile = tl.load(key_ptr + offset * stride_kn + dims[None, :], mask=inner, other=0.0)
        value_tile = tl.load(value_ptr + offset * stride_vn + dims[None, :], mask=inner, other=0.0)
        word = start // TILE_N
        in_spatial = _sees(seen_ptr, spatial_place, words, word, MASK_M, TILE_N)
        in_temporal = _sees(temporal_ptr, temporal_place, words, word, MASK_M, TILE_N)
        scores = tl.dot(query_tile, key_tile.T) * scale_log2
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        rescale = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - (new_peak - HEADROOM)[:, None])
        exact_acc, exact = _add(weights, value_tile, exact_acc, exact, rescale)
        seen = tl.where(in_spatial, weights, 0.0)
        spatial_acc, spatial = _add(seen, value_tile, spatial_acc, spatial, rescale)
        seen = tl.where(in_temporal, weights, 0.0)
        temporal_acc, temporal = _add(seen, value_tile, temporal_acc, temporal, rescale)
        peak = new_peak

    rows = tl.num_programs(2) * BLOCK_R
    part = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows
    tl.store(peak_ptr + part + row, peak)
    cell = part * 3 + row
    tl.store(total_ptr + cell, exact)
    tl.store(total_ptr + cell + rows, spatial)
    tl.store(total_ptr + cell + 2 * rows, temporal)
    acc_ptrs = acc_ptr + cell[:, None] * BLOCK_D + dims[None, :]
    tl.store(acc_ptrs, exact_acc)
    tl.store(acc_ptrs + rows * BLOCK_D, spatial_acc)
    tl.store(acc_ptrs + 2 * rows * BLOCK_D, temporal_acc)


@triton.jit
def _merged(acc_ptr, peak_ptr, total_ptr, row, peak, splits, rows, dims, pattern: tl.constexpr):
    """Output ``[R, D]`` of one pattern from its shares; 0 where it has no weight beside the peak of all keys.

    ``row`` are the rows in the first split, ``rows`` how many a split has, ``dims`` the columns.
    """
    acc = tl.zeros([row.shape[0], dims.shape[0]], dtype=tl.float32)
    total = tl.zeros([row.shape[0]], dtype=tl.float32)
    for split in range(splits):
        factor = tl.exp2(tl.load(peak_ptr + row + split * rows) - peak)
        cell = row + (split * 3 + pattern) * rows
        total += tl.load(total_ptr + cell) * factor
        acc += tl.load(acc_ptr + cell[:, None] * dims.shape[0] + dims[None, :]) * factor[:, None]
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["splits", "rows"])
def pattern_errors_kernel(
    acc_ptr, peak_ptr, total_ptr, errors_ptr, splits, rows, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Squared error of both patterns, summed over columns: grid ``(B * H, rows / BLOCK_R)``.

    ``errors_ptr`` is ``[2, B * H, rows]`` fp32.
    """
    dims = tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(0).to(tl.int64) * splits * rows
    acc_ptr += part * 3 * BLOCK_D
    peak_ptr += part
    total_ptr += part * 3
    peak = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(peak_ptr + row + split * rows))
    exact = _merged(acc_ptr, peak_ptr, total_ptr, row, peak, splits, rows, dims, 0)
    spatial = _merged(acc_ptr, peak_ptr, total_ptr, row, peak, splits, rows, dims, 1) - exact
    temporal = _merged(acc_ptr, peak_ptr, total_ptr, row, peak, splits, rows, dims, 2) - exact
    cell = tl.program_id(0) * rows + row
    tl.store(errors_ptr + cell, tl.sum(spatial * spatial, 1))
    tl.store(errors_ptr + tl.num_programs(0) * rows + cell, tl.sum(temporal * temporal, 1))


def sampled_errors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, patterns: HeadPatterns
) -> torch.Tensor:
    """Launch both kernels; arguments and result as in :func:`plugins.svg_smart.profiling.pattern_errors`.

    The head dimension is at most 128. A pattern whose keys all weigh less than 2^-39 of the peak (fp16) or
    2^-126 has output 0 here.
    """
    batch, heads, length, dim = query.shape
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    block_r = min(ROWS_PER_TILE, max(ROWS_PER_COMPARISON, triton.next_power_of_2(len(rows))))
    block_d = max(16, triton.next_power_of_2(dim))
    tiles = triton.cdiv(len(rows), block_r)
    splits = max(1, min(PROGRAMS // (batch * heads * tiles), triton.cdiv(length, KEYS_PER_WORD)))
    keys_per_split = triton.cdiv(triton.cdiv(length, splits), KEYS_PER_WORD) * KEYS_PER_WORD
    splits = triton.cdiv(length, keys_per_split)  # none without a key
    count = tiles * block_r
    empty = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    peak, total = empty(batch * heads, splits, count), empty(batch * heads, splits, 3, count)
    acc, errors = empty(batch * heads, splits, 3, count, block_d), empty(2, batch, heads, count)
    num_warps = max(2, block_d // 32)  # of 32 rows two warps hold half each, and sum without each other
    with torch.cuda.device_of(query):
        sampled_attention_kernel[(batch * heads, splits, tiles)](
            query, key, value, rows, patterns.places, patterns.seen.view(torch.int32), acc, peak, total,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            heads, length, len(rows), *patterns.seen.shape[1:], keys_per_split, dim**-0.5 * LOG2_E.value,
            HEAD_DIM=dim, BLOCK_D=block_d, BLOCK_R=block_r, TILE_N=KEYS_PER_WORD,
            MASK_M=patterns.masks.block_size[0], num_warps=num_warps,
        )  # fmt: skip
        pattern_errors_kernel[(batch * heads, count // ROWS_PER_COMPARISON)](
            acc, peak, total, errors, splits, count, BLOCK_D=block_d, BLOCK_R=ROWS_PER_COMPARISON
        )
    return errors[..., : len(rows)].sum(-1) / (len(rows) * dim)
