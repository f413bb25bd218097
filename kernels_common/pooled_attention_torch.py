"""Pooled attention in plain PyTorch: as block-sparse attention over a pyramid of keys.

The pyramid holds the keys of all levels, finest first. It is cut into strips of an eighth of a key block: a
listed block is 8 strips at level 1, 4 at level 2, 2 at level 4 and one at level 8. Lists of strips and a bias
``log(n)`` for a key that stands for n tokens make it a call of ``block_sparse_torch.py``, whose memory and
speed it has; the pyramid adds 15/8 of key and value each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from core.block_mask import block_count
from core.level_mask import LEVELS, LevelMask
from kernels_common.block_sparse_torch import block_sparse_attention_torch

STRIPS = LEVELS[-1]


class StripLists(NamedTuple):
    """Block-sparse lists over a pyramid; its batch and head dimensions are those of the level lists."""

    counts: torch.Tensor  # [B or 1, H or 1, Mq] int32
    indices: torch.Tensor  # [B or 1, H or 1, Mq, 8 * Kmax] int32
    block_size: tuple[int, int]


def pooled_attention_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, level_mask: LevelMask, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the listed blocks on any device; reads the counts back to the host once.

    Arguments as in :func:`kernels_common.pooled_attention`.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32.
    """
    key_block = level_mask.block_size[1]
    lists = strip_lists(level_mask)
    return block_sparse_attention_torch(
        query,
        build_pyramid(key, key_block),
        build_pyramid(value, key_block),
        lists.counts,
        lists.indices,
        lists.block_size,
        scale=scale,
        bias=pyramid_bias(key.shape[2], key_block, key.device),
    )


def pyramid_tokens(length: int, key_block: int, device: torch.device) -> torch.Tensor:
    """Tokens behind every key of a pyramid, ``[Mk * key_block * 15 / 8]`` int64; 0 past the sequence."""
    padded = block_count(length, key_block) * key_block
    starts = (torch.arange(0, padded, level, device=device) for level in LEVELS)
    return torch.cat([(length - s).clamp(0, level) for s, level in zip(starts, LEVELS, strict=True)])


def pyramid_bias(length: int, key_block: int, device: torch.device) -> torch.Tensor:
    """Logarithm of :func:`pyramid_tokens` as the bias of block-sparse attention, ``[1, 1, ...]`` fp64."""
    return pyramid_tokens(length, key_block, device).to(torch.float64).log()[None, None]


def build_pyramid(tensor: torch.Tensor, key_block: int) -> torch.Tensor:
    """Means of runs of 1, 2, 4 and 8 tokens, level after level, each filled with zeros to whole blocks.

    Args:
        tensor (Tensor): ``[B, H, N, D]``.
        key_block (int): tokens of a key block; Mk blocks.

    Returns:
        Tensor: ``[B, H, Mk * key_block * 15 / 8, D]`` in the dtype of ``tensor``; means are taken in fp32
        (fp64 for fp64) over the tokens that there are.
    """
    padded = F.pad(tensor, (0, 0, 0, -tensor.shape[2] % key_block))
    tokens = pyramid_tokens(tensor.shape[2], key_block, tensor.device).clamp(min=1)
    sums = [padded.to(torch.promote_types(tensor.dtype, torch.float32))]
    for _ in LEVELS[1:]:
        sums.append(sums[-1].unflatten(2, (-1, 2)).sum(3))
    return (torch.cat(sums, 2) / tokens[:, None]).to(tensor.dtype)


def fold_pyramid(pyramid: torch.Tensor, length: int, key_block: int) -> torch.Tensor:
    """Gradient of the tokens ``[B, H, length, D]`` from that of their pyramid: the transpose of pooling."""
    tokens = pyramid_tokens(length, key_block, pyramid.device).clamp(min=1)
    padded = block_count(length, key_block) * key_block
    per_token = (pyramid / tokens[:, None]).split([padded // level for level in LEVELS], 2)
    folded = per_token[-1]
    for finer in reversed(per_token[:-1]):
        folded = folded.repeat_interleave(2, 2) + finer
    return folded[:, :, :length]


def strip_lists(level_mask: LevelMask) -> StripLists:
    """The lists of ``level_mask`` in strips of the pyramid."""
    listed = level_mask.listed_levels().to(torch.int64)
    strips = torch.where(listed > 0, STRIPS // listed.clamp(min=1), 0)
    begin = strips.cumsum(-1) - strips
    # Level L starts after 8 + 8/2 + ... + 8/(L/2) = 16 - 16/L strips of every key block.
    first = level_mask.key_blocks * (2 * STRIPS - 2 * strips) + level_mask.indices * strips
    offsets = torch.arange(STRIPS, device=level_mask.device)
    width = STRIPS * listed.shape[-1]
    # Slots that an entry does not need are sent to a spare column that is cut off.
    slots = torch.where(offsets < strips[..., None], begin[..., None] + offsets, width).flatten(-2)
    places = (first[..., None] + offsets).flatten(-2)
    indices = torch.zeros(*listed.shape[:-1], width + 1, dtype=torch.int32, device=level_mask.device)
    indices.scatter_(-1, slots, places.to(torch.int32))
    query_block, key_block = level_mask.block_size
    counts = strips.sum(-1, dtype=torch.int32)
    return StripLists(counts, indices[..., :width], (query_block, key_block // STRIPS))
