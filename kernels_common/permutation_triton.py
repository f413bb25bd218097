"""Reordering of tokens in Triton: several tensors in one launch, each token copied whole.

Values are moved as integers of their size, so that every dtype arrives bit by bit.
"""

import torch
import triton
import triton.language as tl

BYTES_PER_TILE = 16384
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# The number of tokens changes with every size; specialising on it would recompile.
@triton.jit(do_not_specialize=["stride_ob", "stride_oh", "count"])
def move_tokens_kernel(
    sources,
    targets,
    source_strides,
    target_strides,
    tensor_heads,
    order_ptr,
    stride_ob,
    stride_oh,
    count,
    HEADS: tl.constexpr,
    SCATTER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tokens of one tile of the order, of all tensors: grid ``(ceil(N / BLOCK_N), B * H)``."""
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = places < count
    listed = tl.load(order_ptr + batch * stride_ob + head * stride_oh + places, mask=inside, other=0)
    listed, places = listed.to(tl.int64)[:, None], places.to(tl.int64)[:, None]
    for part in tl.static_range(len(sources)):
        # Keys and values may have fewer heads than queries.
        mask = inside[:, None] & (columns < HEAD_DIM) & (head < tensor_heads[part])
        source_b, source_h, source_n, source_d = source_strides[part]
        target_b, target_h, target_n, target_d = target_strides[part]
        source = sources[part] + batch * source_b + head * source_h + columns * source_d
        target = targets[part] + batch * target_b + head * target_h + columns * target_d
        if SCATTER:
            tl.store(target + listed * target_n, tl.load(source + places * source_n, mask=mask), mask=mask)
        else:
            tl.store(target + places * target_n, tl.load(source + listed * source_n, mask=mask), mask=mask)


def move_tokens_triton(
    sources: tuple[torch.Tensor, ...],
    targets: tuple[torch.Tensor, ...],
    order: torch.Tensor,
    *,
    scatter: bool,
) -> None:
    """Fill ``targets`` with the tokens of ``sources``, by one launch.

    Args:
        sources (tuple[Tensor, ...]): ``[B, H, S, D]`` each, alike but for H and strides.
        targets (tuple[Tensor, ...]): likewise, ``[B, H, N, D]``.
        order (Tensor): as in :func:`kernels_common.gather_tokens`, with as many heads as every source or 1.
        scatter (bool): write token i to place ``order[i]``; otherwise read it from there.
    """
    batch, _, _, head_dim = sources[0].shape
    heads = max(source.shape[1] for source in sources)
    lists = order[(None,) * (3 - order.dim())]
    lists = lists if lists.stride(2) == 1 else lists.contiguous()
    block_d = triton.next_power_of_2(head_dim)
    block_n = max(16, BYTES_PER_TILE // (block_d * sources[0].element_size()))
    integer = _INTEGERS[sources[0].element_size()]
    with torch.cuda.device_of(order):
        move_tokens_kernel[(triton.cdiv(order.shape[-1], block_n), batch * heads)](
            tuple(source.view(integer) for source in sources),
            tuple(target.view(integer) for target in targets),
            tuple(source.stride() for source in sources), tuple(target.stride() for target in targets),
            tuple(source.shape[1] for source in sources),
            lists, lists.stride(0) * (lists.shape[0] > 1), lists.stride(1) * (lists.shape[1] > 1),
            order.shape[-1],
            HEADS=heads, SCATTER=scatter, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_N=block_n,
        )  # fmt: skip
