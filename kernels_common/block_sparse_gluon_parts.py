"""Device functions that both Hopper kernels use."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels_common.triton_launch import LN_2


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
def store_rows(
    acc, peak, total, output_ptr, lse_ptr, output_strides, item, row_tiles, heads, query_length,
    HALF: gl.constexpr, D: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Normalise 64 rows and write their output and log-sum-exp."""
    stride_ob, stride_oh, stride_on = output_strides
    batch, head, row = locate(item, row_tiles, heads)
    s_rows: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    o_rows: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    empty = total == 0.0
    safe_total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, float("-inf"), (peak + log2(safe_total)) * LN_2)
    acc = acc * gl.convert_layout(1.0 / safe_total, o_rows)[:, None]
    acc = gl.where(gl.convert_layout(total, o_rows)[:, None] == 0.0, 0.0, acc)
    first = row * 128 + HALF * 64
    rows = first + gl.arange(0, 64, o_rows)
    columns = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    base = output_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    offsets = rows.to(gl.int64)[:, None] * stride_on + columns[None, :]
    gl.store(base + offsets, acc.to(output_ptr.dtype.element_ty), mask=(rows < query_length)[:, None])
    lse_rows = first + gl.arange(0, 64, s_rows)
    lse_base = lse_ptr + (item // row_tiles).to(gl.int64) * query_length
    gl.store(lse_base + lse_rows, lse, mask=lse_rows < query_length)


@gluon.jit
def new_barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """``STAGES`` barriers that ``COUNT`` arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers
