"""Device functions that the Hopper kernels share.

A producer warp hands out work items from a counter, since lists differ in length, and passes what consumers
must know of an item through a ring in shared memory: between two items they read nothing from global memory
and divide nothing. Their output leaves through shared memory and a TMA copy, which the next item hides.

Where keys have sizes, the values come multiplied by them, and sizes weigh the sum of weights alone. Scores
stay as they are: to add logarithms would cost the softmax or the tensor cores more than they have to spare.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels_common.triton_launch import LN_2

SLACK = gl.constexpr(8.0)
# An accumulator's numbers in a thread: two of one row, two of another, and so on.
_ONE = "0f3F800000"
_SCALE = gl.constexpr(
    "{ .reg .pred p, q;"
    f" setp.neu.f32 p, $64, {_ONE}; setp.neu.or.f32 p, $66, {_ONE}, p;"
    " vote.sync.any.pred q, p, 0xffffffff; @!q bra DONE;"
    + "".join(f" mul.f32 ${i}, ${i}, ${64 + i};" for i in range(32))
    + " DONE: }"
)
_SCALE_OPERANDS = gl.constexpr(",".join(["=r"] * 32 + [str(i) for i in range(32)] + ["r"] * 32))


@gluon.jit
def exp2(x):
    """``2^x`` by the special-function unit, subnormals as 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def log2(x):
    """``log2(x)`` by the special-function unit."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def locate(item, row_tiles, heads):
    """Batch, head and row tile of a work item; row tiles vary fastest, so that a head stays in L2."""
    return item // row_tiles // heads, item // row_tiles % heads, item % row_tiles


@gluon.jit
def read_list(item, lists, row_tiles, heads):
    """Count and first entry of a work item's list."""
    counts_ptr, indices_ptr, stride_cb, stride_ch, stride_ib, stride_ih, stride_ir = lists
    batch, head, row = locate(item, row_tiles, heads)
    count = gl.load(counts_ptr + batch * stride_cb + head * stride_ch + row)
    start = indices_ptr + batch.to(gl.int64) * stride_ib + head.to(gl.int64) * stride_ih
    return count, start + row.to(gl.int64) * stride_ir


@gluon.jit
def ring_place(step, STAGES: gl.constexpr):
    """Slot and phase of use number ``step`` of a ring; STAGES is a power of two.

    Masks and not remainders: those of a signed number are ten dependent instructions on the way to a wait.
    """
    gl.static_assert(STAGES & (STAGES - 1) == 0)
    return step & (STAGES - 1), (step & STAGES) // STAGES


@gluon.jit
def put(ring, place, value):
    """Write one number of a ring, by the producer's warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    ring.index(place).store(gl.full([1], value, ring.dtype, layout))


@gluon.jit
def get(ring, place):
    """Read one number of a ring, by a consumer."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(ring.index(place).load(layout), 0)


@gluon.jit
def new_facts(SLOTS: gl.constexpr):
    """A ring for what :func:`put_item` writes of an item."""
    return gl.allocate_shared_memory(gl.int32, [SLOTS * 5, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def put_item(facts, slot, batch, head, row, tiles, valid):
    """Note an item: batch entry (-1 past the last), head, row tile, key tiles, valid keys of the first."""
    put(facts, slot * 5, batch)
    put(facts, slot * 5 + 1, head)
    put(facts, slot * 5 + 2, row)
    put(facts, slot * 5 + 3, tiles)
    put(facts, slot * 5 + 4, valid)


@gluon.jit
def put_end(facts, q_full, q_empty, work, SLOTS: gl.constexpr):
    """Tell consumers, as item number ``work``, that there is no more."""
    slot, phase = ring_place(work, SLOTS)
    mbarrier.wait(q_empty.index(slot), phase ^ 1)
    put_item(facts, slot, -1, 0, 0, 0, 0)
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def raised(peak, highest):
    """What exponents are taken against from now on, ``[M]``, and the factor on older sums.

    It stays until a score is ``SLACK`` above it in log2 units: sums may be taken against anything, and most
    tiles then need no factor. Weights are at most ``2^SLACK``, which 16 bits hold.
    """
    new_peak = gl.where(highest > peak + SLACK, highest, peak)
    return new_peak, exp2(peak - new_peak)


@gluon.jit
def scaled(acc, factor):
    """``acc * factor`` of a tile ``[64, D]`` and its rows ``[64]``; a warp with factors of 1 skips it."""
    return gl.inline_asm_elementwise(
        _SCALE, _SCALE_OPERANDS, [acc, factor[:, None]], dtype=gl.float32, is_pure=True, pack=32
    )


@gluon.jit
def sizes_ring(source, other, BOXES: gl.constexpr, SIZES: gl.constexpr):
    """Shared memory for the sizes of key tiles; without them ``other``, which nobody reads as such."""
    if SIZES:
        ring = gl.allocate_shared_memory(
            gl.float32, [BOXES, 1, 1, 1, source.block_type.shape[3]], source.layout
        )
    else:
        ring = other
    return ring


@gluon.jit
def sized(weights, ring, box, N: gl.constexpr, S_LAYOUT: gl.constexpr, SIZES: gl.constexpr):
    """Weights ``[M, N]`` times the sizes of their keys, which begin in ``box`` of the ring."""
    if SIZES:
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        sizes = ring.index(box)._reinterpret(gl.float32, [N], layout)
        weights = weights * sizes.load(gl.SliceLayout(0, S_LAYOUT))[None, :]
    return weights


@gluon.jit
def load_query(source, ring, full, slot, batch, head, row):
    """Start the copies of both consumers' 64 rows of an item; ``full`` completes with them."""
    mbarrier.expect(full, 2 * source.block_type.nbytes)
    for half in gl.static_range(2):
        place = [batch, head, row * 128 + half * 64, 0]
        tma.async_copy_global_to_shared(source, place, full, ring.index(slot * 2 + half))


@gluon.jit
def get_item(facts, slot):
    """What :func:`put_item` wrote."""
    batch, head, row = get(facts, slot * 5), get(facts, slot * 5 + 1), get(facts, slot * 5 + 2)
    return batch, head, row, get(facts, slot * 5 + 3), get(facts, slot * 5 + 4)


@gluon.jit
def store_rows(
    acc, peak, total, output, box, lse_ptr, batch, head, row, heads, query_length, HALF: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Normalise 64 rows, start the copy of the output from ``box`` and write the log-sum-exp.

    Rows past the last query are not copied. Wait for the copy before leaving the kernel.
    """
    s_rows: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    o_rows: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    empty = total == 0.0
    safe_total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (peak + log2(safe_total)) * LN_2)
    acc = acc * gl.convert_layout(1.0 / safe_total, o_rows)[:, None]
    acc = gl.where(gl.convert_layout(total, o_rows)[:, None] == 0.0, 0.0, acc)
    first = row * 128 + HALF * 64
    copy_out(acc, output, box, [batch, head, first, 0])
    lse_rows = first + gl.arange(0, 64, s_rows)
    lse_base = lse_ptr + (batch * heads + head).to(gl.int64) * query_length
    gl.store(lse_base + lse_rows, lse, mask=lse_rows < query_length)


@gluon.jit
def copy_out(acc, output, box, place):
    """Start the copy of a tile of the output by way of ``box``, once the last copy has left that."""
    tma.store_wait(0)
    box.reshape(acc.shape).store(acc.to(output.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(output, place, box)


@gluon.jit
def new_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """``STAGES`` barriers that ``COUNT`` arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers
