"""Executed density of the mask of a call."""

import torch

from core.block_mask import BlockSparseMask
from core.level_mask import LevelMask
from kernels_common.triton_choice import runs_triton


def mask_density(mask: BlockSparseMask | LevelMask) -> torch.Tensor:
    """What ``mask.density()`` counts, by one small launch on a GPU instead of a dense matrix of blocks.

    Args:
        mask (BlockSparseMask | LevelMask): its lists are trusted.

    Returns:
        Tensor: 0-d fp64 on the mask's device, read without a synchronisation.
    """
    if not runs_triton(mask.counts) or not mask.query_length * mask.key_length:
        return mask.density()
    from kernels_common.mask_density_triton import mask_density_triton

    return mask_density_triton(mask)
