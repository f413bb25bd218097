"""Device code of 8-bit block-sparse attention for Hopper: INT8 scores, FP8 (E4M3) weights and values.

The shape of :mod:`kernels_common.block_sparse_gluon`: persistent programs, one TMA producer warp, two
consumer warpgroups of 64 rows each that share every key and value tile, lists walked from their end. The
operands are those of SageAttention (arXiv 2410.02367; arXiv 2411.10958, section 3). What differs:

- Weights are scaled by 448, so that their maximum is the largest E4M3 number, and stay in registers. A thread
  holds other columns of the scores than the FP8 product wants; with value tokens stored in the order of
  ``interleave_tokens`` they are the same keys, and nothing has to move.
- Hopper adds FP8 products into an accumulator of few mantissa bits, and cuts the rest off. Over thousands of
  keys that bias eats a value's mean, so each tile starts from zero and is added to the output in fp32.
- The exponentials of a tile take longer than its products. The consumers take turns at them: while one
  computes weights, the other has its products, conversions and maxima done.
- The producer hands out work items from a counter, since random lists differ in length, and passes each
  item's facts and the scales of its tiles through shared memory.

Shape letters: M = 64 rows of a consumer, N = 128 keys of a tile, D head dimension.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels_common.triton_launch import LN_2

WEIGHT_LOG2 = gl.constexpr(8.807354922057604)  # log2(448)

# How the accumulators of the two products lie in the registers of a warpgroup: [M, N] and [M, 64].
SCORE_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
PART_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
ROWS = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])))
# FP8 weights of 64 keys as the first operand of a product, and the same places for 32-bit values.
WEIGHT_LAYOUT = gl.constexpr(
    gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]), 4)
)
QUAD_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
)
# One sum for each of the four lanes that share a row, [M, 4].
LANE_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _e4m3(x):
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,r,r,r,r",
        [x],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _locate(item, row_tiles, heads):
    """Batch, head and row tile of a work item; row tiles vary fastest, so that a head stays in L2."""
    return item // row_tiles // heads, item // row_tiles % heads, item % row_tiles


@gluon.jit
def _put(ring, place, value):
    """Write one number of a ring, by the producer's warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ring.index(place).store(gl.full([1], value, ring.dtype, layout))


@gluon.jit
def _get(ring, place):
    """Read one number of a ring, by a consumer."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(ring.index(place).load(layout), 0)


@gluon.jit
def _groups(list_ptr, tile, count, MASK_N: gl.constexpr):
    """The two groups of 64 keys in a tile of a list; an odd list of 64-key blocks repeats its last one."""
    if MASK_N == 128:
        first = gl.load(list_ptr + gl.maximum(tile, 0)) * 2
        second = first + 1
    else:
        first = gl.load(list_ptr + gl.maximum(tile * 2, 0))
        second = gl.load(list_ptr + gl.maximum(gl.minimum(tile * 2 + 1, count - 1), 0))
    return first, second


@gluon.jit
def _announce(rings, query_scale_ptr, slot, item, tiles, valid, start, row, groups):
    """Item, tiles, valid keys of the tile walked first, and the scales of both consumers' rows."""
    _, _, _, query_scales, _, facts, _ = rings
    _put(facts, slot * 3, item)
    _put(facts, slot * 3 + 1, tiles)
    _put(facts, slot * 3 + 2, valid)
    for half in gl.static_range(2):
        group = gl.minimum(row * 2 + half, groups - 1)
        _put(query_scales, slot * 2 + half, gl.load(query_scale_ptr + start + group))


@gluon.jit
def _load_tile(
    sources, rings, barriers, step, batch, kv_head, first, second, scale_a, scale_b,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one key and value tile as soon as both consumers have left its slots."""
    _, key_source, value_source = sources
    _, key_ring, value_ring, _, key_scales, _, _ = rings
    _, _, k_full, k_empty, v_full, v_empty, _ = barriers
    slot = step % STAGES
    phase = ((step // STAGES) & 1) ^ 1
    full = k_full.index(slot)
    mbarrier.wait(k_empty.index(slot), phase)
    _put(key_scales, slot * 2, scale_a)
    _put(key_scales, slot * 2 + 1, scale_b)
    mbarrier.expect(full, 128 * D)
    place_a = [batch, kv_head, first * 64, 0]
    place_b = [batch, kv_head, second * 64, 0]
    tma.async_copy_global_to_shared(key_source, place_a, full, key_ring.index(slot * 2))
    tma.async_copy_global_to_shared(key_source, place_b, full, key_ring.index(slot * 2 + 1))
    full = v_full.index(slot)
    mbarrier.wait(v_empty.index(slot), phase)
    mbarrier.expect(full, 128 * D)
    for part in gl.static_range(D // 64):  # boxes of 64 channels and 64 keys
        box = slot * (D // 32) + part * 2
        place_a = [batch, kv_head, part * 64, first * 64]
        place_b = [batch, kv_head, part * 64, second * 64]
        tma.async_copy_global_to_shared(value_source, place_a, full, value_ring.index(box))
        tma.async_copy_global_to_shared(value_source, place_b, full, value_ring.index(box + 1))


@gluon.jit
def _producer(
    sources, scales, lists, rings, barriers, counter_ptr, items, row_tiles, heads, group,
    query_length, key_length, D: gl.constexpr, STAGES: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """One warp: takes work items, copies their query tiles and the listed tiles, each list from its end."""
    query_source, _, _ = sources
    query_scale_ptr, key_scale_ptr = scales
    counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir = lists
    query_ring, _, _, _, _, facts, _ = rings
    q_full, q_empty, _, _, _, _, _ = barriers
    query_groups = (query_length + 63) // 64
    key_groups = (key_length + 63) // 64
    width: gl.constexpr = 128 // MASK_N
    step = 0
    work = 0
    item = gl.program_id(0)
    while item < items:
        batch, head, row = _locate(item, row_tiles, heads)
        kv_head = head // group
        count = gl.load(counts_ptr + batch * stride_cb + head * stride_ch + row)
        list_ptr = indices_ptr + batch.to(gl.int64) * stride_ib + head.to(gl.int64) * stride_ih
        list_ptr += row.to(gl.int64) * stride_ir
        tiles = (count + width - 1) // width
        first, second = _groups(list_ptr, tiles - 1, count, MASK_N)
        valid = key_length - first * 64
        if MASK_N == 64:  # the last block of an odd list is alone in its tile
            valid = gl.minimum(valid, 64)
            valid += gl.where(count % 2 == 0, gl.minimum(key_length - second * 64, 64), 0)
        slot = work % 2
        mbarrier.wait(q_empty.index(slot), ((work // 2) & 1) ^ 1)
        start = (batch * heads + head) * query_groups
        _announce(rings, query_scale_ptr, slot, item, tiles, valid, start, row, query_groups)
        mbarrier.expect(q_full.index(slot), 128 * D)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                query_source, [batch, head, row * 128 + half * 64, 0], q_full.index(slot),
                query_ring.index(slot * 2 + half),
            )  # fmt: skip
        work += 1

        # Entries are read two tiles ahead of their use, scales one.
        scale_ptr = key_scale_ptr + (batch * (heads // group) + kv_head) * key_groups
        next_first, next_second = _groups(list_ptr, tiles - 2, count, MASK_N)
        scale_a = gl.load(scale_ptr + first, mask=tiles > 0, other=0.0)
        scale_b = gl.load(scale_ptr + gl.minimum(second, key_groups - 1), mask=tiles > 0, other=0.0)
        for i in range(tiles):
            next_scale_a = gl.load(scale_ptr + next_first)
            next_scale_b = gl.load(scale_ptr + gl.minimum(next_second, key_groups - 1))
            later_first, later_second = _groups(list_ptr, tiles - 3 - i, count, MASK_N)
            _load_tile(sources, rings, barriers, step, batch, kv_head, first, second, scale_a, scale_b,
                       D, STAGES)  # fmt: skip
            step += 1
            first, second = next_first, next_second
            scale_a, scale_b = next_scale_a, next_scale_b
            next_first, next_second = later_first, later_second
        item = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    slot = work % 2
    mbarrier.wait(q_empty.index(slot), ((work // 2) & 1) ^ 1)
    _put(facts, slot * 3, -1)  # no more work
    _put(facts, slot * 3 + 1, 0)
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def _start_scores(query_tile, key_ring, slot, D: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D, element_bitwidth=8, rank=2)
    key_tile = key_ring.index(slot * 2)._reinterpret(gl.int8, [128, D], layout)
    zeros = gl.zeros([64, 128], gl.int32, SCORE_LAYOUT)
    return warpgroup_mma(query_tile, key_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_values(packed_a, packed_b, value_ring, box, acc, ADD: gl.constexpr):
    """PV of a tile and 64 channels, added to ``acc`` or from zero."""
    tile_a = value_ring.index(box).reshape([64, 64]).permute((1, 0))
    tile_b = value_ring.index(box + 1).reshape([64, 64]).permute((1, 0))
    acc = warpgroup_mma(packed_a, tile_a, acc, use_acc=ADD, is_async=True)
    return warpgroup_mma(packed_b, tile_b, acc, is_async=True)


@gluon.jit
def _factors(key_scales, slot, query_factor):
    """What turns integer scores of both groups of a tile into exponents of two."""
    return _get(key_scales, slot * 2) * query_factor, _get(key_scales, slot * 2 + 1) * query_factor


@gluon.jit
def _halves(scores):
    """Integer scores [M, N] as fp32 scores of the two groups, [M, 64] each."""
    return gl.split(scores.to(gl.float32).reshape([64, 2, 64]).permute((0, 2, 1)))


@gluon.jit
def _mask(scores, valid):
    columns = gl.arange(0, 64, gl.SliceLayout(0, scores.type.layout))
    return gl.where((columns < valid)[None, :], scores, float("-inf"))


@gluon.jit
def _new_peak(peak, a, b, factor_a, factor_b):
    top_a = gl.max(gl.max(a.reshape([64, 8, 4, 2]), 3), 1)  # [M, 4], of what a lane holds
    top_b = gl.max(gl.max(b.reshape([64, 8, 4, 2]), 3), 1)
    top = gl.max(gl.maximum(top_a * factor_a, top_b * factor_b), 1)
    return gl.maximum(peak, gl.convert_layout(top, ROWS, assert_trivial=True))


@gluon.jit
def _weights(scores, factor, shift):
    """448 times the softmax weights of 64 keys, before division by their sum, [M, 64]."""
    rows: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    shift = gl.convert_layout(shift, rows, assert_trivial=True)
    weights = _exp2(scores * factor - shift[:, None])
    return gl.convert_layout(weights, PART_LAYOUT, assert_trivial=True)


@gluon.jit
def _new_total(total, rescale, weights_a, weights_b):
    here = gl.sum(gl.sum(weights_a.reshape([64, 8, 4, 2]), 3), 1)  # [M, 4]
    here += gl.sum(gl.sum(weights_b.reshape([64, 8, 4, 2]), 3), 1)
    rescale = gl.convert_layout(rescale, gl.SliceLayout(1, LANE_LAYOUT), assert_trivial=True)
    return total * rescale[:, None] + gl.convert_layout(here, LANE_LAYOUT, assert_trivial=True)


@gluon.jit
def _pack(weights):
    """E4M3 weights of 64 keys in the order of :func:`interleave_tokens`."""
    weights = weights.reshape([64, 4, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 64])
    weights = gl.convert_layout(weights, QUAD_LAYOUT, assert_trivial=True)
    return gl.convert_layout(_e4m3(weights), WEIGHT_LAYOUT, assert_trivial=True)


@gluon.jit
def _scale_rows(acc, factor):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, PART_LAYOUT))[:, None]


@gluon.jit
def _await_turn(turn, zero, step, shift, HALF: gl.constexpr):
    """``shift``, once the other consumer has finished its weights.

    Reading a zero from memory ties the weights to the wait: ptxas would compute them before it.
    """
    mbarrier.wait(turn.index(HALF), (step & 1) ^ (1 - HALF))
    return shift + _get(zero, 0)


@gluon.jit
def _end_turn(turn, v_full, step, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Let the other consumer go on. The wait for this tile's value is a branch that weights cannot pass."""
    mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
    mbarrier.arrive(turn.index(1 - HALF))


@gluon.jit
def _walk_tiles(
    HALF: gl.constexpr, a, b, factor_a, factor_b, acc, peak, total, query_tile, query_factor,
    rings, barriers, step, tiles, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of a list, all but PV of the last tile, whose weights are returned.

    Scores of the next tile and PV of this one are issued together. Registers allow PV of 64 channels at a
    time: with D 128 the second half follows during the weights.
    """
    _, key_ring, value_ring, _, key_scales, _, zero = rings
    _, _, k_full, k_empty, v_full, v_empty, turn = barriers
    acc_1 = acc  # channels 64 to 127
    new_peak = _new_peak(peak, a, b, factor_a, factor_b)
    rescale = _exp2(peak - new_peak)
    peak = new_peak
    shift = _await_turn(turn, zero, step, peak - WEIGHT_LOG2, HALF)
    weights_a = _weights(a, factor_a, shift)
    weights_b = _weights(b, factor_b, shift)
    total = _new_total(total, rescale, weights_a, weights_b)
    _end_turn(turn, v_full, step, HALF, STAGES)
    for _ in range(tiles - 1):
        value_slot = step % STAGES
        value_phase = (step // STAGES) & 1
        step += 1
        slot = step % STAGES
        packed_a, packed_b = _pack(weights_a), _pack(weights_b)
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        pending = _start_scores(query_tile, key_ring, slot, D)
        factor_a, factor_b = _factors(key_scales, slot, query_factor)
        part = gl.zeros([64, 64], gl.float32, PART_LAYOUT)
        pending_part = _start_values(packed_a, packed_b, value_ring, value_slot * (D // 32), part, False)
        scores = warpgroup_mma_wait(2, deps=[pending])
        mbarrier.arrive(k_empty.index(slot))
        a, b = _halves(scores)
        new_peak = _new_peak(peak, a, b, factor_a, factor_b)
        new_rescale = _exp2(peak - new_peak)
        peak = new_peak
        shift = _await_turn(turn, zero, step, peak - WEIGHT_LOG2, HALF)
        weights_a = _weights(a, factor_a, shift)
        if D == 128:
            mbarrier.wait(v_full.index(value_slot), value_phase)  # passed long ago: a branch
            part, weights_a, b = warpgroup_mma_wait(0, deps=[pending_part, weights_a, b])
            acc = _scale_rows(acc, rescale) + part
            part = gl.zeros([64, 64], gl.float32, PART_LAYOUT)
            pending_part = _start_values(packed_a, packed_b, value_ring, value_slot * 4 + 2, part, False)
        weights_b = _weights(b, factor_b, shift)
        total = _new_total(total, new_rescale, weights_a, weights_b)
        _end_turn(turn, v_full, step, HALF, STAGES)
        part, weights_a, weights_b = warpgroup_mma_wait(0, deps=[pending_part, weights_a, weights_b])
        if D == 128:
            acc_1 = _scale_rows(acc_1, rescale) + part
        else:
            acc = _scale_rows(acc, rescale) + part
        rescale = new_rescale
        mbarrier.arrive(v_empty.index(value_slot))
    return _scale_rows(acc, rescale), _scale_rows(acc_1, rescale), peak, total, weights_a, weights_b, step


@gluon.jit
def _walk(
    HALF: gl.constexpr, scores, valid, factor_a, factor_b, query_tile, query_factor, rings, barriers,
    step, tiles, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All tiles of an item but PV of the last one; zeros where the item has none."""
    acc = gl.zeros([64, 64], gl.float32, PART_LAYOUT)
    acc_1 = acc  # channels 64 to 127
    weights_a, weights_b = acc, acc
    peak = gl.full([64], float("-inf"), gl.float32, ROWS)
    total = gl.zeros([64, 4], gl.float32, LANE_LAYOUT)
    if tiles > 0:
        a, b = _halves(scores)
        if valid < 128:
            a, b = _mask(a, valid), _mask(b, valid - 64)
        acc, acc_1, peak, total, weights_a, weights_b, step = _walk_tiles(
            HALF, a, b, factor_a, factor_b, acc, peak, total, query_tile, query_factor,
            rings, barriers, step, tiles, D, STAGES)  # fmt: skip
    return acc, acc_1, peak, total, weights_a, weights_b, step


@gluon.jit
def _store(acc, total, scale_ptr, output_ptr, stride_on, first, query_length):
    """Output of 64 channels."""
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, PART_LAYOUT))
    columns = gl.arange(0, 64, gl.SliceLayout(0, PART_LAYOUT))
    scale = gl.load(scale_ptr + columns)
    total = gl.convert_layout(total, gl.SliceLayout(1, PART_LAYOUT))[:, None]
    acc = acc * (1.0 / gl.where(total == 0.0, 1.0, total)) * scale[None, :]
    acc = gl.where(total == 0.0, 0.0, acc)
    offsets = rows.to(gl.int64)[:, None] * stride_on + columns[None, :]
    gl.store(output_ptr + offsets, acc.to(output_ptr.dtype.element_ty), mask=(rows < query_length)[:, None])


@gluon.jit
def _read_facts(rings, slot, scale_log2, HALF: gl.constexpr):
    """Item (-1 past the last one), its tiles, valid keys of the first, and the factor of this one's rows."""
    _, _, _, query_scales, _, facts, _ = rings
    query_factor = _get(query_scales, slot * 2 + HALF) * scale_log2
    return _get(facts, slot * 3), _get(facts, slot * 3 + 1), _get(facts, slot * 3 + 2), query_factor


@gluon.jit
def _store_lse(peak, total, lse_ptr, head, first, query_length):
    empty = total == 0.0
    lse = (peak - WEIGHT_LOG2 + _log2(gl.where(empty, 1.0, total))) * LN_2
    rows = first + gl.arange(0, 64, ROWS)
    lse = gl.where(empty, float("-inf"), lse)
    gl.store(lse_ptr + head.to(gl.int64) * query_length + rows, lse, mask=rows < query_length)


@gluon.jit
def _store_item(
    HALF: gl.constexpr, acc, acc_1, peak, total, value_scale_ptr, output_ptr, lse_ptr, output_strides, item,
    row_tiles, heads, group, query_length, D: gl.constexpr,
):  # fmt: skip
    stride_ob, stride_oh, stride_on = output_strides
    row_total = gl.convert_layout(gl.sum(total, 1), ROWS, assert_trivial=True)
    batch, head, row = _locate(item, row_tiles, heads)
    first = row * 128 + HALF * 64
    scale_ptr = value_scale_ptr + (batch * (heads // group) + head // group) * D
    base = output_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    _store(acc, row_total, scale_ptr, base, stride_on, first, query_length)
    if D == 128:
        _store(acc_1, row_total, scale_ptr + 64, base + 64, stride_on, first, query_length)
    _store_lse(peak, row_total, lse_ptr, item // row_tiles, first, query_length)


@gluon.jit
def _consumer(
    HALF: gl.constexpr, value_scale_ptr, output_ptr, lse_ptr, output_strides, rings, barriers,
    row_tiles, heads, group, query_length, scale_log2, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of rows ``64 * HALF`` to ``64 * HALF + 63`` of every query tile."""
    query_ring, key_ring, value_ring, _, key_scales, _, _ = rings
    q_full, q_empty, k_full, k_empty, _, v_empty, _ = barriers
    BOXES: gl.constexpr = D // 32
    step = 0
    work = 0
    mbarrier.wait(q_full.index(0), 0)
    item, tiles, valid, query_factor = _read_facts(rings, 0, scale_log2, HALF)
    mbarrier.wait(k_full.index(0), 0, pred=tiles > 0)
    query_tile = query_ring.index(HALF).reshape([64, D])
    pending = _start_scores(query_tile, key_ring, 0, D)
    factor_a, factor_b = _factors(key_scales, 0, query_factor)
    scores = warpgroup_mma_wait(0, deps=[pending])  # [M, N]
    mbarrier.arrive(k_empty.index(0), pred=tiles > 0)
    while item >= 0:
        query_slot = work % 2
        acc, acc_1, peak, total, weights_a, weights_b, step = _walk(
            HALF, scores, valid, factor_a, factor_b, query_tile, query_factor, rings, barriers, step, tiles,
            D, STAGES)  # fmt: skip
        mbarrier.arrive(q_empty.index(query_slot))

        # PV of the last tile, then QK of the next item's first one, which runs during the epilogue.
        # Without a tile to read, both compute on whatever lies there and nothing uses the result.
        work += 1
        query_slot = work % 2
        value_slot = step % STAGES
        packed_a, packed_b = _pack(weights_a), _pack(weights_b)
        pending_acc = _start_values(packed_a, packed_b, value_ring, value_slot * BOXES, acc, True)
        pending_acc_1 = pending_acc
        if D == 128:
            pending_acc_1 = _start_values(packed_a, packed_b, value_ring, value_slot * BOXES + 2, acc_1, True)
        step = gl.where(tiles > 0, step + 1, step)
        slot = step % STAGES
        mbarrier.wait(q_full.index(query_slot), (work // 2) & 1)
        next_item, next_tiles, valid, query_factor = _read_facts(rings, query_slot, scale_log2, HALF)
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1, pred=next_tiles > 0)
        query_tile = query_ring.index(query_slot * 2 + HALF).reshape([64, D])
        pending = _start_scores(query_tile, key_ring, slot, D)
        factor_a, factor_b = _factors(key_scales, slot, query_factor)
        acc, acc_1 = warpgroup_mma_wait(1, deps=[pending_acc, pending_acc_1])
        mbarrier.arrive(v_empty.index(value_slot), pred=tiles > 0)

        _store_item(HALF, acc, acc_1, peak, total, value_scale_ptr, output_ptr, lse_ptr, output_strides, item,
                    row_tiles, heads, group, query_length, D)  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[pending])
        mbarrier.arrive(k_empty.index(slot), pred=next_tiles > 0)
        item, tiles = next_item, next_tiles


@gluon.jit
def _new_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


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
    output_ptr,
    lse_ptr,
    counts_ptr,
    indices_ptr,
    counter_ptr,
    stride_cb,
    stride_ch,
    stride_ib,
    stride_ih,
    stride_ir,
    stride_ob,
    stride_oh,
    stride_on,
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
    query_scales = gl.allocate_shared_memory(gl.float32, [4, 1], numbers)
    key_scales = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1], numbers)
    facts = gl.allocate_shared_memory(gl.int32, [6, 1], numbers)
    zero = gl.allocate_shared_memory(gl.float32, [1, 1], numbers)
    zero.index(0).store(gl.full([1], 0.0, gl.float32, gl.BlockedLayout([1], [32], [4], [0])))
    # The producer arrives at "full" (with the bytes it asks for), both consumers at "empty", and each
    # consumer at the turn of the other.
    q_full, q_empty = _new_barriers(2, 1), _new_barriers(2, 2)
    k_full, k_empty = _new_barriers(STAGES, 1), _new_barriers(STAGES, 2)
    v_full, v_empty = _new_barriers(STAGES, 1), _new_barriers(STAGES, 2)
    turn = _new_barriers(2, 1)
    fence_async_shared()
    rings = (query_ring, key_ring, value_ring, query_scales, key_scales, facts, zero)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    lists = (counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir)
    strides = (stride_ob, stride_oh, stride_on)
    sources = (query_source, key_source, value_source)
    scales = (query_scale_ptr, key_scale_ptr)
    gl.warp_specialize(
        [
            (_consumer, (
                0, value_scale_ptr, output_ptr, lse_ptr, strides, rings, barriers, row_tiles, heads, group,
                query_length, scale_log2, D, STAGES)),
            (_consumer, (
                1, value_scale_ptr, output_ptr, lse_ptr, strides, rings, barriers, row_tiles, heads, group,
                query_length, scale_log2, D, STAGES)),
            (_producer, (
                sources, scales, lists, rings, barriers, counter_ptr, items, row_tiles, heads, group,
                query_length, key_length, D, STAGES, MASK_N)),
        ],
        [4, 1],  # warps of the second consumer and of the producer; the first one has the kernel's four
        [240, 24],  # their registers; the first consumer gets the rest, 240
    )  # fmt: skip
