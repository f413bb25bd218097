"""How consumers of the 8-bit Hopper kernel walk over the tiles of a list, by head dimension.

Both do online softmax over all tiles and PV of all but the last one, whose weights they return. ptxas moves
waits for matrix products up as far as a branch; waits for a barrier that was passed before are such branches.

Shape letters: M = 64 rows of a consumer, N = 128 keys of a tile in two groups of 64, D head dimension.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from kernels_common.block_sparse_gluon_parts import exp2, get, ring_place
from kernels_common.block_sparse_quantized_sm90_tiles import (
    PART_LAYOUT,
    WEIGHT_LOG2,
    halves,
    new_peak_of,
    new_total_of,
    pack,
    scale_rows,
    score_factors,
    softmax_weights,
    start_scores,
    start_values,
)


@gluon.jit
def _await_turn(turns, zero, step, shift, HALF: gl.constexpr, STAGES: gl.constexpr):
    """``shift``, once the other consumer has finished its weights.

    Consumer 0 goes first at every tile. Reading a zero from memory ties the weights to the wait: ptxas would
    compute them before it.
    """
    slot, phase = ring_place(step - 1 if HALF == 0 else step, STAGES)
    mbarrier.wait(turns.index((1 - HALF) * STAGES + slot), phase)
    return shift + get(zero, 0)


@gluon.jit
def walk_in_turns(
    HALF: gl.constexpr, a, b, factor_a, factor_b, acc, peak, total, query_tile, query_factor,
    rings, notes, barriers, step, tiles, STAGES: gl.constexpr,
):  # fmt: skip
    """D 64, where the exponentials of a tile take longer than its products: consumers take turns at them.

    While one computes weights, the other has its products, conversions and maxima done. Scores of the next
    tile and PV of this one are issued together. PV has ended when a turn does, so the end of a turn frees the
    slots of the tile before as well: with a barrier for each slot, one arrival per tile tells all. (The
    compiler puts a barrier of the warpgroup before every arrival, and one between it and the next wait.)
    """
    _, key_ring, value_ring = rings
    _, key_scales, _, _, zero = notes
    _, _, k_full, _, v_full, _, turns = barriers
    new_peak = new_peak_of(peak, a, b, factor_a, factor_b)
    rescale = exp2(peak - new_peak)
    peak = new_peak
    shift = _await_turn(turns, zero, step, peak - WEIGHT_LOG2, HALF, STAGES)
    weights_a = softmax_weights(a, factor_a, shift)
    weights_b = softmax_weights(b, factor_b, shift)
    total = new_total_of(total, rescale, weights_a, weights_b)
    slot, phase = ring_place(step, STAGES)
    mbarrier.wait(v_full.index(slot), phase)
    mbarrier.arrive(turns.index(HALF * STAGES + slot))
    for _ in range(tiles - 1):
        value_slot = ring_place(step, STAGES)[0]
        step += 1
        slot, phase = ring_place(step, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        pending = start_scores(query_tile, key_ring, slot, 64)
        packed_a, packed_b = pack(weights_a), pack(weights_b)
        factor_a, factor_b = score_factors(key_scales, slot, query_factor)
        part = gl.zeros([64, 64], gl.float32, PART_LAYOUT)
        pending_part = start_values(packed_a, packed_b, value_ring, value_slot * 2, part, False)
        scores = warpgroup_mma_wait(2, deps=[pending])
        a, b = halves(scores)
        new_peak = new_peak_of(peak, a, b, factor_a, factor_b)
        new_rescale = exp2(peak - new_peak)
        peak = new_peak
        shift = _await_turn(turns, zero, step, peak - WEIGHT_LOG2, HALF, STAGES)
        weights_a = softmax_weights(a, factor_a, shift)
        weights_b = softmax_weights(b, factor_b, shift)
        total = new_total_of(total, new_rescale, weights_a, weights_b)
        mbarrier.wait(v_full.index(slot), phase)  # a branch that weights cannot pass, too
        part, weights_a, weights_b = warpgroup_mma_wait(0, deps=[pending_part, weights_a, weights_b])
        mbarrier.arrive(turns.index(HALF * STAGES + slot))
        acc = scale_rows(acc, rescale) + part
        rescale = new_rescale
    return scale_rows(acc, rescale), peak, total, weights_a, weights_b, step


@gluon.jit
def walk_ahead(
    a, b, factor_a, factor_b, acc, peak, total, query_tile, query_factor,
    rings, notes, barriers, step, tiles, STAGES: gl.constexpr,
):  # fmt: skip
    """D 128: scores are computed one tile ahead, during the weights of the tile before them.

    They are converted while the second group's weights keep the special-function unit busy, and their maxima
    are taken during PV. ``acc`` starts channels 0 to 63 and 64 to 127 alike.
    """
    _, key_ring, value_ring = rings
    _, key_scales, _, _, _ = notes
    _, _, k_full, k_empty, v_full, v_empty, _ = barriers
    acc_1 = acc
    new_peak = new_peak_of(peak, a, b, factor_a, factor_b)
    rescale = exp2(peak - new_peak)
    peak = new_peak
    for _ in range(tiles - 1):
        value_slot, value_phase = ring_place(step, STAGES)
        slot, phase = ring_place(step + 1, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        pending = start_scores(query_tile, key_ring, slot, 128)
        next_a, next_b = score_factors(key_scales, slot, query_factor)
        weights_a = softmax_weights(a, factor_a, peak - WEIGHT_LOG2)
        mbarrier.wait(k_full.index(slot), phase)  # a branch
        scores, weights_a, b = warpgroup_mma_wait(0, deps=[pending, weights_a, b])
        a, new_b = halves(scores)
        weights_b = softmax_weights(b, factor_b, peak - WEIGHT_LOG2)
        b = new_b
        factor_a, factor_b = next_a, next_b
        total = new_total_of(total, rescale, weights_a, weights_b)
        mbarrier.wait(v_full.index(value_slot), value_phase)
        packed_a, packed_b = pack(weights_a), pack(weights_b)
        part = gl.zeros([64, 64], gl.float32, PART_LAYOUT)
        pending_part = start_values(packed_a, packed_b, value_ring, value_slot * 4, part, False)
        pending_part_1 = start_values(packed_a, packed_b, value_ring, value_slot * 4 + 2, part, False)
        mbarrier.arrive(k_empty.index(slot))
        new_peak = new_peak_of(peak, a, b, factor_a, factor_b)
        new_rescale = exp2(peak - new_peak)
        mbarrier.wait(v_full.index(value_slot), value_phase)  # a branch
        part, part_1, new_rescale = warpgroup_mma_wait(0, deps=[pending_part, pending_part_1, new_rescale])
        acc_1 = scale_rows(acc_1, rescale) + part_1
        acc = scale_rows(acc, rescale) + part
        mbarrier.arrive(v_empty.index(value_slot))
        rescale = new_rescale
        peak = new_peak
        step += 1
    weights_a = softmax_weights(a, factor_a, peak - WEIGHT_LOG2)
    weights_b = softmax_weights(b, factor_b, peak - WEIGHT_LOG2)
    total = new_total_of(total, rescale, weights_a, weights_b)
    value_slot, value_phase = ring_place(step, STAGES)
    mbarrier.wait(v_full.index(value_slot), value_phase)
    return scale_rows(acc, rescale), scale_rows(acc_1, rescale), peak, total, weights_a, weights_b, step
