"""Exact, spatial and temporal attention of the sampled rows in one read of keys and values (Triton).

Every program of the first kernel takes one head, a tile of sampled rows and a share of the keys. Each row
stands in its tile once for every pattern, so that one online softmax serves them all. The second kernel
merges the shares and compares the outputs. Nothing of size R x S is read or written.

Shape letters: R sampled rows of a tile, P = 4 R rows of all patterns (the last R are unused), N keys of a
tile, D head dimension padded to a power of two.
"""

import torch
import triton
import triton.language as tl

from plugins.svg_smart.patterns import KEYS_PER_WORD, HeadPatterns

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 512  # enough for several on each multiprocessor
ROWS_PER_TILE = 32


@triton.jit(
    do_not_specialize=["length", "rows_count", "query_blocks", "words", "keys_per_split", "scale_log2"]
)
def sampled_attention_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, places_ptr, seen_ptr, acc_ptr, peak_ptr, total_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, length, rows_count, query_blocks, words, keys_per_split, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, TILE_N: tl.constexpr,
    MASK_M: tl.constexpr,
):  # fmt: skip
    """Partial outputs, peaks and totals of one (head, split, tile): grid ``(B * H, splits, tiles)``."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    pattern = tl.arange(0, 4 * BLOCK_R) // BLOCK_R  # [P]: exact, spatial, temporal, none
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, 4 * BLOCK_R) % BLOCK_R
    dims = tl.arange(0, BLOCK_D)
    sampled = (row < rows_count) & (pattern < 3)
    listed = sampled & (pattern > 0)
    token = tl.load(rows_ptr + row, mask=sampled, other=0)
    place = tl.load(places_ptr + (pattern - 1) * length + token, mask=listed, other=0)
    seen_row = ((pattern - 1) * query_blocks + place // MASK_M) * words

    query_ptrs = query_ptr + batch * stride_qb + head * stride_qh + token[:, None] * stride_qn
    query_tile = tl.load(query_ptrs + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)
    key_ptr += batch * stride_kb + head * stride_kh
    value_ptr += batch * stride_vb + head * stride_vh
    acc = tl.zeros([4 * BLOCK_R, BLOCK_D], dtype=tl.float32)
    peak = tl.full([4 * BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([4 * BLOCK_R], dtype=tl.float32)
    begin = tl.program_id(1) * keys_per_split
    for start in range(begin, tl.minimum(begin + keys_per_split, length), TILE_N):
        column = start + tl.arange(0, TILE_N)
        inside = column < length
        inner = inside[:, None] & (dims[None, :] < HEAD_DIM)
        offset = column.to(tl.int64)[:, None]
        key_tile = tl.load(key_ptr + offset * stride_kn + dims[None, :], mask=inner, other=0.0)
        value_tile = tl.load(value_ptr + offset * stride_vn + dims[None, :], mask=inner, other=0.0)
        # The tile is one word of the rows' bits; the exact pattern sees all.
        word = tl.load(seen_ptr + seen_row + start // TILE_N, mask=listed, other=-1)
        keep = ((word[:, None] >> tl.arange(0, TILE_N)[None, :]) & 1) != 0
        scores = tl.dot(query_tile, key_tile.T) * scale_log2
        scores = tl.where(keep & sampled[:, None] & inside[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # rows that have seen no key yet
        rescale = tl.exp2(peak - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc * rescale[:, None])
        peak = new_peak

    part = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 3 + pattern
    cell = part.to(tl.int64) * (tl.num_programs(2) * BLOCK_R) + row
    tl.store(peak_ptr + cell, peak, mask=pattern < 3)
    tl.store(total_ptr + cell, total, mask=pattern < 3)
    tl.store(acc_ptr + cell[:, None] * BLOCK_D + dims[None, :], acc, mask=(pattern < 3)[:, None])


@triton.jit
def _merged(
    acc_ptr, peak_ptr, total_ptr, first, step, splits, dims, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Output ``[R, D]`` of one tile and pattern; ``first`` are its rows in the first split."""
    peak = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(peak_ptr + first + split * step))
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # rows of the padding
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for split in range(splits):
        cell = first + split * step
        weight = tl.exp2(tl.load(peak_ptr + cell) - peak)
        total += tl.load(total_ptr + cell) * weight
        acc += tl.load(acc_ptr + cell[:, None] * BLOCK_D + dims[None, :]) * weight[:, None]
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["splits", "tiles", "rows_count"])
def pattern_errors_kernel(
    acc_ptr, peak_ptr, total_ptr, errors_ptr, splits, tiles, rows_count,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Mean squared error of both patterns of one head: grid ``(B * H,)``."""
    dims = tl.arange(0, BLOCK_D)
    rows = tiles * BLOCK_R
    spatial = tl.zeros([BLOCK_R], dtype=tl.float32)
    temporal = tl.zeros([BLOCK_R], dtype=tl.float32)
    for tile in range(tiles):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        first = tl.program_id(0).to(tl.int64) * splits * 3 * rows + row
        exact = _merged(acc_ptr, peak_ptr, total_ptr, first, 3 * rows, splits, dims, BLOCK_R, BLOCK_D)
        inside = (row < rows_count)[:, None]
        output = _merged(acc_ptr, peak_ptr, total_ptr, first + rows, 3 * rows, splits, dims, BLOCK_R, BLOCK_D)
        difference = tl.where(inside, output - exact, 0.0)
        spatial += tl.sum(difference * difference, 1)
        output = _merged(
            acc_ptr, peak_ptr, total_ptr, first + 2 * rows, 3 * rows, splits, dims, BLOCK_R, BLOCK_D
        )
        difference = tl.where(inside, output - exact, 0.0)
        temporal += tl.sum(difference * difference, 1)
    values = rows_count * HEAD_DIM
    tl.store(errors_ptr + tl.program_id(0), tl.sum(spatial, 0) / values)
    tl.store(errors_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(temporal, 0) / values)


def sampled_errors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, patterns: HeadPatterns
) -> torch.Tensor:
    """Launch both kernels; arguments and result as in :func:`plugins.svg_smart.profiling.pattern_errors`.

    The head dimension is at most 128.
    """
    batch, heads, length, dim = query.shape
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    block_r = min(ROWS_PER_TILE, max(16, triton.next_power_of_2(len(rows))))
    block_d = max(16, triton.next_power_of_2(dim))
    tiles = triton.cdiv(len(rows), block_r)
    splits = max(1, min(PROGRAMS // (batch * heads * tiles), triton.cdiv(length, KEYS_PER_WORD)))
    keys_per_split = triton.cdiv(triton.cdiv(length, splits), KEYS_PER_WORD) * KEYS_PER_WORD
    parts = (batch * heads, splits, 3, tiles * block_r)
    peak, total = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
    acc = torch.empty(*parts, block_d, dtype=torch.float32, device=query.device)
    errors = torch.empty(2, batch, heads, dtype=torch.float32, device=query.device)
    sizes = {"HEAD_DIM": dim, "BLOCK_D": block_d, "BLOCK_R": block_r}
    with torch.cuda.device_of(query):
        sampled_attention_kernel[(batch * heads, splits, tiles)](
            query, key, value, rows, patterns.places, patterns.seen, acc, peak, total,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            heads, length, len(rows), *patterns.seen.shape[1:], keys_per_split, dim**-0.5 * LOG2_E.value,
            TILE_N=KEYS_PER_WORD, MASK_M=patterns.masks.block_size[0], **sizes,
            num_warps=max(4, block_d // 16),
        )  # fmt: skip
        pattern_errors_kernel[(batch * heads,)](acc, peak, total, errors, splits, tiles, len(rows), **sizes)
    return errors
