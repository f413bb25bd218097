"""Tiles of the 8-bit Hopper kernel in a consumer's registers: their layouts, products and softmax.

Shape letters: M = 64 rows of a consumer, N = 128 keys of a tile in two groups of 64, D head dimension.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from kernels_common.block_sparse_gluon_parts import exp2, get

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
def start_scores(query_tile, key_ring, slot, D: gl.constexpr):
    """QK of a tile, integers [M, N]."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=D, element_bitwidth=8, rank=2)
    key_tile = key_ring.index(slot * 2)._reinterpret(gl.int8, [128, D], layout)
    zeros = gl.zeros([64, 128], gl.int32, SCORE_LAYOUT)
    return warpgroup_mma(query_tile, key_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def start_values(packed_a, packed_b, value_ring, box, acc, ADD: gl.constexpr):
    """PV of a tile and 64 channels, added to ``acc`` or from zero."""
    tile_a = value_ring.index(box).reshape([64, 64]).permute((1, 0))
    tile_b = value_ring.index(box + 1).reshape([64, 64]).permute((1, 0))
    acc = warpgroup_mma(packed_a, tile_a, acc, use_acc=ADD, is_async=True)
    return warpgroup_mma(packed_b, tile_b, acc, is_async=True)


@gluon.jit
def score_factors(key_scales, slot, query_factor):
    """What turns integer scores of both groups of a tile into exponents of two."""
    return get(key_scales, slot * 2) * query_factor, get(key_scales, slot * 2 + 1) * query_factor


@gluon.jit
def halves(scores):
    """Integer scores [M, N] as fp32 scores of the two groups, [M, 64] each."""
    return gl.split(scores.to(gl.float32).reshape([64, 2, 64]).permute((0, 2, 1)))


@gluon.jit
def mask_columns(scores, valid):
    """Scores of 64 keys, minus infinity from column ``valid`` on."""
    columns = gl.arange(0, 64, gl.SliceLayout(0, scores.type.layout))
    return gl.where((columns < valid)[None, :], scores, float("-inf"))


@gluon.jit
def new_peak_of(peak, a, b, factor_a, factor_b):
    """Largest exponent of every row so far, [M]."""
    top_a = gl.max(gl.max(a.reshape([64, 8, 4, 2]), 3), 1)  # [M, 4], of what a lane holds
    top_b = gl.max(gl.max(b.reshape([64, 8, 4, 2]), 3), 1)
    top = gl.max(gl.maximum(top_a * factor_a, top_b * factor_b), 1)
    return gl.maximum(peak, gl.convert_layout(top, ROWS, assert_trivial=True))


@gluon.jit
def softmax_weights(scores, factor, shift):
    """448 times the softmax weights of 64 keys, before division by their sum, [M, 64]."""
    rows: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    shift = gl.convert_layout(shift, rows, assert_trivial=True)
    weights = exp2(scores * factor - shift[:, None])
    return gl.convert_layout(weights, PART_LAYOUT, assert_trivial=True)


@gluon.jit
def new_total_of(total, rescale, weights_a, weights_b):
    """Sum of the weights so far, what each of a row's four lanes holds, [M, 4]."""
    here = gl.sum(gl.sum(weights_a.reshape([64, 8, 4, 2]), 3), 1)  # [M, 4]
    here += gl.sum(gl.sum(weights_b.reshape([64, 8, 4, 2]), 3), 1)
    rescale = gl.convert_layout(rescale, gl.SliceLayout(1, LANE_LAYOUT), assert_trivial=True)
    return total * rescale[:, None] + gl.convert_layout(here, LANE_LAYOUT, assert_trivial=True)


@gluon.jit
def pack(weights):
    """E4M3 weights of 64 keys in the order of :func:`interleave_tokens`."""
    weights = weights.reshape([64, 4, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 64])
    weights = gl.convert_layout(weights, QUAD_LAYOUT, assert_trivial=True)
    return gl.convert_layout(_e4m3(weights), WEIGHT_LAYOUT, assert_trivial=True)


@gluon.jit
def scale_rows(acc, factor):
    """Rows of 64 channels times their factor."""
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, PART_LAYOUT))[:, None]
