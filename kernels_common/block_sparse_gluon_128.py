"""The Hopper kernel for head dimension 128: one TMA producer warp and two consumer warpgroups.

Persistent programs walk 128-row query tiles. The producer follows the index list and fills rings of key
and value tiles; each consumer takes 64 of the 128 rows, so a tile is read from L2 once per 128 rows.
Inside a consumer, QK of the next tile and PV of this one are issued together and the softmax runs during
PV (FlashAttention-3, arXiv 2407.08608). QK of the next query tile runs during the epilogue. Lists are
walked from their end: only the last listed block can reach past the keys, so one tile per list is masked.

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

TILE_N = 128
STAGES = 2  # key and value tiles in flight
QUERY_STAGES = 2
SIZE_STAGES = gl.constexpr(4)  # more: a slot of keys is free again before the softmax has read their sizes


@gluon.jit
def _plan(count, list_ptr, key_length, MASK_N: gl.constexpr, N: gl.constexpr):
    """Key tiles of a list, and valid keys of the tile walked first."""
    valid = key_length - gl.load(list_ptr + gl.maximum(count - 1, 0)) * MASK_N
    tiles = count
    if MASK_N < N:  # two blocks make a tile; the last block of an odd list is alone in its tile
        tiles = (count + 1) // 2
        valid = gl.minimum(valid, MASK_N) + gl.where(count % 2 == 0, MASK_N, 0)
    return tiles, valid


@gluon.jit
def _load_tile(source, ring, full, empty, step, batch, kv_head, start_a, start_b,
               D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr,
               MORE: gl.constexpr):  # fmt: skip
    """Start the copy of one key or value tile as soon as both consumers have left its slot.

    ``MORE`` bytes are to arrive beside those of the tile.
    """
    slot, phase = ring_place(step, STAGES)
    barrier = full.index(slot)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(barrier, N * D * 2 + MORE)
    if PAIRED:  # boxes of 64 keys and 64 columns, in the memory order of a [N, D] tile
        for c in gl.static_range(D // 64):
            box = (slot * (D // 64) + c) * 2
            place_a = [batch, kv_head, start_a, c * 64]
            place_b = [batch, kv_head, start_b, c * 64]
            tma.async_copy_global_to_shared(source, place_a, barrier, ring.index(box))
            tma.async_copy_global_to_shared(source, place_b, barrier, ring.index(box + 1))
    else:
        tma.async_copy_global_to_shared(source, [batch, kv_head, start_a, 0], barrier, ring.index(slot))


@gluon.jit
def _load_sizes(source, ring, full, step, batch, head, start_a, start_b,
                STAGES: gl.constexpr, PAIRED: gl.constexpr):  # fmt: skip
    """Start the copy of the sizes of a key tile, once that of the tile has begun."""
    barrier = full.index(ring_place(step, STAGES)[0])
    box = ring_place(step, SIZE_STAGES)[0] * (1 + PAIRED)
    tma.async_copy_global_to_shared(source, [batch, head, 0, start_a], barrier, ring.index(box))
    if PAIRED:
        tma.async_copy_global_to_shared(source, [batch, head, 0, start_b], barrier, ring.index(box + 1))


@gluon.jit
def _producer(
    sources, lists, rings, sizes, facts, barriers, counter_ptr, items, row_tiles, heads, group,
    key_length,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, MASK_N: gl.constexpr,
    SIZES: gl.constexpr,
):  # fmt: skip
    """One warp: takes work items, copies query tiles and the listed key and value tiles from a list's end."""
    query_source, key_source, value_source, sizes_source = sources
    query_ring, key_ring, value_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    PAIRED: gl.constexpr = MASK_N < N
    step = 0
    work = 0
    item = gl.program_id(0)
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

        width: gl.constexpr = 2 if PAIRED else 1
        position = (tiles - 1) * width  # of the first block of a tile
        # Entries are read one tile ahead of their use.
        block_a = gl.load(list_ptr + gl.maximum(position, 0))
        block_b = gl.load(list_ptr + gl.maximum(count - 1, 0))
        for _ in range(tiles):
            start_a = block_a * MASK_N
            start_b = block_b * MASK_N
            position -= width
            block_a = gl.load(list_ptr + gl.maximum(position, 0))
            if PAIRED:
                block_b = gl.load(list_ptr + gl.maximum(position + 1, 0))
            _load_tile(key_source, key_ring, k_full, k_empty, step, batch, kv_head, start_a, start_b,
                       D, N, STAGES, PAIRED, N * 4 * SIZES)  # fmt: skip
            if SIZES:
                _load_sizes(sizes_source, sizes, k_full, step, batch, kv_head, start_a, start_b,
                            STAGES, PAIRED)  # fmt: skip
            _load_tile(value_source, value_ring, v_full, v_empty, step, batch, kv_head, start_a, start_b,
                       D, N, STAGES, PAIRED, 0)  # fmt: skip
            step += 1
        item = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    put_end(facts, q_full, q_empty, work, Q_STAGES)


@gluon.jit
def _tile(ring, slot, D: gl.constexpr, N: gl.constexpr, PAIRED: gl.constexpr):
    """Tile ``slot`` of a key or value ring, ``[N, D]``."""
    if PAIRED:
        layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        tile = ring.index(slot * (D // 32))._reinterpret(ring.dtype, [N, D], layout)
    else:
        tile = ring.index(slot).reshape([N, D])
    return tile


@gluon.jit
def _start_scores(query_tile, key_tile, LAYOUT: gl.constexpr, N: gl.constexpr):
    zeros = gl.zeros([64, N], gl.float32, LAYOUT)
    return warpgroup_mma(query_tile, key_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _softmax(
    scores, peak, total, scale_log2, sizes, step,
    N: gl.constexpr, PAIRED: gl.constexpr, S_LAYOUT: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """One online step: weights [M, N], new peak and total [M], factor on what was summed before [M]."""
    new_peak, rescale = raised(peak, gl.max(scores, 1) * scale_log2)
    weights = exp2(scores * scale_log2 - new_peak[:, None])
    box = ring_place(step, SIZE_STAGES)[0] * (1 + PAIRED)
    counted = sized(weights, sizes, box, N, S_LAYOUT, SIZES)
    return weights, new_peak, total * rescale + gl.sum(counted, 1), rescale


@gluon.jit
def _walk(
    weights_16, acc, peak, total, query_tile, rings, sizes, barriers, step, tiles, scale_log2,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """PV of a tile and the softmax of the next one, ``tiles`` times; the weights of the last are returned."""
    _, key_ring, value_ring = rings
    _, _, k_full, k_empty, v_full, v_empty = barriers
    for _ in range(tiles):
        value_slot, value_phase = ring_place(step, STAGES)
        step += 1
        slot, phase = ring_place(step, STAGES)
        mbarrier.wait(k_full.index(slot), phase)
        pending = _start_scores(query_tile, _tile(key_ring, slot, D, N, PAIRED), S_LAYOUT, N)
        mbarrier.wait(v_full.index(value_slot), value_phase)
        value_tile = _tile(value_ring, value_slot, D, N, PAIRED)
        pending_acc = warpgroup_mma(weights_16, value_tile, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[pending])
        mbarrier.arrive(k_empty.index(slot))
        weights, peak, total, rescale = _softmax(
            scores, peak, total, scale_log2, sizes, step, N, PAIRED, S_LAYOUT, SIZES
        )
        # Passed long ago. Without a branch here ptxas waits for PV before the softmax.
        mbarrier.wait(v_full.index(value_slot), value_phase)
        acc, weights = warpgroup_mma_wait(0, deps=[pending_acc, weights])
        mbarrier.arrive(v_empty.index(value_slot))
        weights_16 = gl.convert_layout(weights.to(key_ring.dtype), P_LAYOUT)
        acc = scaled(acc, gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT)))
    return weights_16, acc, peak, total, step


@gluon.jit
def _consumer(  # noqa: PLR0915 (compiled code)
    HALF: gl.constexpr, output, out_ring, lse_ptr, rings, sizes, facts, barriers, heads, query_length,
    sized_tiles, scale_log2,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, PAIRED: gl.constexpr,
    SIZES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of rows ``64 * HALF`` to ``64 * HALF + 63`` of every query tile."""
    query_ring, key_ring, value_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    step = 0
    work = 0
    mbarrier.wait(q_full.index(0), 0)
    batch, head, row, tiles, valid = get_item(facts, 0)
    mbarrier.wait(k_full.index(0), 0, pred=tiles > 0)
    query_tile = query_ring.index(HALF).reshape([64, D])
    pending = _start_scores(query_tile, _tile(key_ring, 0, D, N, PAIRED), S_LAYOUT, N)
    scores = warpgroup_mma_wait(0, deps=[pending])  # [M, N]
    mbarrier.arrive(k_empty.index(0), pred=tiles > 0)
    while batch >= 0:
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        peak = gl.full([64], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([64], gl.float32, S_ROWS)
        weights_16 = gl.zeros([64, N], key_ring.dtype, P_LAYOUT)
        if tiles > 0:
            if valid < N:
                columns = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
                scores = gl.where((columns < valid)[None, :], scores, float("-inf"))
            weights, peak, total, _rescale = _softmax(
                scores, peak, total, scale_log2, sizes, step, N, PAIRED, S_LAYOUT, SIZES
            )
            weights_16 = gl.convert_layout(weights.to(key_ring.dtype), P_LAYOUT)
            # Keys with sizes stand at the start of a list and come last.
            with_sizes = gl.minimum(sized_tiles, tiles - 1) if SIZES else 0
            plain = tiles - 1 - with_sizes
            weights_16, acc, peak, total, step = _walk(
                weights_16, acc, peak, total, query_tile, rings, sizes, barriers, step, plain,
                scale_log2, D, N, STAGES, PAIRED, S_LAYOUT, O_LAYOUT, P_LAYOUT, False)  # fmt: skip
            if SIZES:
                weights_16, acc, peak, total, step = _walk(
                    weights_16, acc, peak, total, query_tile, rings, sizes, barriers, step, with_sizes,
                    scale_log2, D, N, STAGES, PAIRED, S_LAYOUT, O_LAYOUT, P_LAYOUT, True)  # fmt: skip
        query_slot = ring_place(work, Q_STAGES)[0]
        mbarrier.arrive(q_empty.index(query_slot))

        # PV of the last tile, then QK of the next item's first one, which runs during the epilogue.
        # Without a tile to read, both compute on whatever lies there and nothing uses the result.
        work += 1
        value_slot, phase = ring_place(step, STAGES)
        mbarrier.wait(v_full.index(value_slot), phase, pred=tiles > 0)
        value_tile = _tile(value_ring, value_slot, D, N, PAIRED)
        pending_acc = warpgroup_mma(weights_16, value_tile, acc, is_async=True)
        step = gl.where(tiles > 0, step + 1, step)
        slot, key_phase = ring_place(step, STAGES)
        query_slot, phase = ring_place(work, Q_STAGES)
        mbarrier.wait(q_full.index(query_slot), phase)
        next_batch, next_head, next_row, next_tiles, valid = get_item(facts, query_slot)
        mbarrier.wait(k_full.index(slot), key_phase, pred=next_tiles > 0)
        query_tile = query_ring.index(query_slot * 2 + HALF).reshape([64, D])
        pending = _start_scores(query_tile, _tile(key_ring, slot, D, N, PAIRED), S_LAYOUT, N)
        acc = warpgroup_mma_wait(1, deps=[pending_acc])
        mbarrier.arrive(v_empty.index(value_slot), pred=tiles > 0)
        store_rows(acc, peak, total, output, out_ring.index(HALF), lse_ptr, batch, head, row, heads,
                   query_length, HALF, S_LAYOUT, O_LAYOUT)  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[pending])
        mbarrier.arrive(k_empty.index(slot), pred=next_tiles > 0)
        batch, head, row, tiles = next_batch, next_head, next_row, next_tiles
    tma.store_wait(0)


# Lengths and strides of lists change with every size; specialising on them would recompile.
@gluon.jit(
    do_not_specialize=[
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir",
        "items", "row_tiles", "heads", "group", "query_length", "key_length", "sized_tiles", "scale_log2",
    ]
)  # fmt: skip
def block_sparse_fwd_kernel_sm90(
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
):
    """Output and log-sum-exp of work items: ``program_id`` first, then whatever the counter gives."""
    dtype: gl.constexpr = query_source.dtype
    boxes: gl.constexpr = 1 if MASK_N == N else D // 32
    rows: gl.constexpr = N if MASK_N == N else 64
    width: gl.constexpr = D if MASK_N == N else 64
    query_ring = gl.allocate_shared_memory(dtype, [Q_STAGES * 2, 1, 1, 64, D], query_source.layout)
    key_ring = gl.allocate_shared_memory(dtype, [STAGES * boxes, 1, 1, rows, width], key_source.layout)
    value_ring = gl.allocate_shared_memory(dtype, [STAGES * boxes, 1, 1, rows, width], value_source.layout)
    sizes = sizes_ring(sizes_source, key_ring, SIZE_STAGES * (1 if MASK_N == N else 2), SIZES)
    out_ring = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], output.layout)
    # The producer arrives at "full" (with the bytes it asks for), both consumers at "empty".
    q_full, q_empty = new_barriers(Q_STAGES, 1), new_barriers(Q_STAGES, 2)
    k_full, k_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    v_full, v_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    facts = new_facts(Q_STAGES)
    fence_async_shared()
    rings = (query_ring, key_ring, value_ring)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    lists = (counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir)
    sources = (query_source, key_source, value_source, sizes_source)
    paired: gl.constexpr = MASK_N < N
    gl.warp_specialize(
        [
            (_consumer, (
                0, output, out_ring, lse_ptr, rings, sizes, facts, barriers, heads, query_length, sized_tiles,
                scale_log2, D, N, STAGES, Q_STAGES, paired, SIZES)),
            (_consumer, (
                1, output, out_ring, lse_ptr, rings, sizes, facts, barriers, heads, query_length, sized_tiles,
                scale_log2, D, N, STAGES, Q_STAGES, paired, SIZES)),
            (_producer, (
                sources, lists, rings, sizes, facts, barriers, counter_ptr, items, row_tiles, heads, group,
                key_length, D, N, STAGES, Q_STAGES, MASK_N, SIZES)),
        ],
        [4, 1],  # warps of the second consumer and of the producer; the first one has the kernel's four
        [240, 24],  # their registers; the first consumer gets the rest, 240
    )  # fmt: skip
