"""Block statistics in Triton: one program per block.

Shape letters: N tokens of a tile, D head dimension padded to a power of two.
"""

import torch
import triton
import triton.language as tl

VALUES_PER_WARP = 4096  # few warps: their sums over a block then cross few warps
SMALLEST_NORM = tl.constexpr(1e-12)  # as torch.nn.functional.normalize


@triton.jit(do_not_specialize=["length"])
def block_means_kernel(
    tensor_ptr,
    subtract_ptr,
    order_ptr,
    mean_ptr,
    similarity_ptr,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SUBTRACT: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    """Mean and self-similarity of one block: grid ``(M, B * H)``."""
    block = tl.program_id(0)
    entry = tl.program_id(1).to(tl.int64)
    places = tl.arange(0, BLOCK_N)
    rows = block.to(tl.int64) * BLOCK + places
    columns = tl.arange(0, BLOCK_D)
    listed = (places < BLOCK) & (rows < length)
    if HAS_ORDER:
        rows = tl.load(order_ptr + rows, mask=listed, other=0).to(tl.int64)
    inside = listed[:, None] & (columns < HEAD_DIM)[None, :]
    base = tensor_ptr + (entry // HEADS) * stride_b + (entry % HEADS) * stride_h
    pointers = base + rows[:, None] * stride_s + columns[None, :] * stride_d
    tokens = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)  # [N, D]
    if HAS_SUBTRACT:
        shift = tl.load(subtract_ptr + entry * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        tokens = tl.where(inside, tokens - shift[None, :], 0.0)
    norms = tl.sqrt(tl.sum(tokens * tokens, 1))
    units = tokens / tl.maximum(norms, SMALLEST_NORM)[:, None]
    count = tl.minimum(BLOCK, length - block * BLOCK).to(tl.float32)
    mean = tl.sum(tokens, 0) / count
    direction = tl.sum(units, 0) / count
    place = entry * tl.num_programs(0) + block
    tl.store(mean_ptr + place * HEAD_DIM + columns, mean, mask=columns < HEAD_DIM)
    tl.store(similarity_ptr + place, tl.sum(direction * direction, 0))


def block_means_triton(
    tensor: torch.Tensor, block: int, subtract: torch.Tensor | None, order: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments and result as in :func:`kernels_common.block_means`."""
    batch, heads, length, head_dim = tensor.shape
    length = length if order is None else len(order)
    blocks = triton.cdiv(length, block)
    mean = torch.empty(batch, heads, blocks, head_dim, dtype=torch.float32, device=tensor.device)
    similarity = torch.empty(batch, heads, blocks, dtype=torch.float32, device=tensor.device)
    block_d, block_n = triton.next_power_of_2(head_dim), triton.next_power_of_2(block)
    with torch.cuda.device_of(tensor):
        block_means_kernel[(blocks, batch * heads)](
            tensor, None if subtract is None else subtract.to(torch.float32).contiguous(),
            None if order is None else order.contiguous(), mean, similarity, *tensor.stride(), length,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK=block, BLOCK_N=block_n,
            HAS_SUBTRACT=subtract is not None, HAS_ORDER=order is not None,
            num_warps=min(max(2, block_d * block_n // VALUES_PER_WARP), 16),
        )  # fmt: skip
    return mean, similarity
