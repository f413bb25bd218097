"""Triton kernel of merging: means of groups of tokens.

Shape letters: R groups of a program, D head dimension padded to a power of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from plugins.tome.kernels import padded_head_dim


@triton.jit
def member_rows(base, order_ptr, places, inside, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens at some places of the order, ``[places, D]`` fp32; zeros where not ``inside``."""
    members = tl.load(order_ptr + places, mask=inside, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + members[:, None] * stride + dims
    return tl.load(pointers, mask=inside[:, None] & (dims < HEAD_DIM), other=0.0).to(tl.float32)


@triton.jit
def long_group_sum(
    base, order_ptr, begin, end, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr
):
    """Sum of the tokens at the places from ``begin`` to ``end``, ``[D]``, WIDE of them at a time."""
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, WIDE):
        places = start + tl.arange(0, WIDE)
        total += tl.sum(member_rows(base, order_ptr, places, places < end, stride, HEAD_DIM, BLOCK_D), 0)
    return total


@triton.jit
def store_means(
    base, merged_ptr, order_ptr, starts_ptr, stride, merged_length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_R: tl.constexpr, STEP: tl.constexpr,
    LIMIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Means of a tile of groups of one head.

    Most groups have one member, many a few, and some perhaps hundreds: the first members come all at once,
    those of groups up to LIMIT step by step for the whole tile, and longer groups one after the other.
    """
    first_row = tl.program_id(0) * TILE_R
    rows = first_row + tl.arange(0, TILE_R)
    inside = rows < merged_length
    begin = tl.load(starts_ptr + rows, mask=inside, other=0)
    count = tl.load(starts_ptr + rows + 1, mask=inside, other=0) - begin
    total = member_rows(base, order_ptr, begin, inside, stride, HEAD_DIM, BLOCK_D)
    stepped = tl.where(count > LIMIT, 1, count)
    for start in range(1, tl.max(stepped), STEP):
        for place in tl.static_range(STEP):  # loads that do not wait for each other
            there = start + place < stepped
            total += member_rows(
                base, order_ptr, begin + start + place, there, stride, HEAD_DIM, BLOCK_D
            )  # fmt: skip
    if tl.max(count) > LIMIT:
        for row in range(first_row, tl.minimum(first_row + TILE_R, merged_length)):
            row_begin, row_end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
            if row_end - row_begin > LIMIT:
                rest = long_group_sum(
                    base, order_ptr, row_begin + 1, row_end, stride, HEAD_DIM, BLOCK_D, WIDE
                )
                total += tl.where((rows == row)[:, None], rest[None, :], 0.0)
    mean = total * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    targets = merged_ptr + rows[:, None] * HEAD_DIM + dims
    tl.store(targets, mean.to(merged_ptr.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM))


@triton.jit(do_not_specialize=["merged_length", "stride_ob", "stride_oh", "stride_sb", "stride_sh"])
def group_mean_kernel(
    tokens,
    merged,
    strides,
    order_ptr,
    starts_ptr,
    stride_ob,
    stride_oh,
    stride_sb,
    stride_sh,
    merged_length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_R: tl.constexpr,
    STEP: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean of the members of each group, summed in fp32: grid ``(ceil(K / TILE_R), B * H, tensors)``.

    Every sum is taken in an order that depends on the group's size alone.
    """
    program = tl.program_id(1).to(tl.int64)
    batch, head = program // HEADS, program % HEADS
    order_ptr += batch * stride_ob + head * stride_oh
    starts_ptr += batch * stride_sb + head * stride_sh
    for part in tl.static_range(len(tokens)):
        if tl.program_id(2) == part:
            stride_b, stride_h, stride_n = strides[part]
            store_means(
                tokens[part] + batch * stride_b + head * stride_h,
                merged[part] + program * merged_length * HEAD_DIM,
                order_ptr, starts_ptr, stride_n, merged_length,
                HEAD_DIM, BLOCK_D, TILE_R, STEP, LIMIT, WIDE,
            )  # fmt: skip


class MeanConfig(NamedTuple):
    """How the mean kernel takes its groups, and its launch parameters.

    Args:
        tile_r (int): groups per program. Default: 32
        step (int): members per step of all groups of a program. Default: 2
        limit (int): members of a group above which it is summed alone. Default: 32
        wide (int): members per step of a group that is summed alone. Default: 64
        num_warps (int): of a program. Default: 4
    """

    tile_r: int = 32
    step: int = 2
    limit: int = 32
    wide: int = 64
    num_warps: int = 4


def group_means_triton(
    tokens: tuple[torch.Tensor, ...],
    order: torch.Tensor,
    starts: torch.Tensor,
    *,
    config: MeanConfig | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch the mean kernel, once for several tensors of one shape.

    Args:
        tokens (tuple[Tensor, ...]): ``[B, H, S, D]`` each.
        order (Tensor): as in `plugins.tome.merging.MergeMap`.
        starts (Tensor): likewise.
        config (MeanConfig, Optional): launch parameters. Default: those of `MeanConfig`
    """
    config = config or MeanConfig()
    batch, heads, _, head_dim = tokens[0].shape
    tokens = tuple(part if part.stride(3) == 1 else part.contiguous() for part in tokens)
    order, starts = (part.contiguous().expand(batch, heads, -1) for part in (order, starts))
    length = starts.shape[2] - 1
    merged = tuple(part.new_empty(batch, heads, length, head_dim) for part in tokens)
    with torch.cuda.device_of(order):
        group_mean_kernel[(triton.cdiv(length, config.tile_r), batch * heads, len(tokens))](
            tokens, merged, tuple(part.stride()[:3] for part in tokens), order, starts,
            *order.stride()[:2], *starts.stride()[:2], length,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
            TILE_R=config.tile_r, STEP=config.step, LIMIT=config.limit, WIDE=config.wide,
            num_warps=config.num_warps,
        )  # fmt: skip
    return merged
