"""Pooled softmax weights in Triton, without ever storing a weight.

One program takes a tile of sampled queries and walks all sampled keys twice: first for the peak and the sum
of its rows, then for the weights, which are pooled to one number per block pair. Both walks round alike, so
that the weights of a row sum to 1 whatever the size of the scores.

Shape letters: M and N tokens of a query and a key tile, D head dimension padded to a power of two, P and Q
blocks of a query and a key tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels_common.triton_launch import LOG2_E, aligned, load_tile, reads_pointers, tile_source


@triton.jit
def _scores(
    query_tile, key_source, key_strides, batch, kv_head, start_n, key_length, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE_N: tl.constexpr, POINTERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unscaled scores ``[M, N]`` of one key tile, -inf past the keys."""
    key_tile = load_tile(
        key_source, key_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)
    if start_n + TILE_N > key_length:
        columns = start_n + tl.arange(0, TILE_N)
        scores = tl.where((columns < key_length)[None, :], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=["query_length", "key_length", "query_blocks", "key_blocks", "scale_log2"])
def pooled_softmax_kernel(
    query_source,
    query_strides,
    key_source,
    key_strides,
    importance_ptr,
    query_length,
    key_length,
    query_blocks,
    key_blocks,
    scale_log2,
    HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    SAMPLES_M: tl.constexpr,
    SAMPLES_N: tl.constexpr,
    MAXIMUM: tl.constexpr,
    POINTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Importance rows of one query tile: grid ``(ceil(Nq / TILE_M), B * Hq)``."""
    start_m = tl.program_id(0) * TILE_M
    entry = tl.program_id(1)
    batch, head = entry // HEADS, entry % HEADS
    kv_head = head // KV_GROUP
    blocks_m: tl.constexpr = TILE_M // SAMPLES_M
    blocks_n: tl.constexpr = TILE_N // SAMPLES_N

    query_tile = load_tile(
        query_source, query_strides, batch, head, start_m, query_length, TILE_M, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    peak = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    for start_n in range(0, key_length, TILE_N):
        scores = _scores(
            query_tile, key_source, key_strides, batch, kv_head, start_n, key_length, HEAD_DIM, BLOCK_D,
            TILE_N, POINTERS, PRECISION,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(scores * scale_log2 - new_peak[:, None]), 1)
        peak = new_peak
    rows_inside = start_m + tl.arange(0, TILE_M) < query_length
    share = tl.where(rows_inside, 1.0 / total, 0.0)[:, None]

    rows = start_m // SAMPLES_M + tl.arange(0, blocks_m)
    counts = tl.minimum(query_length - rows * SAMPLES_M, SAMPLES_M)
    counts = tl.maximum(counts, 1).to(tl.float32)  # [P], 1 for blocks that do not exist
    base = importance_ptr + (entry.to(tl.int64) * query_blocks + rows[:, None]) * key_blocks
    for start_n in range(0, key_length, TILE_N):
        scores = _scores(
            query_tile, key_source, key_strides, batch, kv_head, start_n, key_length, HEAD_DIM, BLOCK_D,
            TILE_N, POINTERS, PRECISION,
        )  # fmt: skip
        cells = scores.reshape(TILE_M, blocks_n, SAMPLES_N)
        if MAXIMUM:
            weights = tl.exp2(tl.max(cells, 2) * scale_log2 - peak[:, None]) * share  # [M, Q]
            pooled = tl.max(weights.reshape(blocks_m, SAMPLES_M, blocks_n), 1)  # [P, Q]
        else:
            masses = tl.sum(tl.exp2(cells * scale_log2 - peak[:, None, None]), 2) * share
            pooled = tl.sum(masses.reshape(blocks_m, SAMPLES_M, blocks_n), 1) / counts[:, None]
        places = start_n // SAMPLES_N + tl.arange(0, blocks_n)
        inside = (rows < query_blocks)[:, None] & (places < key_blocks)[None, :]
        tl.store(base + places[None, :], pooled, mask=inside)


class TileConfig(NamedTuple):
    """Kernel tile and launch parameters."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


def select_config(block_d: int, samples: tuple[int, int], dtype: torch.dtype) -> TileConfig:
    """Tile for a padded head dimension, tokens per block and dtype; whole blocks fit into it.

    For 16-bit tokens of up to 128 dimensions 64x128 is the fastest of those tried on an H200: small programs
    share a multiprocessor and hide each other's softmax. The others are what fits into shared memory.
    """
    wide = dtype == torch.float32 or block_d > 128
    tile_m, tile_n = max(64, samples[0]), max(64 if wide else 128, samples[1])
    return TileConfig(tile_m, tile_n, tile_m // 16, 1 if wide and block_d > 64 else 2)


def pooled_softmax_triton(
    query: torch.Tensor, key: torch.Tensor, samples: tuple[int, int], scale: float, *, maximum: bool
) -> torch.Tensor:
    """Launch the kernel; as :func:`kernels_common.block_importance.pooled_softmax_torch`."""
    batch, heads, queries, head_dim = query.shape
    query_blocks, key_blocks = triton.cdiv(queries, samples[0]), triton.cdiv(key.shape[2], samples[1])
    importance = torch.empty(batch, heads, query_blocks, key_blocks, dtype=torch.float32, device=query.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    config = select_config(block_d, samples, query.dtype)
    query, key, pointers = aligned(query), aligned(key), reads_pointers(query)
    with torch.cuda.device_of(query):
        pooled_softmax_kernel[(triton.cdiv(queries, config.tile_m), batch * heads)](
            *tile_source(query, config.tile_m, block_d, pointers),
            *tile_source(key, config.tile_n, block_d, pointers), importance,
            queries, key.shape[2], query_blocks, key_blocks, scale * LOG2_E.value,
            HEADS=heads, KV_GROUP=heads // key.shape[1], HEAD_DIM=head_dim, BLOCK_D=block_d,
            TILE_M=config.tile_m, TILE_N=config.tile_n, SAMPLES_M=samples[0], SAMPLES_N=samples[1],
            MAXIMUM=maximum, POINTERS=pointers,
            PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return importance
