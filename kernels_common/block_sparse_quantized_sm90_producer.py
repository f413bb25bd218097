"""The producer warp of the 8-bit Hopper kernel: takes work items and copies their tiles.

What consumers must know besides the tiles goes through small rings in shared memory, the notes: one number
each, or the scales of 64 channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels_common.block_sparse_gluon_parts import load_query, locate, put, put_end, put_item, ring_place

# Up to Triton 3.6 it is called thread_barrier.
_warp_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


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
def _announce(
    notes, query_scale_ptr, value_scale_ptr, slot, batch, head, row, tiles, valid, start, groups,
    D: gl.constexpr,
):  # fmt: skip
    """What consumers must know of an item, the scales of its value channels and both consumers' rows too."""
    query_scales, _, value_scales, facts, _ = notes
    put_item(facts, slot, batch, head, row, tiles, valid)
    columns = gl.arange(0, 64, gl.BlockedLayout([1], [32], [1], [0]))
    for part in gl.static_range(D // 64):
        scales = gl.load(value_scale_ptr + part * 64 + columns)
        value_scales.index(slot * 2 + part).store(scales)
    _warp_barrier()  # every lane wrote some of them, one lane tells that they are there
    for half in gl.static_range(2):
        group = gl.minimum(row * 2 + half, groups - 1)
        put(query_scales, slot * 2 + half, gl.load(query_scale_ptr + start + group))


@gluon.jit
def _load_tile(
    sources, rings, notes, barriers, step, batch, kv_head, first, second, scale_a, scale_b,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one key and value tile as soon as both consumers have left its slots.

    At head dimension 64 they leave a slot with the end of their turn at the tile after it.
    """
    _, key_source, value_source = sources
    _, key_ring, value_ring = rings
    _, key_scales, _, _, _ = notes
    _, _, k_full, k_empty, v_full, v_empty, turns = barriers
    slot, phase = ring_place(step, STAGES)
    full = k_full.index(slot)
    if D == 64:
        last, last_phase = ring_place(step - (STAGES - 1), STAGES)  # of the tile after the slot's last one
        mbarrier.wait(turns.index(last), last_phase)
        mbarrier.wait(turns.index(STAGES + last), last_phase)
    else:
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
    put(key_scales, slot * 2, scale_a)
    put(key_scales, slot * 2 + 1, scale_b)
    mbarrier.expect(full, 128 * D)
    place_a = [batch, kv_head, first * 64, 0]
    place_b = [batch, kv_head, second * 64, 0]
    tma.async_copy_global_to_shared(key_source, place_a, full, key_ring.index(slot * 2))
    tma.async_copy_global_to_shared(key_source, place_b, full, key_ring.index(slot * 2 + 1))
    full = v_full.index(slot)
    if D == 128:
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
    mbarrier.expect(full, 128 * D)
    for part in gl.static_range(D // 64):  # boxes of 64 channels and 64 keys
        box = slot * (D // 32) + part * 2
        place_a = [batch, kv_head, part * 64, first * 64]
        place_b = [batch, kv_head, part * 64, second * 64]
        tma.async_copy_global_to_shared(value_source, place_a, full, value_ring.index(box))
        tma.async_copy_global_to_shared(value_source, place_b, full, value_ring.index(box + 1))


@gluon.jit
def produce(
    sources, scales, lists, rings, notes, barriers, counter_ptr, items, row_tiles, heads, group,
    query_length, key_length, D: gl.constexpr, STAGES: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """One warp: takes work items, copies their query tiles and the listed tiles, each list from its end."""
    query_source, _, _ = sources
    query_scale_ptr, key_scale_ptr, value_scale_ptr = scales
    counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir = lists
    query_ring, _, _ = rings
    _, _, _, facts, _ = notes
    q_full, q_empty, _, _, _, _, _ = barriers
    query_groups = (query_length + 63) // 64
    key_groups = (key_length + 63) // 64
    width: gl.constexpr = 128 // MASK_N
    step = 0
    work = 0
    item = gl.program_id(0)
    while item < items:
        batch, head, row = locate(item, row_tiles, heads)
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
        slot, phase = ring_place(work, 2)
        mbarrier.wait(q_empty.index(slot), phase ^ 1)
        start = (batch * heads + head) * query_groups
        head_values = value_scale_ptr + (batch * (heads // group) + kv_head) * D
        _announce(notes, query_scale_ptr, head_values, slot, batch, head, row, tiles, valid, start,
                  query_groups, D)  # fmt: skip
        load_query(query_source, query_ring, q_full.index(slot), slot, batch, head, row)
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
            _load_tile(sources, rings, notes, barriers, step, batch, kv_head, first, second, scale_a, scale_b,
                       D, STAGES)  # fmt: skip
            step += 1
            first, second = next_first, next_second
            scale_a, scale_b = next_scale_a, next_scale_b
            next_first, next_second = later_first, later_second
        item = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    put_end(facts, q_full, q_empty, work, 2)
