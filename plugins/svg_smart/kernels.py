"""Exact, spatial and temporal attention of the sampled rows in one read of keys and values (Triton).

Every program takes one head and one share of the keys and keeps three online softmaxes; their parts are
merged by log-sum-exp afterwards. Nothing of size R x S is written.

Shape letters: R sampled rows padded to a power of two, N keys of a tile, D head dimension padded likewise.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 512  # enough for several on each multiprocessor
TILE_N = 64


@triton.jit
def _step(scores, keep, value_tile, peak, total, acc):
    """One online softmax step over a tile; rows that have seen no key yet keep peak -inf."""
    scores = tl.where(keep, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    rescale = tl.exp2(peak - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc * rescale[:, None])
    return new_peak, total, acc


@triton.jit(do_not_specialize=["length", "rows_count", "keys_per_split", "scale_log2"])
def sampled_attention_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, allowed_ptr, acc_ptr, peak_ptr, total_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, length, rows_count, keys_per_split, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Partial outputs, peaks and totals of one (head, split): grid ``(B * H, splits)``."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    token = tl.load(rows_ptr + row, mask=row < rows_count, other=0)
    query_ptrs = query_ptr + batch * stride_qb + head * stride_qh + token[:, None] * stride_qn
    query_tile = tl.load(query_ptrs + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)
    key_ptr += batch * stride_kb + head * stride_kh
    value_ptr += batch * stride_vb + head * stride_vh

    acc_0 = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    acc_1 = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    acc_2 = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    peak_0 = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    peak_1 = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    peak_2 = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total_0 = tl.zeros([BLOCK_R], dtype=tl.float32)
    total_1 = tl.zeros([BLOCK_R], dtype=tl.float32)
    total_2 = tl.zeros([BLOCK_R], dtype=tl.float32)
    begin = tl.program_id(1) * keys_per_split
    for start in range(begin, tl.minimum(begin + keys_per_split, length), TILE_N):
        column = start + tl.arange(0, TILE_N)
        inside = column < length
        inner = inside[:, None] & (dims[None, :] < HEAD_DIM)
        place = column.to(tl.int64)[:, None]
        key_tile = tl.load(key_ptr + place * stride_kn + dims[None, :], mask=inner, other=0.0)
        value_tile = tl.load(value_ptr + place * stride_vn + dims[None, :], mask=inner, other=0.0)
        scores = tl.dot(query_tile, key_tile.T) * scale_log2
        wanted = (row < rows_count)[:, None] & inside[None, :]
        cell = row[:, None] * length + column[None, :]
        spatial = tl.load(allowed_ptr + cell, mask=wanted, other=0) != 0
        temporal = tl.load(allowed_ptr + rows_count * length + cell, mask=wanted, other=0) != 0
        peak_0, total_0, acc_0 = _step(scores, wanted, value_tile, peak_0, total_0, acc_0)
        peak_1, total_1, acc_1 = _step(scores, spatial, value_tile, peak_1, total_1, acc_1)
        peak_2, total_2, acc_2 = _step(scores, temporal, value_tile, peak_2, total_2, acc_2)

    place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 3 * BLOCK_R + row
    cell = place.to(tl.int64)[:, None] * BLOCK_D + dims[None, :]
    tl.store(peak_ptr + place, peak_0)
    tl.store(peak_ptr + place + BLOCK_R, peak_1)
    tl.store(peak_ptr + place + 2 * BLOCK_R, peak_2)
    tl.store(total_ptr + place, total_0)
    tl.store(total_ptr + place + BLOCK_R, total_1)
    tl.store(total_ptr + place + 2 * BLOCK_R, total_2)
    tl.store(acc_ptr + cell, acc_0)
    tl.store(acc_ptr + cell + BLOCK_R * BLOCK_D, acc_1)
    tl.store(acc_ptr + cell + 2 * BLOCK_R * BLOCK_D, acc_2)


def sampled_outputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Outputs of the sampled rows: exact, spatial, temporal.

    Args:
        query (Tensor): ``[B, H, S, D]``, D up to 128.
        key (Tensor): ``[B, H, S, D]``.
        value (Tensor): ``[B, H, S, D]``.
        rows (Tensor): ``[R]`` int64, sampled queries.
        allowed (Tensor): ``[2, R, S]`` bool; each row allows at least one key.

    Returns:
        Tensor: ``[3, B, H, R, D]`` fp32.
    """
    batch, heads, length, dim = query.shape
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    block_r = max(16, triton.next_power_of_2(len(rows)))
    block_d = max(16, triton.next_power_of_2(dim))
    splits = max(1, min(PROGRAMS // (batch * heads), triton.cdiv(length, TILE_N)))
    keys_per_split = triton.cdiv(triton.cdiv(length, splits), TILE_N) * TILE_N
    parts = (batch * heads, splits, 3, block_r)
    peak, total = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
    acc = torch.empty(*parts, block_d, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        sampled_attention_kernel[(batch * heads, splits)](
            query, key, value, rows, allowed.contiguous().view(torch.uint8), acc, peak, total,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            heads, length, len(rows), keys_per_split, dim**-0.5 * LOG2_E.value,
            HEAD_DIM=dim, BLOCK_D=block_d, BLOCK_R=block_r, TILE_N=TILE_N, num_warps=4,
        )  # fmt: skip
    weight = torch.exp2(peak - peak.amax(1, keepdim=True))[..., : len(rows)]
    outputs = (acc[..., : len(rows), :dim] * weight[..., None]).sum(1)
    outputs /= (total[..., : len(rows)] * weight).sum(1)[..., None]
    return outputs.view(batch, heads, 3, len(rows), dim).movedim(2, 0)
