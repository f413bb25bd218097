"""Gradients of block-sparse attention in Triton: one kernel over the lists, one over the transposed lists.

Weights are computed anew from the log-sum-exp of the forward pass (FlashAttention-2, arXiv 2307.08691).
The query kernel walks the kept key blocks of its query tile, the key kernel the query blocks that keep its
key tile, and for grouped heads those of every query head of the group. Each gradient has one writer: no
atomics, two runs agree bit for bit.

Shape letters: M and N tokens of a query and a key tile, D head dimension padded to a power of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from core.block_mask import BlockSparseMask, block_count
from kernels_common.triton_launch import (
    LOG2_E,
    TileConfig,
    aligned,
    bias_strides,
    check_device,
    divide_tile,
    holds_large_tiles,
    list_strides,
    load_tile,
    reads_pointers,
    tile_source,
)


class BackwardConfig(NamedTuple):
    """Tile and launch parameters of the two large kernels."""

    query: TileConfig
    keys: TileConfig


# Lengths and strides of lists change with every size; specialising on them would recompile.
@triton.jit(do_not_specialize=["query_length", "padded_length"])
def block_sparse_bwd_rows_kernel(
    output_source,
    output_strides,
    grad_output_source,
    grad_output_strides,
    lse_ptr,
    grad_lse_ptr,
    shift_ptr,
    delta_ptr,
    query_length,
    padded_length,
    QUERY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    POINTERS: tl.constexpr,
):
    """Shift of the base-2 exponents and delta of TILE_M rows: grid ``(ceil(padded / TILE_M), B * Hq)``.

    Rows that see no key, and padding, get shift +inf and delta 0: all their weights are 0.
    """
    start_m = tl.program_id(0) * TILE_M
    batch = tl.program_id(1) // QUERY_HEADS
    head = tl.program_id(1) % QUERY_HEADS
    output_tile = load_tile(
        output_source, output_strides, batch, head, start_m, query_length, TILE_M, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    grad_tile = load_tile(
        grad_output_source, grad_output_strides, batch, head, start_m, query_length,
        TILE_M, HEAD_DIM, BLOCK_D, POINTERS,
    )  # fmt: skip
    delta = tl.sum(output_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    rows = start_m + tl.arange(0, TILE_M)
    inside = rows < query_length
    place = tl.program_id(1).to(tl.int64) * query_length + rows
    lse = tl.load(lse_ptr + place, mask=inside, other=float("-inf"))
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + place, mask=inside, other=0.0)
    empty = lse == float("-inf")
    place = tl.program_id(1).to(tl.int64) * padded_length + rows
    tl.store(shift_ptr + place, tl.where(empty, float("inf"), lse * LOG2_E), mask=rows < padded_length)
    tl.store(delta_ptr + place, tl.where(empty, 0.0, delta), mask=rows < padded_length)


@triton.jit
def _store_tile(base, stride, tile, rows, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``[M, D]`` of one head, without those past its length and the padding of D."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    inside = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "query_length", "padded_length", "key_length", "scale", "scale_log2",
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir", "stride_bb", "stride_bh",
    ]
)  # fmt: skip
def block_sparse_bwd_query_kernel(
    query_source,
    query_strides,
    grad_output_source,
    grad_output_strides,
    key_source,
    key_strides,
    value_source,
    value_strides,
    grad_query_ptr,
    shift_ptr,
    delta_ptr,
    counts_ptr,
    indices_ptr,
    key_lengths_ptr,
    bias_ptr,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_cb,
    stride_ch,
    stride_ib,
    stride_ih,
    stride_ir,
    stride_bb,
    stride_bh,
    query_length,
    padded_length,
    key_length,
    scale,
    scale_log2,
    QUERY_HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    BIAS_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    POINTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one query tile: grid ``(ceil(Nq / TILE_M), B * Hq)``."""
    start_m = tl.program_id(0) * TILE_M
    row = start_m // MASK_M
    batch = tl.program_id(1) // QUERY_HEADS
    head = tl.program_id(1) % QUERY_HEADS
    kv_head = head // KV_GROUP
    batch_64, head_64 = batch.to(tl.int64), head.to(tl.int64)

    count = tl.load(counts_ptr + batch_64 * stride_cb + head_64 * stride_ch + row)
    list_ptr = indices_ptr + batch_64 * stride_ib + head_64 * stride_ih + row.to(tl.int64) * stride_ir
    valid_keys = key_length
    if HAS_KEY_LENGTHS:
        valid_keys = tl.minimum(tl.load(key_lengths_ptr + batch).to(tl.int32), key_length)
    if HAS_BIAS:
        bias_ptr += batch_64 * stride_bb + (head_64 // BIAS_GROUP) * stride_bh

    query_tile = load_tile(
        query_source, query_strides, batch, head, start_m, query_length, TILE_M, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    grad_tile = load_tile(
        grad_output_source, grad_output_strides, batch, head, start_m, query_length,
        TILE_M, HEAD_DIM, BLOCK_D, POINTERS,
    )  # fmt: skip
    rows = start_m + tl.arange(0, TILE_M)
    place = tl.program_id(1).to(tl.int64) * padded_length + rows
    shift, delta = tl.load(shift_ptr + place), tl.load(delta_ptr + place)
    acc = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    tiles_per_block: tl.constexpr = MASK_N // TILE_N
    for step in range(count * tiles_per_block):
        block = tl.load(list_ptr + step // tiles_per_block)
        start_n = block * MASK_N + (step % tiles_per_block) * TILE_N
        key_tile = load_tile(
            key_source, key_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
        )  # fmt: skip
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)  # [M, N]
        value_tile = load_tile(
            value_source, value_strides, batch, kv_head, start_n, key_length,
            TILE_N, HEAD_DIM, BLOCK_D, POINTERS,
        )  # fmt: skip
        grad_weights = tl.dot(grad_tile, value_tile.T, input_precision=PRECISION)  # [M, N]
        columns = start_n + tl.arange(0, TILE_N)
        exponents = scores * scale_log2 - shift[:, None]
        if HAS_BIAS:
            key_bias = tl.load(bias_ptr + columns, mask=columns < key_length, other=0.0)
            exponents += (key_bias * LOG2_E)[None, :]
        weights = tl.exp2(exponents)
        if start_n + TILE_N > valid_keys:
            weights = tl.where((columns < valid_keys)[None, :], weights, 0.0)
        if CAUSAL:
            last_seen = start_m + key_length - query_length  # by the first query of the tile
            if start_n + TILE_N > last_seen + 1:
                rows_seen = last_seen + tl.arange(0, TILE_M)
                weights = tl.where(columns[None, :] <= rows_seen[:, None], weights, 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(key_tile.dtype), key_tile, acc, input_precision=PRECISION)

    base = grad_query_ptr + batch_64 * stride_gb + head_64 * stride_gh
    _store_tile(base, stride_gn, acc * scale, rows, query_length, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "query_length", "padded_length", "key_length", "scale", "scale_log2",
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir", "stride_bb", "stride_bh",
    ]
)  # fmt: skip
def block_sparse_bwd_key_kernel(
    query_source,
    query_strides,
    grad_output_source,
    grad_output_strides,
    key_source,
    key_strides,
    value_source,
    value_strides,
    grad_key_ptr,
    grad_value_ptr,
    shift_ptr,
    delta_ptr,
    counts_ptr,
    indices_ptr,
    key_lengths_ptr,
    bias_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_cb,
    stride_ch,
    stride_ib,
    stride_ih,
    stride_ir,
    stride_bb,
    stride_bh,
    query_length,
    padded_length,
    key_length,
    scale,
    scale_log2,
    KV_HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    BIAS_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    POINTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one key and value tile, over the transposed lists: grid ``(ceil(Nk / TILE_N), B * Hkv)``.

    Scores are computed transposed, ``[N, M]``, so that weights enter the next product from registers.
    """
    start_n = tl.program_id(0) * TILE_N
    batch = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    batch_64, kv_head_64, row_64 = batch.to(tl.int64), kv_head.to(tl.int64), (start_n // MASK_N).to(tl.int64)
    columns = start_n + tl.arange(0, TILE_N)
    valid_keys = key_length
    if HAS_KEY_LENGTHS:
        valid_keys = tl.minimum(tl.load(key_lengths_ptr + batch).to(tl.int32), key_length)

    key_tile = load_tile(
        key_source, key_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    value_tile = load_tile(
        value_source, value_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    grad_key = tl.zeros([TILE_N, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([TILE_N, BLOCK_D], dtype=tl.float32)
    tiles_per_block: tl.constexpr = MASK_M // TILE_M
    for member in range(KV_GROUP):
        head = kv_head * KV_GROUP + member
        head_64 = head.to(tl.int64)
        count = tl.load(counts_ptr + batch_64 * stride_cb + head_64 * stride_ch + row_64)
        list_ptr = indices_ptr + batch_64 * stride_ib + head_64 * stride_ih + row_64 * stride_ir
        first_row = (batch_64 * (KV_HEADS * KV_GROUP) + head_64) * padded_length
        if HAS_BIAS:
            bias_row = bias_ptr + batch_64 * stride_bb + (head_64 // BIAS_GROUP) * stride_bh
            key_bias = tl.load(bias_row + columns, mask=columns < key_length, other=0.0) * LOG2_E
        for step in range(count * tiles_per_block):
            block = tl.load(list_ptr + step // tiles_per_block)
            start_m = block * MASK_M + (step % tiles_per_block) * TILE_M
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
            exponents = scores * scale_log2 - tl.load(shift_ptr + place)[None, :]
            if HAS_BIAS:
                exponents += key_bias[:, None]
            weights = tl.exp2(exponents)
            if CAUSAL:
                last_seen = start_m + key_length - query_length  # by the first query of the tile
                if start_n + TILE_N > last_seen + 1:
                    rows_seen = last_seen + tl.arange(0, TILE_M)
                    weights = tl.where(columns[:, None] <= rows_seen[None, :], weights, 0.0)
            grad_scores = weights * (grad_weights - tl.load(delta_ptr + place)[None, :])
            grad_value = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_value, input_precision=PRECISION)
            grad_key = tl.dot(
                grad_scores.to(query_tile.dtype), query_tile, grad_key, input_precision=PRECISION
            )
            # Never true here. Without a use of the sum Triton leaves both products in flight across steps,
            # and ptxas then runs every product of the loop on its own.
            if count < 0:
                grad_key = tl.zeros_like(grad_key)

    # Rows of keys that are left out hold whatever their scores gave; they take no part in other rows.
    kept = (columns < valid_keys)[:, None]
    grad_key = tl.where(kept, grad_key * scale, 0.0)
    grad_value = tl.where(kept, grad_value, 0.0)
    key_base = grad_key_ptr + batch_64 * stride_kb + kv_head_64 * stride_kh
    value_base = grad_value_ptr + batch_64 * stride_vb + kv_head_64 * stride_vh
    _store_tile(key_base, stride_kn, grad_key, columns, key_length, HEAD_DIM, BLOCK_D)
    _store_tile(value_base, stride_vn, grad_value, columns, key_length, HEAD_DIM, BLOCK_D)


def select_backward_config(
    block_d: int, block_size: tuple[int, int], dtype: torch.dtype, *, large: bool = True
) -> BackwardConfig:
    """Tiles for a padded head dimension, mask block and dtype; they divide the mask block.

    The ``large`` 16-bit tiles (:func:`holds_large_tiles`) up to D 128 are the fastest of those tried on an
    H200 with random lists at density 0.25. The key kernel holds two sums: its small programs share a
    multiprocessor and hide each other's softmax, and only at D 64 its registers have room for 128 queries
    per step.
    """
    if not large:
        query, keys = small_backward_tiles(block_d, dtype)
    elif dtype == torch.float32:
        query, keys = TileConfig(64, 32, 4, 1), TileConfig(32, 64, 4, 1)
    elif block_d <= 128:
        query = TileConfig(128, 64, 8, 3) if block_size[0] % 128 == 0 else TileConfig(64, 64, 4, 2)
        keys = TileConfig(128 if block_d <= 64 else 64, 64, 4, 2)
    else:
        query, keys = TileConfig(64, 64, 4, 1), TileConfig(32, 64, 8, 2)
    return BackwardConfig(*(divide_tile(wanted, block_size) for wanted in (query, keys)))


def small_backward_tiles(block_d: int, dtype: torch.dtype) -> BackwardConfig:
    """Tiles of GPUs without :func:`holds_large_tiles`, before they are fitted to the mask block."""
    if dtype == torch.float32:
        wide = (32, 16) if block_d <= 128 else (16, 16)
        m, n = (32, 32) if block_d <= 64 else wide
        return BackwardConfig(TileConfig(m, n, 4, 1), TileConfig(n, m, 4, 1))
    if block_d <= 64:
        return BackwardConfig(TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2))
    if block_d <= 128:
        return BackwardConfig(TileConfig(64, 32, 4, 2), TileConfig(64, 64, 8, 2))
    return BackwardConfig(TileConfig(32, 32, 4, 1), TileConfig(32, 32, 8, 1))


def row_terms(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    padded: int,
    block_d: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and delta of every row, ``[B, Hq, padded]`` fp32 each."""
    batch, heads, queries = lse.shape
    shift, delta = lse.new_empty(2, batch, heads, padded)
    tile, pointers = 64, reads_pointers(output)
    block_sparse_bwd_rows_kernel[(triton.cdiv(padded, tile), batch * heads)](
        *tile_source(output, tile, block_d, pointers), *tile_source(grad_output, tile, block_d, pointers),
        lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), shift, delta,
        queries, padded,
        QUERY_HEADS=heads, HEAD_DIM=output.shape[3], BLOCK_D=block_d, TILE_M=tile,
        HAS_GRAD_LSE=grad_lse is not None, POINTERS=pointers,
    )  # fmt: skip
    return shift, delta


def block_sparse_attention_backward_triton(
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
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    config: BackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels; the lists are transposed on the device, nothing is read back to the host.

    Args:
        grad_output (Tensor): ``[B, Hq, Nq, D]`` in the dtype of ``query``.
        grad_lse (Tensor, Optional): ``[B, Hq, Nq]`` fp32; ignored where a query sees no key.
        output (Tensor): what the forward pass returned, ``[B, Hq, Nq, D]``.
        lse (Tensor): what the forward pass returned, ``[B, Hq, Nq]`` fp32.
        config (BackwardConfig, Optional): tiles dividing ``block_size``. Default: the measured choice of
            :func:`select_backward_config`

    The other arguments are as in :func:`kernels_common.block_sparse_attention`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: gradients of query, key and value in their dtype and memory order.

    Raises:
        UnsupportedCallError: no CUDA device, or bf16 in Triton's interpreter.
    """
    check_device(query)
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    gradients = tuple(torch.empty_like(part) for part in (query, key, value))
    targets = tuple(part if part.stride(3) == 1 else part.new_empty(part.shape) for part in gradients)
    grad_query, grad_key, grad_value = targets
    block_d = max(16, triton.next_power_of_2(head_dim))
    (m, n, warps, stages), for_keys = config or select_backward_config(
        block_d, block_size, query.dtype, large=holds_large_tiles(query)
    )
    padded = block_count(queries, block_size[0]) * block_size[0]
    query, key, value, output, grad_output = (
        aligned(part) for part in (query, key, value, output, grad_output)
    )
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    transposed = BlockSparseMask(counts, indices, block_size, queries, keys).transposed()
    key_lengths = None if key_lengths is None else key_lengths.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    pointers = reads_pointers(query)
    shared = {
        "KV_GROUP": heads // kv_heads,
        "BIAS_GROUP": 1 if bias is None else heads // bias.shape[1],
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "MASK_M": block_size[0], "MASK_N": block_size[1],
        "HAS_KEY_LENGTHS": key_lengths is not None, "HAS_BIAS": bias is not None, "CAUSAL": causal,
        "POINTERS": pointers, "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
    }  # fmt: skip
    with torch.cuda.device_of(query):
        shift, delta = row_terms(grad_output, grad_lse, output, lse, padded, block_d)
        block_sparse_bwd_query_kernel[(triton.cdiv(queries, m), batch * heads)](
            *tile_source(query, m, block_d, pointers), *tile_source(grad_output, m, block_d, pointers),
            *tile_source(key, n, block_d, pointers), *tile_source(value, n, block_d, pointers),
            grad_query, shift, delta, counts, indices, key_lengths, bias,
            *grad_query.stride()[:3],
            *list_strides(counts)[:2], *list_strides(indices)[:3], *bias_strides(bias),
            queries, padded, keys, scale, scale * LOG2_E.value,
            QUERY_HEADS=heads, TILE_M=m, TILE_N=n, num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
        m, n, warps, stages = for_keys
        block_sparse_bwd_key_kernel[(triton.cdiv(keys, n), batch * kv_heads)](
            *tile_source(query, m, block_d, pointers), *tile_source(grad_output, m, block_d, pointers),
            *tile_source(key, n, block_d, pointers), *tile_source(value, n, block_d, pointers),
            grad_key, grad_value, shift, delta, transposed.counts, transposed.indices, key_lengths, bias,
            *grad_key.stride()[:3], *grad_value.stride()[:3],
            *list_strides(transposed.counts)[:2], *list_strides(transposed.indices)[:3],
            *bias_strides(bias),
            queries, padded, keys, scale, scale * LOG2_E.value,
            KV_HEADS=kv_heads, TILE_M=m, TILE_N=n, num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
    pairs = zip(gradients, targets, strict=True)
    grad_query, grad_key, grad_value = (
        part if part is target else part.copy_(target) for part, target in pairs
    )
    return grad_query, grad_key, grad_value
