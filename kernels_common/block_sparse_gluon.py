"""Block-sparse attention for Hopper in Gluon: one TMA producer warp and two consumer warpgroups.

Persistent programs walk 128-row query tiles. The producer follows the index list and fills rings of key
and value tiles; each consumer takes 64 of the 128 rows, so a tile is read from L2 once per 128 rows.
Inside a consumer, QK of the next tile and PV of this one are issued together and the softmax runs during
PV (FlashAttention-3, arXiv 2407.08608). QK of the next query tile runs during the epilogue. Lists are
walked from their end: only the last listed block can reach past the keys, so one tile per list is masked.

Shape letters: M = 64 rows of a consumer, N = 128 keys of a tile, D head dimension.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.errors import UnsupportedCallError
from kernels_common import block_sparse_gluon_64 as head_dim_64
from kernels_common.block_sparse_gluon_parts import exp2, locate, new_barriers, read_list, store_rows
from kernels_common.triton_launch import LOG2_E, aligned, list_strides

BLOCK_SIZES = ((128, 128), (128, 64))
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
KEY_STAGES = 2  # key and value tiles in flight
QUERY_STAGES = 2
TILE_N = 128


@gluon.jit
def _plan(item, items, lists, row_tiles, heads, key_length, MASK_N: gl.constexpr, N: gl.constexpr):
    """Key tiles of a work item (0 past the last item), and valid keys of the tile walked first."""
    count, list_ptr = read_list(gl.minimum(item, items - 1), lists, row_tiles, heads)
    valid = key_length - gl.load(list_ptr + gl.maximum(count - 1, 0)) * MASK_N
    tiles = count
    if MASK_N < N:  # two blocks make a tile; the last block of an odd list is alone in its tile
        tiles = (count + 1) // 2
        valid = gl.minimum(valid, MASK_N) + gl.where(count % 2 == 0, MASK_N, 0)
    return gl.where(item < items, tiles, 0), valid


@gluon.jit
def _load_tile(source, ring, full, empty, step, batch, kv_head, start_a, start_b,
               D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr):  # fmt: skip
    """Start the copy of one key or value tile as soon as both consumers have left its slot."""
    slot = step % STAGES
    barrier = full.index(slot)
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(barrier, N * D * 2)
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
def _producer(
    sources, lists, rings, barriers, items, row_tiles, heads, group,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """One warp: copies query tiles and the listed key and value tiles, each list from its end."""
    query_source, key_source, value_source = sources
    query_ring, key_ring, value_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    PAIRED: gl.constexpr = MASK_N < N
    step = 0
    work = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, row = locate(item, row_tiles, heads)
        kv_head = head // group
        slot = work % Q_STAGES
        mbarrier.wait(q_empty.index(slot), ((work // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), 128 * D * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                query_source, [batch, head, row * 128 + half * 64, 0], q_full.index(slot),
                query_ring.index(slot * 2 + half),
            )  # fmt: skip
        work += 1  # noqa: SIM113 (compiled code)

        count, list_ptr = read_list(item, lists, row_tiles, heads)
        width: gl.constexpr = 2 if PAIRED else 1
        tiles = (count + width - 1) // width
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
                       D, N, STAGES, PAIRED)  # fmt: skip
            _load_tile(value_source, value_ring, v_full, v_empty, step, batch, kv_head, start_a, start_b,
                       D, N, STAGES, PAIRED)  # fmt: skip
            step += 1


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
def _softmax(scores, peak, total, scale_log2):
    """One online step: weights [M, N], new peak and total [M], factor on what was summed before [M]."""
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    rescale = exp2(peak - new_peak)
    weights = exp2(scores * scale_log2 - new_peak[:, None])
    return weights, new_peak, total * rescale + gl.sum(weights, 1), rescale


@gluon.jit
def _walk(
    scores, acc, peak, total, query_tile, rings, barriers, step, tiles, scale_log2,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of a list, all but PV of the last tile, whose weights are returned."""
    _, key_ring, value_ring = rings
    _, _, k_full, k_empty, v_full, v_empty = barriers
    weights, peak, total, rescale = _softmax(scores, peak, total, scale_log2)
    weights_16 = gl.convert_layout(weights.to(key_ring.dtype), P_LAYOUT)
    for _ in range(tiles - 1):
        value_slot = step % STAGES
        value_phase = (step // STAGES) & 1
        step += 1
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        pending = _start_scores(query_tile, _tile(key_ring, slot, D, N, PAIRED), S_LAYOUT, N)
        mbarrier.wait(v_full.index(value_slot), value_phase)
        value_tile = _tile(value_ring, value_slot, D, N, PAIRED)
        pending_acc = warpgroup_mma(weights_16, value_tile, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[pending])
        mbarrier.arrive(k_empty.index(slot))
        weights, peak, total, rescale = _softmax(scores, peak, total, scale_log2)
        # Passed long ago. Without a branch here ptxas waits for PV before the softmax.
        mbarrier.wait(v_full.index(value_slot), value_phase)
        acc, weights = warpgroup_mma_wait(0, deps=[pending_acc, weights])
        mbarrier.arrive(v_empty.index(value_slot))
        weights_16 = gl.convert_layout(weights.to(key_ring.dtype), P_LAYOUT)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return acc, peak, total, weights_16, step


@gluon.jit
def _consumer(
    HALF: gl.constexpr, lists, output_ptr, lse_ptr, output_strides, rings, barriers,
    items, row_tiles, heads, query_length, key_length, scale_log2,
    D: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of rows ``64 * HALF`` to ``64 * HALF + 63`` of every query tile."""
    query_ring, key_ring, value_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    PAIRED: gl.constexpr = MASK_N < N
    step = 0
    work = 0
    tiles, valid = _plan(gl.program_id(0), items, lists, row_tiles, heads, key_length, MASK_N, N)
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0, pred=tiles > 0)
    query_tile = query_ring.index(HALF).reshape([64, D])
    pending = _start_scores(query_tile, _tile(key_ring, 0, D, N, PAIRED), S_LAYOUT, N)
    scores = warpgroup_mma_wait(0, deps=[pending])  # [M, N]
    mbarrier.arrive(k_empty.index(0), pred=tiles > 0)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        query_slot = work % Q_STAGES
        query_tile = query_ring.index(query_slot * 2 + HALF).reshape([64, D])
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        peak = gl.full([64], float("-inf"), gl.float32, S_ROWS)
        total = gl.zeros([64], gl.float32, S_ROWS)
        weights_16 = gl.zeros([64, N], key_ring.dtype, P_LAYOUT)
        if tiles > 0:
            if valid < N:
                columns = gl.arange(0, N, gl.SliceLayout(0, S_LAYOUT))
                scores = gl.where((columns < valid)[None, :], scores, float("-inf"))
            acc, peak, total, weights_16, step = _walk(
                scores, acc, peak, total, query_tile, rings, barriers, step, tiles, scale_log2,
                D, N, STAGES, PAIRED, S_LAYOUT, O_LAYOUT, P_LAYOUT)  # fmt: skip
        mbarrier.arrive(q_empty.index(query_slot))

        # PV of the last tile, then QK of the next item's first one, which runs during the epilogue.
        # Without a tile to read, both compute on whatever lies there and nothing uses the result.
        work += 1  # noqa: SIM113 (compiled code)
        query_slot = work % Q_STAGES
        next_item = item + gl.num_programs(0)
        next_tiles, next_valid = _plan(next_item, items, lists, row_tiles, heads, key_length, MASK_N, N)
        value_slot = step % STAGES
        mbarrier.wait(v_full.index(value_slot), (step // STAGES) & 1, pred=tiles > 0)
        value_tile = _tile(value_ring, value_slot, D, N, PAIRED)
        pending_acc = warpgroup_mma(weights_16, value_tile, acc, is_async=True)
        step = gl.where(tiles > 0, step + 1, step)
        slot = step % STAGES
        mbarrier.wait(q_full.index(query_slot), (work // Q_STAGES) & 1, pred=next_item < items)
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1, pred=next_tiles > 0)
        query_tile = query_ring.index(query_slot * 2 + HALF).reshape([64, D])
        pending = _start_scores(query_tile, _tile(key_ring, slot, D, N, PAIRED), S_LAYOUT, N)
        acc = warpgroup_mma_wait(1, deps=[pending_acc])
        mbarrier.arrive(v_empty.index(value_slot), pred=tiles > 0)
        store_rows(acc, peak, total, output_ptr, lse_ptr, output_strides, item, row_tiles, heads,
                   query_length, HALF, D, S_LAYOUT, O_LAYOUT)  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[pending])
        mbarrier.arrive(k_empty.index(slot), pred=next_tiles > 0)
        tiles = next_tiles
        valid = next_valid


# Lengths and strides of lists change with every size; specialising on them would recompile.
@gluon.jit(
    do_not_specialize=[
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir",
        "items", "row_tiles", "heads", "group", "query_length", "key_length", "scale_log2",
    ]
)  # fmt: skip
def block_sparse_fwd_kernel_sm90(
    query_source,
    key_source,
    value_source,
    output_ptr,
    lse_ptr,
    counts_ptr,
    indices_ptr,
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
    N: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    MASK_N: gl.constexpr,
):
    """Output and log-sum-exp of the work items ``program_id``, ``program_id + num_programs``, ...."""
    dtype: gl.constexpr = query_source.dtype
    boxes: gl.constexpr = 1 if MASK_N == N else D // 32
    rows: gl.constexpr = N if MASK_N == N else 64
    width: gl.constexpr = D if MASK_N == N else 64
    query_ring = gl.allocate_shared_memory(dtype, [Q_STAGES * 2, 1, 1, 64, D], query_source.layout)
    key_ring = gl.allocate_shared_memory(dtype, [STAGES * boxes, 1, 1, rows, width], key_source.layout)
    value_ring = gl.allocate_shared_memory(dtype, [STAGES * boxes, 1, 1, rows, width], value_source.layout)
    # The producer arrives at "full" (with the bytes it asks for), both consumers at "empty".
    q_full, q_empty = new_barriers(Q_STAGES, 1), new_barriers(Q_STAGES, 2)
    k_full, k_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    v_full, v_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    fence_async_shared()
    rings = (query_ring, key_ring, value_ring)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    lists = (counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir)
    strides = (stride_ob, stride_oh, stride_on)
    sources = (query_source, key_source, value_source)
    gl.warp_specialize(
        [
            (_consumer, (
                0, lists, output_ptr, lse_ptr, strides, rings, barriers, items, row_tiles, heads,
                query_length, key_length, scale_log2, D, N, STAGES, Q_STAGES, MASK_N)),
            (_consumer, (
                1, lists, output_ptr, lse_ptr, strides, rings, barriers, items, row_tiles, heads,
                query_length, key_length, scale_log2, D, N, STAGES, Q_STAGES, MASK_N)),
            (_producer, (
                sources, lists, rings, barriers, items, row_tiles, heads, group,
                D, N, STAGES, Q_STAGES, MASK_N)),
        ],
        [4, 1],  # warps of the second consumer and of the producer; the first one has the kernel's four
        [240, 24],  # their registers; the first consumer gets the rest, 240
    )  # fmt: skip


def gluon_obstacle(
    query: torch.Tensor,
    block_size: tuple[int, int],
) -> str | None:
    """Why :func:`block_sparse_attention_gluon` cannot take such a call, or None."""
    if query.device.type != "cuda":
        return f"backend 'gluon' needs a CUDA device, got {query.device}"
    properties = torch.cuda.get_device_properties(query.device)
    capability = (properties.major, properties.minor)
    checks = (
        (capability == (9, 0), f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"),
        (query.dtype in DTYPES, f"supports fp16 and bf16, got {query.dtype}"),
        (query.shape[-1] in HEAD_DIMS, f"supports head dimensions 64 and 128, got {query.shape[-1]}"),
        (
            tuple(block_size) in BLOCK_SIZES,
            f"supports mask blocks of 128 x 128 and 128 x 64, got {tuple(block_size)}",
        ),
    )
    return next((f"backend 'gluon' {message}" for passed, message in checks if not passed), None)


def prefers_gluon(query: torch.Tensor, block_size: tuple[int, int]) -> bool:
    """Whether the kernels here take such a call: then they are faster than the Triton one.

    A key tile read once per 128 query rows feeds the matrix products, and the softmax of one warpgroup runs
    behind the products of another.
    """
    return gluon_obstacle(query, block_size) is None


def _source(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of one head; strides of single-entry dimensions are arbitrary and are made valid."""
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    strides = [stride if size > 1 else tensor.shape[3] for size, stride in pairs]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns], layout)


def block_sparse_attention_gluon(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments as in :func:`kernels_common.block_sparse_attention`.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32.

    Raises:
        UnsupportedCallError: :func:`gluon_obstacle` names a reason.
    """
    if (obstacle := gluon_obstacle(query, block_size)) is not None:
        raise UnsupportedCallError(obstacle)
    batch, heads, queries, head_dim = query.shape
    output = torch.empty_like(query)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0 or indices.numel() == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    target = output if output.stride(3) == 1 else output.new_empty(output.shape)
    query, key, value = (aligned(part) for part in (query, key, value))
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    row_tiles = triton.cdiv(queries, block_size[0])
    items = batch * heads * row_tiles
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    if head_dim == 64:
        kernel, tile_n, programs = (
            head_dim_64.block_sparse_fwd_kernel_sm90_64,
            head_dim_64.TILE_N,
            min(-(-items // head_dim_64.TEAMS), processors),
        )
        options = {
            "STAGES": head_dim_64.STAGES, "Q_STAGES": head_dim_64.QUERY_STAGES,
            "C_REGISTERS": head_dim_64.CONSUMER_REGISTERS, "P_REGISTERS": head_dim_64.PRODUCER_REGISTERS,
        }  # fmt: skip
    else:
        kernel, tile_n, programs = block_sparse_fwd_kernel_sm90, TILE_N, min(items, processors)
        options = {"STAGES": KEY_STAGES, "Q_STAGES": QUERY_STAGES}
    box = (tile_n, head_dim) if block_size[1] >= tile_n else (64, 64)
    with torch.cuda.device_of(query):
        kernel[(programs,)](
            _source(query, 64, head_dim), _source(key, *box), _source(value, *box), target, lse,
            counts, indices, *list_strides(counts)[:2], *list_strides(indices)[:3], *target.stride()[:3],
            items, row_tiles, heads, heads // key.shape[1], queries, key.shape[2], scale * LOG2_E.value,
            D=head_dim, N=tile_n, MASK_N=block_size[1], **options, num_warps=4,
        )  # fmt: skip
    return (output if target is output else output.copy_(target)), lse
