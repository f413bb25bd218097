"""The Hopper kernel for head dimension 64: two teams of a TMA producer warp and two consumer warpgroups.

At this head dimension the softmax takes as long as the matrix products, and what hides it is more warps: a
program holds two teams that share nothing but the multiprocessor, each walking 128-row query tiles of its
own as the kernel for head dimension 128 does. Tiles of 64 keys keep four consumers in the register file. A
consumer issues PV of one tile and QK of the next together and waits for both; the others compute meanwhile.
Lists are walked from their end: only the last listed block can reach past the keys.

Shape letters: M = 64 rows of a consumer, N = 64 keys of a tile, D = 64 head dimension.
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

from kernels_common.block_sparse_gluon_parts import (
    exp2,
    get_item,
    load_query,
    locate,
    new_barriers,
    new_facts,
    put_end,
    put_item,
    raised,
    read_list,
    ring_place,
    scaled,
    sized,
    sizes_ring,
    store_rows,
)

TILE_N = 64
STAGES = 4  # key and value tiles in flight
QUERY_STAGES = 2
TEAMS = 2
CONSUMER_REGISTERS = 112
PRODUCER_REGISTERS = 32


@gluon.jit
def _plan(count, list_ptr, key_length, MASK_N: gl.constexpr, N: gl.constexpr):
    """Key tiles of a list, and valid keys of its last tile; a last block may have less tiles than others."""
    last = gl.load(list_ptr + gl.maximum(count - 1, 0))
    valid = gl.minimum(key_length - last * MASK_N, MASK_N)
    used = gl.cdiv(valid, N)
    tiles = (count - 1) * (MASK_N // N) + used
    return gl.where(count > 0, tiles, 0), valid - (used - 1) * N


@gluon.jit
def _producer(
    TEAM: gl.constexpr, TEAMS: gl.constexpr, sources, lists, memory, sizes, counter_ptr, items, row_tiles,
    heads, group, key_length,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, MASK_N: gl.constexpr,
    SIZES: gl.constexpr,
):  # fmt: skip
    """One warp: takes work items, copies query tiles and the listed key and value tiles from a list's end."""
    query_source, key_source, value_source, sizes_source = sources
    query_ring, key_ring, value_ring, facts, q_full, q_empty, k_full, v_full, kv_empty = memory
    SPLIT: gl.constexpr = MASK_N // N
    step = 0
    work = 0
    item = gl.program_id(0) * TEAMS + TEAM
    while item < items:
        batch, head, row = locate(item, row_tiles, heads)
        kv_head = head // group
        count, list_ptr = read_list(item, lists, row_tiles, heads)
        tiles, valid = _plan(count, list_ptr, key_length, MASK_N, N)
        slot, phase = ring_place(work, Q_STAGES)
        mbarrier.wait(q_empty.index(slot), phase ^ 1)
        put_item(facts, slot, batch, head, row, tiles, valid)
        load_query(query_source, query_ring, q_full.index(slot), slot, batch, head, row)
        work += 1

        position = tiles - 1
        # Entries are read one tile ahead of their use.
        block = gl.load(list_ptr + gl.maximum(position, 0) // SPLIT)
        for _ in range(tiles):
            start = block * MASK_N + position % SPLIT * N
            position -= 1
            block = gl.load(list_ptr + gl.maximum(position, 0) // SPLIT)
            slot, phase = ring_place(step, STAGES)
            mbarrier.wait(kv_empty.index(slot), phase ^ 1)
            place = [batch, kv_head, start, 0]
            mbarrier.expect(k_full.index(slot), N * D * 2 + N * 4 * SIZES)
            tma.async_copy_global_to_shared(key_source, place, k_full.index(slot), key_ring.index(slot))
            if SIZES:
                size_place = [batch, kv_head, 0, start]
                tma.async_copy_global_to_shared(
                    sizes_source, size_place, k_full.index(slot), sizes.index(slot)
                )
            mbarrier.expect(v_full.index(slot), N * D * 2)
            tma.async_copy_global_to_shared(value_source, place, v_full.index(slot), value_ring.index(slot))
            step += 1
        item = gl.num_programs(0) * TEAMS + gl.atomic_add(counter_ptr, 1)
    put_end(facts, q_full, q_empty, work, Q_STAGES)


@gluon.jit
def _start_scores(query_tile, key_ring, slot, D: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    zeros = gl.zeros([64, N], gl.float32, LAYOUT)
    key_tile = key_ring.index(slot).reshape([N, D]).permute((1, 0))
    return warpgroup_mma(query_tile, key_tile, zeros, use_acc=False, is_async=True)


@gluon.jit
def _fold(tile):
    """Maximum of the left and the right half of a tile's columns."""
    left, right = tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute((0, 2, 1)).split()
    return gl.maximum(left, right)


@gluon.jit
def _softmax(
    scores, peak, total, scale_log2, sizes, slot, N: gl.constexpr, dtype: gl.constexpr,
    S_LAYOUT: gl.constexpr, T_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """One online step: 16-bit weights [M, N], new peak [M], new total [M, 4], factor on older sums [M].

    Folding shortens the chain of maxima. Of the total every thread of a row keeps its own part.
    """
    highest = gl.convert_layout(gl.max(_fold(_fold(_fold(scores))), 1), gl.SliceLayout(1, S_LAYOUT))
    new_peak, rescale = raised(peak, highest * scale_log2)
    weights = exp2(scores * scale_log2 - new_peak[:, None])
    counted = sized(weights, sizes, slot, N, S_LAYOUT, SIZES)
    part = gl.sum(gl.sum(counted.reshape([64, N // 8, 4, 2]), 1), 2)
    factor = gl.convert_layout(rescale, gl.SliceLayout(1, T_LAYOUT), assert_trivial=True)
    total = total * factor[:, None] + gl.convert_layout(part, T_LAYOUT, assert_trivial=True)
    return gl.convert_layout(weights.to(dtype), P_LAYOUT), new_peak, total, rescale


@gluon.jit
def _walk(
    weights, acc, peak, total, query_tile, memory, sizes, step, tiles, scale_log2,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr, T_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """PV of a tile and the softmax of the next one, ``tiles`` times; the weights of the last are returned."""
    _, key_ring, value_ring, _, _, _, k_full, v_full, kv_empty = memory
    dtype: gl.constexpr = key_ring.dtype
    for _ in range(tiles):
        value_slot, phase = ring_place(step, STAGES)
        mbarrier.wait(v_full.index(value_slot), phase)
        value_tile = value_ring.index(value_slot).reshape([N, D])
        pending_acc = warpgroup_mma(weights, value_tile, acc, is_async=True)
        step += 1
        slot, phase = ring_place(step, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        pending = _start_scores(query_tile, key_ring, slot, D, N, S_LAYOUT)
        acc, scores = warpgroup_mma_wait(0, deps=[pending_acc, pending])
        mbarrier.arrive(kv_empty.index(value_slot))
        weights, peak, total, rescale = _softmax(
            scores, peak, total, scale_log2, sizes, slot, N, dtype, S_LAYOUT, T_LAYOUT, P_LAYOUT, SIZES
        )
        acc = scaled(acc, gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT)))
    return weights, acc, peak, total, step


@gluon.jit
def _consumer(
    HALF: gl.constexpr, output, out_ring, lse_ptr, memory, sizes, heads, query_length, sized_tiles,
    scale_log2,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of rows ``64 * HALF`` to ``64 * HALF + 63`` of its team's query tiles."""
    query_ring, key_ring, value_ring, facts, q_full, q_empty, k_full, v_full, kv_empty = memory
    dtype: gl.constexpr = key_ring.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    T_LAYOUT: gl.constexpr = gl.DistributedLinearLayout(  # rows as in S_LAYOUT, a column per thread of a row
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    step = 0
    work = 0
    mbarrier.wait(q_full.index(0), 0)
    batch, head, row, tiles, valid = get_item(facts, 0)
    while batch >= 0:
        query_slot = ring_place(work, Q_STAGES)[0]
        query_tile = query_ring.index(query_slot * 2 + HALF).reshape([64, D])
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        peak = gl.full([64], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([64, 4], gl.float32, T_LAYOUT)
        if tiles > 0:
            slot, phase = ring_place(step, STAGES)
            mbarrier.wait(k_full.index(slot), phase)
            pending = _start_scores(query_tile, key_ring, slot, D, N, S_LAYOUT)
            scores = warpgroup_mma_wait(0, deps=[pending])  # [M, N]
            if valid < N:
                columns = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
                scores = gl.where((columns < valid)[None, :], scores, float("-inf"))
            weights, peak, total, _rescale = _softmax(
                scores, peak, total, scale_log2, sizes, slot, N, dtype, S_LAYOUT, T_LAYOUT, P_LAYOUT, SIZES
            )
            # Keys with sizes stand at the start of a list and come last.
            with_sizes = gl.minimum(sized_tiles, tiles - 1) if SIZES else 0
            plain = tiles - 1 - with_sizes
            weights, acc, peak, total, step = _walk(
                weights, acc, peak, total, query_tile, memory, sizes, step, plain, scale_log2,
                D, N, STAGES, S_LAYOUT, T_LAYOUT, O_LAYOUT, P_LAYOUT, False)  # fmt: skip
            if SIZES:
                weights, acc, peak, total, step = _walk(
                    weights, acc, peak, total, query_tile, memory, sizes, step, with_sizes, scale_log2,
                    D, N, STAGES, S_LAYOUT, T_LAYOUT, O_LAYOUT, P_LAYOUT, True)  # fmt: skip
            value_slot, phase = ring_place(step, STAGES)
            mbarrier.wait(v_full.index(value_slot), phase)
            value_tile = value_ring.index(value_slot).reshape([N, D])
            pending_acc = warpgroup_mma(weights, value_tile, acc, is_async=True)
            step += 1
            acc = warpgroup_mma_wait(0, deps=[pending_acc])
            mbarrier.arrive(kv_empty.index(value_slot))
        mbarrier.arrive(q_empty.index(query_slot))
        row_total = gl.convert_layout(gl.sum(total, 1), S_ROWS)
        store_rows(acc, peak, row_total, output, out_ring.index(HALF), lse_ptr, batch, head, row, heads,
                   query_length, HALF, S_LAYOUT, O_LAYOUT)  # fmt: skip
        work += 1
        query_slot, phase = ring_place(work, Q_STAGES)
        mbarrier.wait(q_full.index(query_slot), phase)
        batch, head, row, tiles, valid = get_item(facts, query_slot)
    tma.store_wait(0)


@gluon.jit
def _new_memory(
    sources, D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr
):  # fmt: skip
    """Rings and barriers of a team. The producer arrives at "full" barriers, both consumers at "empty"."""
    query_source, key_source, value_source, _ = sources
    dtype: gl.constexpr = query_source.dtype
    query_ring = gl.allocate_shared_memory(dtype, [Q_STAGES * 2, 1, 1, 64, D], query_source.layout)
    key_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], key_source.layout)
    value_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], value_source.layout)
    q_full, q_empty = new_barriers(Q_STAGES, 1), new_barriers(Q_STAGES, 2)
    k_full, v_full, kv_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    facts = new_facts(Q_STAGES)
    return query_ring, key_ring, value_ring, facts, q_full, q_empty, k_full, v_full, kv_empty


# Lengths and strides of lists change with every size; specialising on them would recompile.
@gluon.jit(
    do_not_specialize=[
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir",
        "items", "row_tiles", "heads", "group", "query_length", "key_length", "sized_tiles", "scale_log2",
    ]
)  # fmt: skip
def block_sparse_fwd_kernel_sm90_64(
    query_source,
    key_source,
    value_source,
    sizes_source,
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
    sized_tiles,
    scale_log2,
    D: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    MASK_N: gl.constexpr,
    SIZES: gl.constexpr,
    C_REGISTERS: gl.constexpr,
    P_REGISTERS: gl.constexpr,
):
    """Team t of program p computes work item ``2 * p + t`` first, then whatever the counter gives."""
    sources = (query_source, key_source, value_source, sizes_source)
    lists = (counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir)
    memory_0 = _new_memory(sources, D, N, STAGES, Q_STAGES)
    memory_1 = _new_memory(sources, D, N, STAGES, Q_STAGES)
    sizes_0 = sizes_ring(sizes_source, memory_0[1], STAGES, SIZES)
    sizes_1 = sizes_ring(sizes_source, memory_1[1], STAGES, SIZES)
    out_ring_0 = gl.allocate_shared_memory(output.dtype, [2, 1, 1, 64, D], output.layout)
    out_ring_1 = gl.allocate_shared_memory(output.dtype, [2, 1, 1, 64, D], output.layout)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                0, output, out_ring_0, lse_ptr, memory_0, sizes_0, heads, query_length, sized_tiles,
                scale_log2, D, N, STAGES, Q_STAGES, SIZES)),
            (_consumer, (
                1, output, out_ring_0, lse_ptr, memory_0, sizes_0, heads, query_length, sized_tiles,
                scale_log2, D, N, STAGES, Q_STAGES, SIZES)),
            (_consumer, (
                0, output, out_ring_1, lse_ptr, memory_1, sizes_1, heads, query_length, sized_tiles,
                scale_log2, D, N, STAGES, Q_STAGES, SIZES)),
            (_consumer, (
                1, output, out_ring_1, lse_ptr, memory_1, sizes_1, heads, query_length, sized_tiles,
                scale_log2, D, N, STAGES, Q_STAGES, SIZES)),
            (_producer, (
                0, 2, sources, lists, memory_0, sizes_0, counter_ptr, items, row_tiles, heads, group,
                key_length, D, N, STAGES, Q_STAGES, MASK_N, SIZES)),
            (_producer, (
                1, 2, sources, lists, memory_1, sizes_1, counter_ptr, items, row_tiles, heads, group,
                key_length, D, N, STAGES, Q_STAGES, MASK_N, SIZES)),
        ],
        [4, 4, 4, 1, 1],  # warps of the other consumers and of the producers
        [C_REGISTERS, C_REGISTERS, C_REGISTERS, P_REGISTERS, P_REGISTERS],
    )  # fmt: skip
