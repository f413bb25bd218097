"""Pooled attention in Triton: one program per query tile walks its lists of all four levels.

Keys of level 1 arrive as tiles of the key tensor, as in :mod:`kernels_common.block_sparse_triton`. The
pooled keys of a listed block are few (a block of 128 has 16 at level 8), so a tile of a coarser level is
gathered from as many listed blocks as fill it. That keeps the matrix products as large as at level 1, for
every block size.

A pooled key stands for ``level`` tokens: ``log2(level)`` is added to the peak of its scores and not to each
score. Lists ascend, so only the last listed block of a level can hold a pooled key of fewer tokens, or of
none.

Shape letters: M and N tokens of a query and a key tile, D head dimension padded to a power of two.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from core.block_mask import block_count
from kernels_common.block_sparse_triton import select_config
from kernels_common.triton_launch import (
    LN_2,
    LOG2_E,
    TileConfig,
    aligned,
    check_device,
    divide_tile,
    holds_large_tiles,
    list_strides,
    load_tile,
    reads_pointers,
    tile_source,
)


@triton.jit
def pooled_rows(list_ptr, count, start, WIDTH: tl.constexpr, TILE_N: tl.constexpr):
    """Pooled keys of a level in ``TILE_N`` columns of its listed blocks end to end, and which are listed."""
    columns = start + tl.arange(0, TILE_N)
    places = tl.minimum(columns // WIDTH, count - 1)  # past the end: the last block once more
    return tl.load(list_ptr + places) * WIDTH + columns % WIDTH, columns < count * WIDTH


@triton.jit
def tail_scores(scores, rows, listed, key_length, scale_log2, LOG2_LEVEL: tl.constexpr):
    """Scores ``[M, N]`` with the true number of tokens behind each pooled key; -inf where there is none."""
    LEVEL: tl.constexpr = 1 << LOG2_LEVEL
    tokens = tl.where(listed, tl.minimum(key_length - rows * LEVEL, LEVEL), 0)
    missing = tl.log2(tl.maximum(tokens, 1).to(tl.float32)) - LOG2_LEVEL
    return tl.where((tokens > 0)[None, :], scores + (missing / scale_log2)[None, :], float("-inf"))


@triton.jit
def softmax_step(
    acc, peak, total, scores, value_tile, scale_log2, LOG2_LEVEL: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax; every key stands for ``2 ** LOG2_LEVEL`` tokens."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2 + LOG2_LEVEL)
    rescale = tl.exp2(peak - new_peak)
    weights = tl.exp2(scores * scale_log2 - (new_peak - LOG2_LEVEL)[:, None])
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value_tile.dtype), value_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def attend_pooled_level(
    acc,
    peak,
    total,
    query_tile,
    key_ptr,
    value_ptr,
    list_ptr,
    count,
    key_length,
    scale_log2,
    LOG2_LEVEL: tl.constexpr,
    MASK_N: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax state after the listed blocks of one pooled level, whose keys start at ``key_ptr``."""
    WIDTH: tl.constexpr = MASK_N >> LOG2_LEVEL
    dims = tl.arange(0, BLOCK_D)
    for start in range(0, count * WIDTH, TILE_N):
        rows, listed = pooled_rows(list_ptr, count, start, WIDTH, TILE_N)
        offsets = rows[:, None] * BLOCK_D + dims[None, :]
        scores = tl.dot(query_tile, tl.load(key_ptr + offsets).T, input_precision=PRECISION)
        if start + TILE_N > (count - 1) * WIDTH:  # the last listed block is the one that may be ragged
            scores = tail_scores(scores, rows, listed, key_length, scale_log2, LOG2_LEVEL)
        value_tile = tl.load(value_ptr + offsets)
        acc, peak, total = softmax_step(
            acc, peak, total, scores, value_tile, scale_log2, LOG2_LEVEL, PRECISION
        )
    return acc, peak, total


# Lengths and strides of lists change with every size; specialising on them would recompile.
@triton.jit(
    do_not_specialize=[
        "query_length", "key_length", "key_blocks", "scale_log2",
        "stride_cb", "stride_ch", "stride_cr", "stride_ib", "stride_ih", "stride_ir",
    ]
)  # fmt: skip
def pooled_attention_fwd_kernel(
    query_source,
    query_strides,
    key_source,
    key_strides,
    value_source,
    value_strides,
    pooled_key_ptr,
    pooled_value_ptr,
    output_ptr,
    lse_ptr,
    counts_ptr,
    indices_ptr,
    stride_ob,
    stride_oh,
    stride_on,
    stride_cb,
    stride_ch,
    stride_cr,
    stride_ib,
    stride_ih,
    stride_ir,
    query_length,
    key_length,
    key_blocks,
    scale_log2,
    QUERY_HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    POOLED_N: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    POINTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of one query tile: grid ``(ceil(Nq / TILE_M), B * Hq)``."""
    start_m = tl.program_id(0) * TILE_M
    row = (start_m // MASK_M).to(tl.int64)
    batch = tl.program_id(1) // QUERY_HEADS
    head = tl.program_id(1) % QUERY_HEADS
    kv_head = head // KV_GROUP
    batch_64, head_64 = batch.to(tl.int64), head.to(tl.int64)
    counts_ptr += batch_64 * stride_cb + head_64 * stride_ch + row * stride_cr
    list_ptr = indices_ptr + batch_64 * stride_ib + head_64 * stride_ih + row * stride_ir

    query_tile = load_tile(
        query_source, query_strides, batch, head, start_m, query_length, TILE_M, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    acc = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    count = tl.load(counts_ptr)
    tiles_per_block: tl.constexpr = MASK_N // TILE_N
    for step in range(count * tiles_per_block):
        start_n = tl.load(list_ptr + step // tiles_per_block) * MASK_N + (step % tiles_per_block) * TILE_N
        key_tile = load_tile(
            key_source, key_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
        )  # fmt: skip
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)  # [M, N]
        if start_n + TILE_N > key_length:
            columns = start_n + tl.arange(0, TILE_N)
            scores = tl.where((columns < key_length)[None, :], scores, float("-inf"))
        value_tile = load_tile(
            value_source, value_strides, batch, kv_head, start_n, key_length,
            TILE_N, HEAD_DIM, BLOCK_D, POINTERS,
        )  # fmt: skip
        acc, peak, total = softmax_step(acc, peak, total, scores, value_tile, scale_log2, 0, PRECISION)

    kv_row = (batch_64 * (QUERY_HEADS // KV_GROUP) + kv_head) * key_blocks * (MASK_N // 8 * 7)
    pooled_key_ptr += kv_row * BLOCK_D
    pooled_value_ptr += kv_row * BLOCK_D
    for log2_level in tl.static_range(1, 4):
        list_ptr += count
        count = tl.load(counts_ptr + log2_level)
        acc, peak, total = attend_pooled_level(
            acc, peak, total, query_tile, pooled_key_ptr, pooled_value_ptr, list_ptr, count, key_length,
            scale_log2, log2_level, MASK_N, POOLED_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        pooled_key_ptr += key_blocks.to(tl.int64) * (MASK_N >> log2_level) * BLOCK_D
        pooled_value_ptr += key_blocks.to(tl.int64) * (MASK_N >> log2_level) * BLOCK_D

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    rows = start_m + tl.arange(0, TILE_M)
    columns = tl.arange(0, BLOCK_D)
    output_base = output_ptr + batch_64 * stride_ob + head_64 * stride_oh
    pointers = output_base + rows.to(tl.int64)[:, None] * stride_on + columns[None, :]
    tl.store(
        pointers,
        acc.to(output_ptr.dtype.element_ty),
        mask=(rows < query_length)[:, None] & (columns < HEAD_DIM)[None, :],
    )
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * query_length + rows, lse, mask=rows < query_length)


@triton.jit
def store_means(pooled_ptr, sums, runs, length, LOG2_LEVEL: tl.constexpr, BLOCK_D: tl.constexpr):
    """Means of ``runs`` of a level from their ``sums``, over the tokens that there are."""
    tokens = tl.minimum(length - (runs << LOG2_LEVEL), 1 << LOG2_LEVEL)
    means = sums / tl.maximum(tokens, 1).to(tl.float32)[:, None]
    offsets = runs.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(pooled_ptr + offsets, means.to(pooled_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "key_blocks"])
def pool_kernel(
    source_ptr,
    pooled_ptr,
    stride_sb,
    stride_sh,
    stride_sn,
    length,
    key_blocks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUNS: tl.constexpr,
    MASK_N: tl.constexpr,
):
    """Levels 2, 4 and 8 of ``RUNS`` runs of 8 tokens: grid ``(Mk * MASK_N / 8 / RUNS, B * H)``.

    Every thread adds up the tokens of its own runs, so that nothing is exchanged.
    """
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    source_ptr += batch * stride_sb + head * stride_sh
    level_2 = pooled_ptr + tl.program_id(1).to(tl.int64) * key_blocks * (MASK_N // 8 * 7) * BLOCK_D
    level_4 = level_2 + key_blocks.to(tl.int64) * (MASK_N // 2) * BLOCK_D
    level_8 = level_4 + key_blocks.to(tl.int64) * (MASK_N // 4) * BLOCK_D

    runs, dims = tl.program_id(0) * RUNS + tl.arange(0, RUNS), tl.arange(0, BLOCK_D)
    inside = (dims < HEAD_DIM)[None, :]
    sum_8 = tl.zeros([RUNS, BLOCK_D], dtype=tl.float32)
    for half in tl.static_range(2):
        sum_4 = tl.zeros([RUNS, BLOCK_D], dtype=tl.float32)
        for pair in tl.static_range(2):
            sum_2 = tl.zeros([RUNS, BLOCK_D], dtype=tl.float32)
            for token in tl.static_range(2):
                rows = runs * 8 + (half * 4 + pair * 2 + token)
                pointers = source_ptr + rows.to(tl.int64)[:, None] * stride_sn + dims[None, :]
                sum_2 += tl.load(pointers, mask=(rows < length)[:, None] & inside, other=0.0)
            store_means(level_2, sum_2, runs * 4 + (half * 2 + pair), length, 1, BLOCK_D)
            sum_4 += sum_2
        store_means(level_4, sum_4, runs * 2 + half, length, 2, BLOCK_D)
        sum_8 += sum_4
    store_means(level_8, sum_8, runs, length, 3, BLOCK_D)


def pool_triton(tensor: torch.Tensor, key_block: int, block_d: int) -> torch.Tensor:
    """Means of runs of 2, 4 and 8 keys or values, in one pass over them.

    Args:
        tensor (Tensor): ``[B, Hkv, Nk, D]``, its last dimension contiguous.
        key_block (int): tokens of a key block; Mk blocks.
        block_d (int): D padded to a power of two.

    Returns:
        Tensor: ``[B, Hkv, Mk * key_block * 7 / 8, block_d]`` in the dtype of ``tensor``: level 2, then 4,
        then 8, each filled with zeros to whole blocks and to ``block_d``.
    """
    batch, heads, length, head_dim = tensor.shape
    blocks, runs_per_block = block_count(length, key_block), key_block // 8
    pooled = tensor.new_empty(batch, heads, blocks * runs_per_block * 7, block_d)
    runs = math.gcd(runs_per_block, 16)
    pool_kernel[(blocks * (runs_per_block // runs), batch * heads)](
        tensor, pooled, *tensor.stride()[:3], length, blocks,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, RUNS=runs, MASK_N=key_block,
    )  # fmt: skip
    return pooled


class PooledConfig(NamedTuple):
    """Tile of level 1 and launch parameters, and pooled keys of a gathered tile."""

    tile: TileConfig
    pooled_n: int


def select_pooled_config(
    block_d: int, block_size: tuple[int, int], dtype: torch.dtype, *, large: bool = True
) -> PooledConfig:
    """Tiles for a padded head dimension, mask block and dtype; that of level 1 divides the mask block.

    The ``large`` 16-bit tiles (:func:`holds_large_tiles`) are the fastest of those tried on an H200 with
    random lists of all levels. At D 64 they are those of the block-sparse kernel, 128 keys per step at
    every level. At D 128 gathering so many takes the registers or the shared memory of two programs: 64x64
    tiles, which share a multiprocessor.
    """
    if not large:
        return _small_pooled_config(block_d, block_size, dtype)
    tile = select_config(block_d, block_size, dtype)
    if dtype == torch.float32 or block_d > 128:
        return PooledConfig(tile, 32)
    if block_d == 128:
        return PooledConfig(TileConfig(math.gcd(64, block_size[0]), math.gcd(64, block_size[1]), 4, 3), 64)
    return PooledConfig(tile, 128)


def _small_pooled_config(block_d: int, block_size: tuple[int, int], dtype: torch.dtype) -> PooledConfig:
    if dtype == torch.float32:
        m, n, warps = (64, 32, 4) if block_d <= 64 else (32, 16, 4 if block_d <= 128 else 8)
        return PooledConfig(divide_tile(TileConfig(m, n, warps, 1), block_size), n)
    n = 64 if block_d <= 128 else 32
    return PooledConfig(divide_tile(TileConfig(64, n, 4, 2), block_size), n)


def pooled_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    config: PooledConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool the keys and values, then attend; arguments as in :func:`kernels_common.pooled_attention`.

    Args:
        config (PooledConfig, Optional): tiles and launch parameters, that of level 1 dividing ``block_size``.
            Default: the measured choice of :func:`select_pooled_config`

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32.

    Raises:
        UnsupportedCallError: no CUDA device, or bf16 in Triton's interpreter.
    """
    check_device(query)
    batch, heads, queries, head_dim = query.shape
    output = torch.empty_like(query)  # keeps the memory order of a dense query, whatever it is
    target = output if output.stride(3) == 1 else output.new_empty(output.shape)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    (m, n, warps, stages), pooled_n = config or select_pooled_config(
        block_d, block_size, query.dtype, large=holds_large_tiles(query)
    )
    query, key, value = (aligned(part) for part in (query, key, value))
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    pointers = reads_pointers(query)
    with torch.cuda.device_of(query):
        pooled_key, pooled_value = (pool_triton(part, block_size[1], block_d) for part in (key, value))
        pooled_attention_fwd_kernel[(triton.cdiv(queries, m), batch * heads)](
            *tile_source(query, m, block_d, pointers), *tile_source(key, n, block_d, pointers),
            *tile_source(value, n, block_d, pointers),
            pooled_key, pooled_value, target, lse, counts, indices,
            *target.stride()[:3], *list_strides(counts)[:3], *list_strides(indices)[:3],
            queries, key.shape[2], block_count(key.shape[2], block_size[1]), scale * LOG2_E.value,
            QUERY_HEADS=heads, KV_GROUP=heads // key.shape[1],
            HEAD_DIM=head_dim, BLOCK_D=block_d, TILE_M=m, TILE_N=n, POOLED_N=pooled_n,
            MASK_M=block_size[0], MASK_N=block_size[1], POINTERS=pointers,
            PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return (output if target is output else output.copy_(target)), lse
