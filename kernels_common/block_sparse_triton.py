"""Block-sparse attention in Triton: one program per query tile walks the list of its kept key blocks.

The kernel tile divides the mask block, so lists are read without a search. Softmax is online, in base 2
with the scale folded into one multiply-add (FlashAttention-2, arXiv 2307.08691). Lists ascend, so only
the last listed block of a row can reach past the keys: the mask is a branch that whole tiles skip (applied
to every tile it costs 2 to 12 %).

The sequence that the mask is about may be a permutation of the tokens: with an order, rows of query, key,
value and output are found through it, and nothing is copied.

Shape letters: M and N tokens of a query and a key tile, D head dimension padded to a power of two.
"""

import torch
import triton
import triton.language as tl

from kernels_common.triton_launch import (
    LN_2,
    LOG2_E,
    TileConfig,
    aligned,
    bias_strides,
    check_device,
    divide_tile,
    holds_large_tiles,
    list_strides,
    load_rows,
    load_tile,
    reads_pointers,
    tile_source,
)


@triton.jit
def _hide_later(scores, columns, last_seen, TILE_M: tl.constexpr):
    """Scores with -inf at keys behind each query; the tile's first query sees keys up to ``last_seen``."""
    if tl.max(columns, 0) > last_seen:
        rows = last_seen + tl.arange(0, TILE_M)
        scores = tl.where(columns[None, :] <= rows[:, None], scores, float("-inf"))
    return scores


@triton.jit
def _normalise(acc, peak, total):
    """Output and natural log-sum-exp; 0 and -inf for rows that saw no key."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN_2)
    return acc / total[:, None], lse


@triton.jit
def _tokens(order_ptr, stride_b, stride_h, batch, head, places, length):
    """Tokens at some places of the mask's sequence, int64; any where the sequence has ended."""
    order_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return tl.load(order_ptr + places, mask=places < length, other=0).to(tl.int64)


# Lengths and strides of lists change with every size; specialising on them would recompile.
@triton.jit(
    do_not_specialize=[
        "query_length", "key_length", "scale_log2",
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir", "stride_bb", "stride_bh",
        "stride_qob", "stride_qoh", "stride_kob", "stride_koh",
    ]
)  # fmt: skip
def block_sparse_fwd_kernel(  # noqa: PLR0912, PLR0915 (compiled code)
    query_source,
    query_strides,
    key_source,
    key_strides,
    value_source,
    value_strides,
    output_ptr,
    lse_ptr,
    counts_ptr,
    indices_ptr,
    key_lengths_ptr,
    bias_ptr,
    query_order_ptr,
    key_order_ptr,
    stride_qob,
    stride_qoh,
    stride_kob,
    stride_koh,
    stride_ob,
    stride_oh,
    stride_on,
    stride_cb,
    stride_ch,
    stride_ib,
    stride_ih,
    stride_ir,
    stride_bb,
    stride_bh,
    query_length,
    key_length,
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
    HAS_QUERY_ORDER: tl.constexpr,
    HAS_KEY_ORDER: tl.constexpr,
    CAUSAL: tl.constexpr,
    POINTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of one query tile: grid ``(ceil(Nq / TILE_M), B * Hq)``.

    Orders need POINTERS.
    """
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

    if HAS_QUERY_ORDER:
        rows = start_m + tl.arange(0, TILE_M)
        tokens = _tokens(query_order_ptr, stride_qob, stride_qoh, batch, head, rows, query_length)
        query_tile = load_rows(
            query_source, query_strides, batch, head, tokens, rows < query_length, HEAD_DIM, BLOCK_D
        )
    else:
        query_tile = load_tile(
            query_source, query_strides, batch, head, start_m, query_length, TILE_M, HEAD_DIM, BLOCK_D,
            POINTERS,
        )  # fmt: skip
    acc = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    tiles_per_block: tl.constexpr = MASK_N // TILE_N
    for step in range(count * tiles_per_block):
        block = tl.load(list_ptr + step // tiles_per_block)
        start_n = block * MASK_N + (step % tiles_per_block) * TILE_N
        columns = start_n + tl.arange(0, TILE_N)
        if HAS_KEY_ORDER:
            key_tokens = _tokens(key_order_ptr, stride_kob, stride_koh, batch, kv_head, columns, key_length)
            key_tile = load_rows(
                key_source, key_strides, batch, kv_head, key_tokens, columns < key_length, HEAD_DIM, BLOCK_D
            )
        else:
            key_tile = load_tile(
                key_source, key_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D,
                POINTERS,
            )  # fmt: skip
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)  # [M, N]
        factor = scale_log2
        if HAS_BIAS:
            key_bias = tl.load(bias_ptr + columns, mask=columns < key_length, other=0.0)
            scores = scores * scale_log2 + (key_bias * LOG2_E)[None, :]
            factor = 1.0
        if start_n + TILE_N > valid_keys:
            scores = tl.where((columns < valid_keys)[None, :], scores, float("-inf"))
        if CAUSAL:
            scores = _hide_later(scores, columns, start_m + key_length - query_length, TILE_M)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        base = new_peak
        if HAS_BIAS or HAS_KEY_LENGTHS or CAUSAL:
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no -inf - -inf
        rescale = tl.exp2(peak - base)
        weights = tl.exp2(scores * factor - base[:, None])
        total = total * rescale + tl.sum(weights, 1)
        if HAS_KEY_ORDER:
            value_tile = load_rows(
                value_source, value_strides, batch, kv_head, key_tokens, columns < key_length, HEAD_DIM,
                BLOCK_D,
            )  # fmt: skip
        else:
            value_tile = load_tile(
                value_source, value_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D,
                POINTERS,
            )  # fmt: skip
        acc = tl.dot(
            weights.to(value_tile.dtype), value_tile, acc * rescale[:, None], input_precision=PRECISION
        )
        peak = new_peak

    acc, lse = _normalise(acc, peak, total)
    rows = start_m + tl.arange(0, TILE_M)
    tokens = rows.to(tl.int64)
    if HAS_QUERY_ORDER:  # read again: registers are dearer than loads
        tokens = _tokens(query_order_ptr, stride_qob, stride_qoh, batch, head, rows, query_length)
    columns = tl.arange(0, BLOCK_D)
    output_base = output_ptr + batch_64 * stride_ob + head_64 * stride_oh
    pointers = output_base + tokens[:, None] * stride_on + columns[None, :]
    tl.store(
        pointers,
        acc.to(output_ptr.dtype.element_ty),
        mask=(rows < query_length)[:, None] & (columns < HEAD_DIM)[None, :],
    )
    lse_base = lse_ptr + tl.program_id(1).to(tl.int64) * query_length
    tl.store(lse_base + tokens, lse, mask=rows < query_length)


def select_config(
    block_d: int, block_size: tuple[int, int], dtype: torch.dtype, *, large: bool = True
) -> TileConfig:
    """Tile for a padded head dimension, mask block and dtype; it divides the mask block.

    The ``large`` 16-bit tiles (:func:`holds_large_tiles`) are the fastest of those tried on an H200, with
    random lists at densities 0.5 to 0.1:

    - D 64: 64x128. Small programs share a multiprocessor and hide each other's softmax, and 128 keys per
      step halve the rescaling of the output.
    - D 128: 128x128 where the mask block allows it. The reuse of keys by 128 queries counts for more.
    """
    if not large:
        return divide_tile(_small_tile(block_d, dtype), block_size)
    if dtype == torch.float32:
        wanted = TileConfig(64, 64, 4, 2) if block_d <= 128 else TileConfig(64, 32, 8, 1)
    elif block_d == 64:
        wanted = TileConfig(64, 128, 4, 2)
    elif block_d == 128 and min(block_size) >= 128:
        wanted = TileConfig(128, 128, 8, 2)
    elif block_d == 128:
        wanted = TileConfig(64, 64, 4, 3)
    else:
        wanted = TileConfig(64, 64, 4, 2)
    return divide_tile(wanted, block_size)


def _small_tile(block_d: int, dtype: torch.dtype) -> TileConfig:
    """No spilled registers but in fp32 from D 128 on, and as many warps on a multiprocessor as may be."""
    if dtype == torch.float32:
        wide = TileConfig(32, 32, 4, 2) if block_d <= 128 else TileConfig(32, 16, 8, 1)
        return TileConfig(64, 32, 4, 2) if block_d <= 64 else wide
    wide = TileConfig(128, 64, 8, 2) if block_d <= 128 else TileConfig(64, 32, 4, 2)
    return TileConfig(64, 64, 4, 2) if block_d <= 64 else wide


def block_sparse_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    query_order: torch.Tensor | None = None,
    key_order: torch.Tensor | None = None,
    causal: bool = False,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments as in :func:`kernels_common.block_sparse_attention`.

    With a ``key_order``, ``bias`` is in the sequence of the mask.

    Args:
        config (TileConfig, Optional): tile and launch parameters, tiles dividing ``block_size``.
            Default: the measured choice of :func:`select_config`

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
    config = config or select_config(block_d, block_size, query.dtype, large=holds_large_tiles(query))
    query, key, value = (aligned(part) for part in (query, key, value))
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    key_lengths = None if key_lengths is None else key_lengths.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    query_order, key_order = _list_of(query_order), _list_of(key_order)
    pointers = reads_pointers(query) or query_order is not None or key_order is not None
    with torch.cuda.device_of(query):
        block_sparse_fwd_kernel[(triton.cdiv(queries, config.tile_m), batch * heads)](
            *tile_source(query, config.tile_m, block_d, pointers),
            *tile_source(key, config.tile_n, block_d, pointers),
            *tile_source(value, config.tile_n, block_d, pointers),
            target, lse, counts, indices, key_lengths, bias, query_order, key_order,
            *_order_strides(query_order), *_order_strides(key_order), *target.stride()[:3],
            *list_strides(counts)[:2], *list_strides(indices)[:3], *bias_strides(bias),
            queries, key.shape[2], scale * LOG2_E.value,
            QUERY_HEADS=heads, KV_GROUP=heads // key.shape[1],
            BIAS_GROUP=1 if bias is None else heads // bias.shape[1],
            HEAD_DIM=head_dim, BLOCK_D=block_d, TILE_M=config.tile_m, TILE_N=config.tile_n,
            MASK_M=block_size[0], MASK_N=block_size[1],
            HAS_KEY_LENGTHS=key_lengths is not None, HAS_BIAS=bias is not None,
            HAS_QUERY_ORDER=query_order is not None, HAS_KEY_ORDER=key_order is not None, CAUSAL=causal,
            POINTERS=pointers,
            PRECISION="tf32x3" if query.dtype == torch.float32 else "ieee",
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return (output if target is output else output.copy_(target)), lse


def _list_of(order: torch.Tensor | None) -> torch.Tensor | None:
    """An order as ``[B or 1, H or 1, N]`` with its places next to each other."""
    if order is None:
        return None
    lists = order[(None,) * (3 - order.dim())]
    return lists if lists.stride(2) == 1 else lists.contiguous()


def _order_strides(order: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if order is None else list_strides(order)[:2]
