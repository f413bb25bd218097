"""Gradients of pooled attention in plain PyTorch: those of block-sparse attention over a pyramid, folded."""

import torch

from core.level_mask import LevelMask
from kernels_common.block_sparse_backward_torch import block_sparse_attention_backward_torch
from kernels_common.pooled_attention_torch import build_pyramid, fold_pyramid, pyramid_bias, strip_lists


def pooled_attention_backward_torch(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    level_mask: LevelMask,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients on any device; reads the counts back to the host once.

    Args:
        grad_output (Tensor): ``[B, Hq, Nq, D]`` in the dtype of ``query``.
        grad_lse (Tensor, Optional): ``[B, Hq, Nq]`` fp32; ignored where a query sees no key.

    The other arguments are as in :func:`kernels_common.pooled_attention`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: gradients of query, key and value in their dtype and memory order.
    """
    key_block = level_mask.block_size[1]
    precise = torch.promote_types(key.dtype, torch.float32)  # so that levels are added before rounding
    lists = strip_lists(level_mask)
    grad_query, *grad_pyramids = block_sparse_attention_backward_torch(
        grad_output,
        grad_lse,
        query,
        build_pyramid(key, key_block).to(precise),
        build_pyramid(value, key_block).to(precise),
        lists.counts,
        lists.indices,
        lists.block_size,
        scale=scale,
        bias=pyramid_bias(key.shape[2], key_block, key.device),
    )
    grad_key, grad_value = (
        torch.empty_like(part).copy_(fold_pyramid(gradient, part.shape[2], key_block))
        for part, gradient in zip((key, value), grad_pyramids, strict=True)
    )
    return grad_query, grad_key, grad_value
