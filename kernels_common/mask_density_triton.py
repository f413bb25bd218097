"""Executed density in Triton: one program adds up the rows of a mask.

A row costs its counts in whole blocks, less what the last block of the sequence lacks. Lists ascend, so that
this block can only be the last of a list.
"""

import torch
import triton
import triton.language as tl

from core.block_mask import BlockSparseMask
from core.level_mask import LEVELS, LevelMask

ROWS_PER_TILE = 1024


@triton.jit(do_not_specialize=["rows", "width", "query_length", "key_length", "query_block", "key_block"])
def density_kernel(
    counts_ptr,
    indices_ptr,
    density_ptr,
    rows,
    width,
    query_length,
    key_length,
    query_block,
    key_block,
    LEVELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pairs of all rows over all pairs: grid ``(1,)``."""
    query_blocks, key_blocks = tl.cdiv(query_length, query_block), tl.cdiv(key_length, key_block)
    query_tail = query_length - (query_blocks - 1) * query_block
    key_tail = key_length - (key_blocks - 1) * key_block
    pairs = tl.zeros([TILE], dtype=tl.int64)
    for start in range(0, rows, TILE):
        row = start + tl.arange(0, TILE)
        inside = row < rows
        keys = tl.zeros([TILE], dtype=tl.int32)
        end = tl.zeros([TILE], dtype=tl.int32)
        for place in tl.static_range(LEVELS):
            count = tl.load(counts_ptr + row * LEVELS + place, mask=inside, other=0)
            end += count
            last_ptr = indices_ptr + row.to(tl.int64) * width + end - 1
            last = tl.load(last_ptr, mask=inside & (count > 0), other=-1)
            whole = key_block // (1 << place)  # keys of a block at this level
            lacking = whole - tl.cdiv(key_tail, 1 << place)
            keys += count * whole - tl.where(last == key_blocks - 1, lacking, 0)
        queries = tl.where(row % query_blocks == query_blocks - 1, query_tail, query_block)
        pairs += keys.to(tl.int64) * queries
    every = (rows // query_blocks).to(tl.int64) * query_length * key_length
    tl.store(density_ptr, tl.sum(pairs, 0).to(tl.float64) / every.to(tl.float64))


def mask_density_triton(mask: BlockSparseMask | LevelMask) -> torch.Tensor:
    """Launch the kernel; as :func:`kernels_common.mask_density.mask_density`."""
    counts, indices = mask.counts.contiguous(), mask.indices.contiguous()
    density = torch.empty((), dtype=torch.float64, device=mask.device)
    levels = len(LEVELS) if isinstance(mask, LevelMask) else 1
    with torch.cuda.device_of(counts):
        density_kernel[(1,)](
            counts, indices, density, counts.numel() // levels, indices.shape[-1],
            mask.query_length, mask.key_length, *mask.block_size, LEVELS=levels, TILE=ROWS_PER_TILE,
            num_warps=8,
        )  # fmt: skip
    return density
