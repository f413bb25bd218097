"""Keys that stand for several tokens, as the Hopper kernels read them: values times sizes, and the sizes.

``sum(n e^s v) / sum(n e^s)`` over keys of size n takes sizes in the sum of weights alone if values come
multiplied by them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROWS = 64  # sizes of so many keys fill whole units of the copy engine
LARGEST_PRODUCT = 2.0**15  # of a value and its size in fp16


class SizedValues(NamedTuple):
    """Values and sizes of keys.

    Args:
        value (Tensor): values times their sizes, ``[B, Hkv, Nk, D]``, contiguous.
        sizes (Tensor): ``[B, Hkv, 1, N]`` fp32, contiguous; N is Nk rounded up to a multiple of ``ROWS``.
        log_divisor (Tensor, Optional): logarithm of what both were divided by to fit into fp16, ``[B, Hkv]``
            fp32: the output is the same, the log-sum-exp smaller by as much.
    """

    value: torch.Tensor
    sizes: torch.Tensor
    log_divisor: torch.Tensor | None


# Lengths and strides of sizes change with every size; specialising on them would recompile.
@triton.jit(do_not_specialize=["stride_sb", "stride_sh", "length", "sized"])
def sized_values_kernel(
    value_ptr, sizes_ptr, divisor_ptr, products_ptr, filled_ptr,
    stride_vb, stride_vh, stride_vn, stride_sb, stride_sh, length, sized,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` keys of one head, of which the first ``sized`` have a size: ``(ceil(Nk / ROWS), B * Hkv)``."""
    program = tl.program_id(1).to(tl.int64)
    batch, head = program // HEADS, program % HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < length
    sizes = tl.load(sizes_ptr + batch * stride_sb + head * stride_sh + row, mask=row < sized, other=1)
    sizes = sizes.to(tl.float32) / tl.load(divisor_ptr + program)
    tl.store(filled_ptr + program * tl.num_programs(0) * ROWS + row, sizes)
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)
    base = value_ptr + batch * stride_vb + head * stride_vh
    values = tl.load(base + row[:, None].to(tl.int64) * stride_vn + dims, mask=mask)
    products = (values.to(tl.float32) * sizes[:, None]).to(values.dtype)
    tl.store(products_ptr + (program * length + row[:, None]) * HEAD_DIM + dims, products, mask=mask)


def sized_values(value: torch.Tensor, key_sizes: torch.Tensor) -> SizedValues:
    """Launch the kernel.

    Args:
        value (Tensor): ``[B, Hkv, Nk, D]``.
        key_sizes (Tensor): ``[B or 1, 1 or Hkv, 1 to Nk]`` numbers; keys past them have size 1.
    """
    batch, heads, length, head_dim = value.shape
    value = value if value.stride(3) == 1 else value.contiguous()
    key_sizes = key_sizes.contiguous().expand(batch, heads, -1)
    divisor = torch.ones(batch, heads, dtype=torch.float32, device=value.device)
    if value.dtype == torch.float16:
        largest = value.abs().amax((2, 3)).to(torch.float32) * key_sizes.amax(2)
        divisor = (largest / LARGEST_PRODUCT).clamp(min=1.0)
    products = value.new_empty(batch, heads, length, head_dim)
    tiles = triton.cdiv(length, ROWS)
    filled = torch.empty(batch, heads, 1, tiles * ROWS, dtype=torch.float32, device=value.device)
    with torch.cuda.device_of(value):
        sized_values_kernel[(tiles, batch * heads)](
            value, key_sizes, divisor, products, filled, *value.stride()[:3], *key_sizes.stride()[:2], length,
            key_sizes.shape[2],
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return SizedValues(products, filled, divisor.log() if value.dtype == torch.float16 else None)
