"""Gradients of pooled attention in Triton: a kernel over the lists, one per level over the transposed lists.

As in :mod:`kernels_common.block_sparse_backward_triton`, weights are computed anew from the log-sum-exp and
each gradient has one writer: no atomics, two runs agree bit for bit.

A pooled key that stands for c tokens has c times the weight ``exp(score - lse)``, and each of its tokens
takes 1/c of its gradient. So the key kernel leaves c out, and a token's gradient is the plain sum over the
levels of what its pooled keys gathered.

Shape letters: M and N tokens of a query and a key tile, D head dimension padded to a power of two.
"""

import math

import torch
import triton
import triton.language as tl

from core.block_mask import block_count
from core.level_mask import LEVELS, LevelMask
from kernels_common.block_sparse_backward_triton import BackwardConfig, row_terms, small_backward_tiles
from kernels_common.pooled_attention_triton import (
    pool_triton,
    pooled_rows,
    tail_scores,
)
from kernels_common.triton_launch import (
    LOG2_E,
    TileConfig,
    aligned,
    check_device,
    holds_large_tiles,
    list_strides,
    load_tile,
    reads_pointers,
    tile_source,
)


@triton.jit
def grad_query_step(
    acc,
    grad_tile,
    key_tile,
    value_tile,
    scores,
    shift,
    delta,
    scale_log2,
    LOG2_LEVEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a query tile from one key tile, whose keys stand for ``2 ** LOG2_LEVEL`` tokens."""
    weights = tl.exp2(scores * scale_log2 - (shift - LOG2_LEVEL)[:, None])
    grad_weights = tl.dot(grad_tile, value_tile.T, input_precision=PRECISION)  # [M, N]
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(key_tile.dtype), key_tile, acc, input_precision=PRECISION)


@triton.jit
def grad_query_pooled_level(
    acc,
    query_tile,
    grad_tile,
    key_ptr,
    value_ptr,
    shift,
    delta,
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
    """Gradient of a query tile with that from one pooled level, whose keys start at ``key_ptr``, added."""
    WIDTH: tl.constexpr = MASK_N >> LOG2_LEVEL
    dims = tl.arange(0, BLOCK_D)
    for start in range(0, count * WIDTH, TILE_N):
        rows, listed = pooled_rows(list_ptr, count, start, WIDTH, TILE_N)
        offsets = rows[:, None] * BLOCK_D + dims[None, :]
        key_tile, value_tile = tl.load(key_ptr + offsets), tl.load(value_ptr + offsets)
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)  # [M, N]
        if start + TILE_N > (count - 1) * WIDTH:
            scores = tail_scores(scores, rows, listed, key_length, scale_log2, LOG2_LEVEL)
        acc = grad_query_step(
            acc, grad_tile, key_tile, value_tile, scores, shift, delta, scale_log2, LOG2_LEVEL, PRECISION
        )
    return acc


# Lengths and strides of lists change with every size; specialising on them would recompile.
@triton.jit(
    do_not_specialize=[
        "query_length", "padded_length", "key_length", "key_blocks", "scale", "scale_log2",
        "stride_cb", "stride_ch", "stride_cr", "stride_ib", "stride_ih", "stride_ir",
    ]
)  # fmt: skip
def pooled_attention_bwd_query_kernel(
    query_source,
    query_strides,
    grad_output_source,
    grad_output_strides,
    key_source,
    key_strides,
    value_source,
    value_strides,
    pooled_key_ptr,
    pooled_value_ptr,
    grad_query_ptr,
    shift_ptr,
    delta_ptr,
    counts_ptr,
    indices_ptr,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_cb,
    stride_ch,
    stride_cr,
    stride_ib,
    stride_ih,
    stride_ir,
    query_length,
    padded_length,
    key_length,
    key_blocks,
    scale,
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
    """Gradient of one query tile: grid ``(ceil(Nq / TILE_M), B * Hq)``."""
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
    grad_tile = load_tile(
        grad_output_source, grad_output_strides, batch, head, start_m, query_length,
        TILE_M, HEAD_DIM, BLOCK_D, POINTERS,
    )  # fmt: skip
    rows_m, dims = start_m + tl.arange(0, TILE_M), tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * padded_length + rows_m
    shift, delta = tl.load(shift_ptr + place), tl.load(delta_ptr + place)
    acc = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    count = tl.load(counts_ptr)
    tiles_per_block: tl.constexpr = MASK_N // TILE_N
    for step in range(count * tiles_per_block):
        start_n = tl.load(list_ptr + step // tiles_per_block) * MASK_N + (step % tiles_per_block) * TILE_N
        key_tile = load_tile(
            key_source, key_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
        )  # fmt: skip
        value_tile = load_tile(
            value_source, value_strides, batch, kv_head, start_n, key_length,
            TILE_N, HEAD_DIM, BLOCK_D, POINTERS,
        )  # fmt: skip
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)  # [M, N]
        if start_n + TILE_N > key_length:
            columns = start_n + tl.arange(0, TILE_N)
            scores = tl.where((columns < key_length)[None, :], scores, float("-inf"))
        acc = grad_query_step(
            acc, grad_tile, key_tile, value_tile, scores, shift, delta, scale_log2, 0, PRECISION
        )

    kv_row = (batch_64 * (QUERY_HEADS // KV_GROUP) + kv_head) * key_blocks * (MASK_N // 8 * 7)
    pooled_key_ptr += kv_row * BLOCK_D
    pooled_value_ptr += kv_row * BLOCK_D
    for log2_level in tl.static_range(1, 4):
        list_ptr += count
        count = tl.load(counts_ptr + log2_level)
        acc = grad_query_pooled_level(
            acc, query_tile, grad_tile, pooled_key_ptr, pooled_value_ptr, shift, delta, list_ptr, count,
            key_length, scale_log2, log2_level, MASK_N, POOLED_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        pooled_key_ptr += key_blocks.to(tl.int64) * (MASK_N >> log2_level) * BLOCK_D
        pooled_value_ptr += key_blocks.to(tl.int64) * (MASK_N >> log2_level) * BLOCK_D

    base = grad_query_ptr + batch_64 * stride_gb + head_64 * stride_gh
    pointers = base + rows_m.to(tl.int64)[:, None] * stride_gn + dims[None, :]
    tl.store(
        pointers,
        (acc * scale).to(grad_query_ptr.dtype.element_ty),
        mask=(rows_m < query_length)[:, None] & (dims < HEAD_DIM)[None, :],
    )


@triton.jit(
    do_not_specialize=[
        "query_length", "padded_length", "pooled_length", "scale", "scale_log2", "stride_gh",
        "stride_cb", "stride_ch", "stride_cr", "stride_ib", "stride_ih", "stride_ir",
    ]
)  # fmt: skip
def pooled_attention_bwd_key_kernel(
    query_source,
    query_strides,
    grad_output_source,
    grad_output_strides,
    key_ptr,
    value_ptr,
    grad_key_ptr,
    grad_value_ptr,
    shift_ptr,
    delta_ptr,
    counts_ptr,
    indices_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gh,
    stride_cb,
    stride_ch,
    stride_cr,
    stride_ib,
    stride_ih,
    stride_ir,
    query_length,
    padded_length,
    pooled_length,
    scale,
    scale_log2,
    KV_HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    LOG2_LEVEL: tl.constexpr,
    POINTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of a level's keys and values per token behind them, in fp32.

    Grid ``(Mk * ceil(WIDTH / TILE_N), B * Hkv)``. Scores are computed transposed, ``[N, M]``, so that weights
    enter the next product from registers.
    """
    tiles_per_row: tl.constexpr = (WIDTH + TILE_N - 1) // TILE_N
    key_block = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    batch = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    batch_64, kv_head_64 = batch.to(tl.int64), kv_head.to(tl.int64)
    columns = (tl.program_id(0) % tiles_per_row) * TILE_N + tl.arange(0, TILE_N)
    keys_64, dims = key_block * WIDTH + columns, tl.arange(0, BLOCK_D)
    inside = ((columns < WIDTH) & (keys_64 < pooled_length))[:, None] & (dims < HEAD_DIM)[None, :]
    key_base = key_ptr + batch_64 * stride_kb + kv_head_64 * stride_kh
    value_base = value_ptr + batch_64 * stride_vb + kv_head_64 * stride_vh
    key_tile = tl.load(key_base + keys_64[:, None] * stride_kn + dims[None, :], mask=inside, other=0.0)
    value_tile = tl.load(value_base + keys_64[:, None] * stride_vn + dims[None, :], mask=inside, other=0.0)

    grad_key = tl.zeros([TILE_N, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([TILE_N, BLOCK_D], dtype=tl.float32)
    tiles_per_block: tl.constexpr = MASK_M // TILE_M
    for member in range(KV_GROUP):
        head = kv_head * KV_GROUP + member
        head_64 = head.to(tl.int64)
        level_counts = counts_ptr + batch_64 * stride_cb + head_64 * stride_ch + key_block * stride_cr
        list_ptr = indices_ptr + batch_64 * stride_ib + head_64 * stride_ih + key_block * stride_ir
        for finer in tl.static_range(LOG2_LEVEL):
            list_ptr += tl.load(level_counts + finer)
        count = tl.load(level_counts + LOG2_LEVEL)
        first_row = (batch_64 * (KV_HEADS * KV_GROUP) + head_64) * padded_length
        for step in range(count * tiles_per_block):
            start_m = tl.load(list_ptr + step // tiles_per_block) * MASK_M + (step % tiles_per_block) * TILE_M
            place = first_row + start_m + tl.arange(0, TILE_M)
            query_tile = load_tile(
                query_source, query_strides, batch, head, start_m, query_length,
                TILE_M, HEAD_DIM, BLOCK_D, POINTERS,
            )  # fmt: skip
            scores = tl.dot(key_tile, query_tile.T, input_precision=PRECISION)  # [N, M]
            grad_tile = load_tile(
                grad_output_source, grad_output_strides, batch, head, start_m, query_length,
                TILE_M, HEAD_DIM, BLOCK_D, POINTERS,
            )  # fmt: skip
            grad_weights = tl.dot(value_tile, grad_tile.T, input_precision=PRECISION)  # [N, M]
            weights = tl.exp2(scores * scale_log2 - tl.load(shift_ptr + place)[None, :])
            grad_scores = weights * (grad_weights - tl.load(delta_ptr + place)[None, :])
            weights_16, grad_scores_16 = weights.to(grad_tile.dtype), grad_scores.to(query_tile.dtype)
            grad_value = tl.dot(weights_16, grad_tile, grad_value, input_precision=PRECISION)
            grad_key = tl.dot(grad_scores_16, query_tile, grad_key, input_precision=PRECISION)

    pointers = tl.program_id(1).to(tl.int64) * stride_gh + keys_64[:, None] * BLOCK_D + dims[None, :]
    stored = (columns < WIDTH)[:, None]
    tl.store(grad_key_ptr + pointers, grad_key * scale, mask=stored)
    tl.store(grad_value_ptr + pointers, grad_value, mask=stored)


@triton.jit(do_not_specialize=["length", "key_blocks"])
def unpool_kernel(
    levels_ptr,
    grad_ptr,
    stride_gb,
    stride_gh,
    stride_gn,
    length,
    key_blocks,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    MASK_N: tl.constexpr,
):
    """Sum over the levels of ``TILE`` tokens: grid ``(ceil(Nk / TILE), B * H)``."""
    rows, dims = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    inside = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    levels_ptr += tl.program_id(1).to(tl.int64) * key_blocks * (MASK_N // 8 * 15) * BLOCK_D
    total = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    for log2_level in tl.static_range(4):
        offsets = (rows >> log2_level).to(tl.int64)[:, None] * BLOCK_D + dims[None, :]
        total += tl.load(levels_ptr + offsets, mask=inside, other=0.0)
        levels_ptr += key_blocks.to(tl.int64) * (MASK_N >> log2_level) * BLOCK_D
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    pointers = grad_ptr + batch * stride_gb + head * stride_gh + rows.to(tl.int64)[:, None] * stride_gn
    tl.store(pointers + dims[None, :], total.to(grad_ptr.dtype.element_ty), mask=inside)


def select_pooled_backward_config(block_d: int, dtype: torch.dtype, *, large: bool = True) -> BackwardConfig:
    """Tiles for a padded head dimension and dtype, before they are fitted to the mask block.

    The ``large`` 16-bit tiles (:func:`holds_large_tiles`) up to D 128 are the fastest, or next to it, of
    those tried on an H200.
    """
    if not large:
        query, keys = small_backward_tiles(block_d, dtype)
        narrow = dtype != torch.float32 and block_d == 128
        return BackwardConfig(query, TileConfig(64, 32, 4, 2) if narrow else keys)
    if dtype == torch.float32:
        keys = TileConfig(32, 64, 4, 1) if block_d <= 128 else TileConfig(32, 16, 4, 1)
        return BackwardConfig(TileConfig(64, 32, 4, 1), keys)
    if block_d <= 128:
        return BackwardConfig(TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2))
    return BackwardConfig(TileConfig(64, 32, 4, 1), TileConfig(32, 64, 8, 2))


def key_tile_of_level(wanted: int, width: int) -> int:
    """Rows of a key kernel tile: a divisor of a level's keys per block, or all of them, at least 16."""
    divisor = math.gcd(wanted, width)
    return divisor if divisor >= 16 else max(16, triton.next_power_of_2(width))


def _unpool(grad_levels: torch.Tensor, like: torch.Tensor, key_block: int) -> torch.Tensor:
    """Gradient in the dtype and memory order of ``like`` from those of all levels."""
    gradient = torch.empty_like(like)
    target = gradient if gradient.stride(3) == 1 else gradient.new_empty(gradient.shape)
    batch, heads, length, head_dim = like.shape
    tile = 32
    unpool_kernel[(triton.cdiv(length, tile), batch * heads)](
        grad_levels, target, *target.stride()[:3], length, block_count(length, key_block),
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=grad_levels.shape[-1], TILE=tile, MASK_N=key_block,
    )  # fmt: skip
    return gradient if target is gradient else gradient.copy_(target)


def pooled_attention_backward_triton(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    config: BackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels; the lists are transposed on the device, nothing is read back to the host.

    Args:
        grad_output (Tensor): ``[B, Hq, Nq, D]`` in the dtype of ``query``.
        grad_lse (Tensor, Optional): ``[B, Hq, Nq]`` fp32; ignored where a query sees no key.
        output (Tensor): what the forward pass returned, ``[B, Hq, Nq, D]``.
        lse (Tensor): what the forward pass returned, ``[B, Hq, Nq]`` fp32.
        config (BackwardConfig, Optional): tiles, reduced where they do not divide ``block_size``.
            Default: the measured choice of :func:`select_pooled_backward_config`

    The other arguments are as in :func:`kernels_common.pooled_attention`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: gradients of query, key and value in their dtype and memory order.

    Raises:
        UnsupportedCallError: no CUDA device, or bf16 in Triton's interpreter.
    """
    check_device(query)
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    blocks = block_count(keys, block_size[1])
    grad_query = torch.empty_like(query)
    target = grad_query if grad_query.stride(3) == 1 else grad_query.new_empty(grad_query.shape)
    block_d = max(16, triton.next_power_of_2(head_dim))
    for_query, for_keys = config or select_pooled_backward_config(
        block_d, query.dtype, large=holds_large_tiles(query)
    )
    padded = block_count(queries, block_size[0]) * block_size[0]
    given_key, given_value = key, value
    query, key, value, output, grad_output = (
        aligned(part) for part in (query, key, value, output, grad_output)
    )
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    lists_of_keys = LevelMask(counts, indices, block_size, queries, keys).transposed_lists()
    pointers = reads_pointers(query)
    shared = {
        "KV_GROUP": heads // kv_heads, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "MASK_M": block_size[0],
        "POINTERS": pointers, "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
    }  # fmt: skip
    with torch.cuda.device_of(query):
        pooled = [pool_triton(part, block_size[1], block_d) for part in (key, value)]
        shift, delta = row_terms(grad_output, grad_lse, output, lse, padded, block_d)
        wanted_m, pooled_n, warps, stages = for_query
        m, n = math.gcd(wanted_m, block_size[0]), math.gcd(pooled_n, block_size[1])
        pooled_attention_bwd_query_kernel[(triton.cdiv(queries, m), batch * heads)](
            *tile_source(query, m, block_d, pointers), *tile_source(grad_output, m, block_d, pointers),
            *tile_source(key, n, block_d, pointers), *tile_source(value, n, block_d, pointers),
            *pooled, target, shift, delta, counts, indices,
            *target.stride()[:3], *list_strides(counts)[:3], *list_strides(indices)[:3],
            queries, padded, keys, blocks, scale, scale * LOG2_E.value,
            QUERY_HEADS=heads, TILE_M=m, TILE_N=n, POOLED_N=pooled_n, MASK_N=block_size[1],
            num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
        grad_levels = lse.new_empty(2, batch, kv_heads, blocks * (block_size[1] // 8 * 15), block_d)
        wanted_m, wanted_n, warps, stages = for_keys
        m = math.gcd(wanted_m, block_size[0])
        first_row = 0
        for log2_level in range(len(LEVELS)):
            width = block_size[1] >> log2_level
            level_rows = blocks * width
            level_keys = [key, value]
            if log2_level:
                first_pooled = first_row - blocks * block_size[1]
                level_keys = [part.narrow(2, first_pooled, level_rows) for part in pooled]
            grad_keys = grad_levels.narrow(3, first_row, level_rows)
            tile = key_tile_of_level(wanted_n, width)
            pooled_attention_bwd_key_kernel[(blocks * triton.cdiv(width, tile), batch * kv_heads)](
                *tile_source(query, m, block_d, pointers), *tile_source(grad_output, m, block_d, pointers),
                *level_keys, *grad_keys, shift, delta, *lists_of_keys,
                *level_keys[0].stride()[:3], *level_keys[1].stride()[:3], grad_levels.stride(2),
                *list_strides(lists_of_keys[0])[:3], *list_strides(lists_of_keys[1])[:3],
                queries, padded, triton.cdiv(keys, LEVELS[log2_level]), scale, scale * LOG2_E.value,
                KV_HEADS=kv_heads, TILE_M=m, TILE_N=tile, WIDTH=width, LOG2_LEVEL=log2_level,
                num_warps=warps, num_stages=stages, **shared,
            )  # fmt: skip
            first_row += level_rows
        grad_key = _unpool(grad_levels[0], given_key, block_size[1])
        grad_value = _unpool(grad_levels[1], given_value, block_size[1])
    return (grad_query if target is grad_query else grad_query.copy_(target)), grad_key, grad_value
