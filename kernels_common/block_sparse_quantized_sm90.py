"""Device code of 8-bit block-sparse attention for Hopper: INT8 scores, FP8 (E4M3) weights and values.

The shape of :mod:`kernels_common.block_sparse_gluon_128`: persistent programs, one TMA producer warp, two
consumer warpgroups of 64 rows each that share every key and value tile, lists walked from their end. The
operands are those of SageAttention (arXiv 2410.02367; arXiv 2411.10958, section 3). What differs:

- Weights are scaled by 448, so that their maximum is the largest E4M3 number, and stay in registers. A thread
  holds other columns of the scores than the FP8 product wants; with value tokens stored in the order of
  ``interleave_tokens`` they are the same keys, and nothing has to move.
- Hopper adds FP8 products into an accumulator of few mantissa bits, and cuts the rest off. Over thousands of
  keys that bias eats a value's mean, so each tile starts from zero and is added to the output in fp32.
- What hides the exponentials differs by head dimension
  (:mod:`kernels_common.block_sparse_quantized_sm90_walks`).

Shape letters: M = 64 rows of a consumer, N = 128 keys of a tile, D head dimension.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from kernels_common.block_sparse_gluon_parts import (
    copy_out,
    get,
    get_item,
    log2,
    new_barriers,
    new_facts,
    ring_place,
)
from kernels_common.block_sparse_quantized_sm90_producer import produce
from kernels_common.block_sparse_quantized_sm90_tiles import (
    LANE_LAYOUT,
    PART_LAYOUT,
    ROWS,
    WEIGHT_LOG2,
    halves,
    mask_columns,
    pack,
    score_factors,
    start_scores,
    start_values,
)
from kernels_common.block_sparse_quantized_sm90_walks import walk_ahead, walk_in_turns
from kernels_common.triton_launch import LN_2


@gluon.jit
def _walk(
    HALF: gl.constexpr, scores, valid, factor_a, factor_b, query_tile, query_factor, rings, notes, barriers,
    step, tiles, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All tiles of an item but PV of the last one; zeros where the item has none."""
    acc = gl.zeros([64, 64], gl.float32, PART_LAYOUT)
    acc_1 = acc  # channels 64 to 127
    weights_a, weights_b = acc, acc
    peak = gl.full([64], float("-inf"), gl.float32, ROWS)
    total = gl.zeros([64, 4], gl.float32, LANE_LAYOUT)
    if tiles > 0:
        a, b = halves(scores)
        if valid < 128:
            a, b = mask_columns(a, valid), mask_columns(b, valid - 64)
        if D == 64:
            acc, peak, total, weights_a, weights_b, step = walk_in_turns(
                HALF, a, b, factor_a, factor_b, acc, peak, total, query_tile, query_factor,
                rings, notes, barriers, step, tiles, STAGES)  # fmt: skip
        else:
            acc, acc_1, peak, total, weights_a, weights_b, step = walk_ahead(
                a, b, factor_a, factor_b, acc, peak, total, query_tile, query_factor,
                rings, notes, barriers, step, tiles, STAGES)  # fmt: skip
    return acc, acc_1, peak, total, weights_a, weights_b, step


@gluon.jit
def _store(acc, total, scales, output, box, place):
    """Output of 64 channels."""
    scale = scales.load(gl.SliceLayout(0, PART_LAYOUT))
    total = gl.convert_layout(total, gl.SliceLayout(1, PART_LAYOUT))[:, None]
    acc = acc * (1.0 / gl.where(total == 0.0, 1.0, total)) * scale[None, :]
    copy_out(gl.where(total == 0.0, 0.0, acc), output, box, place)


@gluon.jit
def _store_lse(peak, total, lse_ptr, first, query_length):
    empty = total == 0.0
    lse = (peak - WEIGHT_LOG2 + log2(gl.where(empty, 1.0, total))) * LN_2
    rows = first + gl.arange(0, 64, ROWS)
    lse = gl.where(empty, float("-inf"), lse)
    gl.store(lse_ptr + rows, lse, mask=rows < query_length)


@gluon.jit
def _store_item(
    HALF: gl.constexpr, acc, acc_1, peak, total, output, out_ring, lse_ptr, value_scales, slot, batch, head,
    row, heads, query_length, D: gl.constexpr,
):  # fmt: skip
    row_total = gl.convert_layout(gl.sum(total, 1), ROWS, assert_trivial=True)
    first = row * 128 + HALF * 64
    place = [batch, head, first, 0]
    _store(acc, row_total, value_scales.index(slot * 2), output, out_ring.index(HALF), place)
    if D == 128:
        place = [batch, head, first, 64]
        _store(acc_1, row_total, value_scales.index(slot * 2 + 1), output, out_ring.index(2 + HALF), place)
    start = (batch * heads + head).to(gl.int64) * query_length
    _store_lse(peak, row_total, lse_ptr + start, first, query_length)


@gluon.jit
def _consumer(
    HALF: gl.constexpr, output, out_ring, lse_ptr, rings, notes, barriers, heads, query_length, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of rows ``64 * HALF`` to ``64 * HALF + 63`` of every query tile."""
    query_ring, key_ring, value_ring = rings
    query_scales, key_scales, value_scales, facts, _ = notes
    q_full, q_empty, k_full, k_empty, _, v_empty, _ = barriers
    BOXES: gl.constexpr = D // 32
    FREES: gl.constexpr = D == 128  # at 64 the end of a turn frees slots
    step = 0
    work = 0
    mbarrier.wait(q_full.index(0), 0)
    batch, head, row, tiles, valid = get_item(facts, 0)
    query_factor = get(query_scales, HALF) * scale_log2
    mbarrier.wait(k_full.index(0), 0, pred=tiles > 0)
    query_tile = query_ring.index(HALF).reshape([64, D])
    pending = start_scores(query_tile, key_ring, 0, D)
    factor_a, factor_b = score_factors(key_scales, 0, query_factor)
    scores = warpgroup_mma_wait(0, deps=[pending])  # [M, N]
    if FREES:
        mbarrier.arrive(k_empty.index(0), pred=tiles > 0)
    while batch >= 0:
        acc, acc_1, peak, total, weights_a, weights_b, step = _walk(
            HALF, scores, valid, factor_a, factor_b, query_tile, query_factor, rings, notes, barriers, step,
            tiles, D, STAGES)  # fmt: skip

        # PV of the last tile, then QK of the next item's first one, which runs during the epilogue.
        # Without a tile to read, both compute on whatever lies there and nothing uses the result.
        last_slot = ring_place(work, 2)[0]
        work += 1
        query_slot, query_phase = ring_place(work, 2)
        value_slot = ring_place(step, STAGES)[0]
        packed_a, packed_b = pack(weights_a), pack(weights_b)
        pending_acc = start_values(packed_a, packed_b, value_ring, value_slot * BOXES, acc, True)
        pending_acc_1 = pending_acc
        if D == 128:
            pending_acc_1 = start_values(packed_a, packed_b, value_ring, value_slot * BOXES + 2, acc_1, True)
        step = gl.where(tiles > 0, step + 1, step)
        slot, phase = ring_place(step, STAGES)
        mbarrier.wait(q_full.index(query_slot), query_phase)
        next_batch, next_head, next_row, next_tiles, valid = get_item(facts, query_slot)
        query_factor = get(query_scales, query_slot * 2 + HALF) * scale_log2
        mbarrier.wait(k_full.index(slot), phase, pred=next_tiles > 0)
        query_tile = query_ring.index(query_slot * 2 + HALF).reshape([64, D])
        pending = start_scores(query_tile, key_ring, slot, D)
        factor_a, factor_b = score_factors(key_scales, slot, query_factor)
        acc, acc_1 = warpgroup_mma_wait(1, deps=[pending_acc, pending_acc_1])
        if FREES:
            mbarrier.arrive(v_empty.index(value_slot), pred=tiles > 0)

        _store_item(HALF, acc, acc_1, peak, total, output, out_ring, lse_ptr, value_scales, last_slot, batch,
                    head, row, heads, query_length, D)  # fmt: skip
        mbarrier.arrive(q_empty.index(last_slot))
        scores = warpgroup_mma_wait(0, deps=[pending])
        if FREES:
            mbarrier.arrive(k_empty.index(slot), pred=next_tiles > 0)
        batch, head, row, tiles = next_batch, next_head, next_row, next_tiles
    tma.store_wait(0)


# Lengths and strides of lists change with every size; specialising on them would recompile.
@gluon.jit(
    do_not_specialize=[
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir",
        "items", "row_tiles", "heads", "group", "query_length", "key_length", "scale_log2",
    ]
)  # fmt: skip
def quantized_fwd_kernel_sm90(
    query_source,
    key_source,
    value_source,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    output,
    lse_ptr,
    counts_ptr,
    indices_ptr,
    counter_ptr,
    stride_cb,
    stride_ch,
    stride_ib,
    stride_ih,
    stride_ir,
    items,
    row_tiles,
    heads,
    group,
    query_length,
    key_length,
    scale_log2,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    MASK_N: gl.constexpr,
):
    """Output and log-sum-exp of work items: ``program_id`` first, then whatever the counter gives."""
    numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    query_ring = gl.allocate_shared_memory(gl.int8, [4, 1, 1, 64, D], query_source.layout)
    key_ring = gl.allocate_shared_memory(gl.int8, [STAGES * 2, 1, 1, 64, D], key_source.layout)
    boxes: gl.constexpr = STAGES * (D // 32)
    value_ring = gl.allocate_shared_memory(gl.float8e4nv, [boxes, 1, 1, 64, 64], value_source.layout)
    out_ring = gl.allocate_shared_memory(output.dtype, [D // 32, 1, 1, 64, 64], output.layout)
    query_scales = gl.allocate_shared_memory(gl.float32, [4, 1], numbers)
    key_scales = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1], numbers)
    facts = new_facts(2)
    value_scales = gl.allocate_shared_memory(gl.float32, [4, 64], numbers)
    zero = gl.allocate_shared_memory(gl.float32, [1, 1], numbers)
    zero.index(0).store(gl.full([1], 0.0, gl.float32, gl.BlockedLayout([1], [32], [4], [0])))
    # The producer arrives at "full" (with the bytes it asks for), both consumers at "empty", and each
    # consumer at a turn of its own for every tile.
    q_full, q_empty = new_barriers(2, 1), new_barriers(2, 2)
    k_full, k_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    v_full, v_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    turns = new_barriers(2 * STAGES, 1)
    fence_async_shared()
    rings = (query_ring, key_ring, value_ring)
    notes = (query_scales, key_scales, value_scales, facts, zero)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    lists = (counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir)
    sources = (query_source, key_source, value_source)
    scales = (query_scale_ptr, key_scale_ptr, value_scale_ptr)
    gl.warp_specialize(
        [
            (_consumer, (
                0, output, out_ring, lse_ptr, rings, notes, barriers, heads, query_length, scale_log2,
                D, STAGES)),
            (_consumer, (
                1, output, out_ring, lse_ptr, rings, notes, barriers, heads, query_length, scale_log2,
                D, STAGES)),
            (produce, (
                sources, scales, lists, rings, notes, barriers, counter_ptr, items, row_tiles, heads, group,
                query_length, key_length, D, STAGES, MASK_N)),
        ],
        [4, 1],  # warps of the second consumer and of the producer; the first one has the kernel's four
        [240, 24],  # their registers; the first consumer gets the rest, 240
    )  # fmt: skip
