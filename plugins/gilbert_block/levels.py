"""Pooling levels by importance: how coarsely each key block is seen (PSA, arXiv 2512.04025).

Forced blocks are of level 1 and count in none of the numbers, as in `kernels_common.selection`.
Shape letters: B batch, H heads, M blocks.
"""

import torch
import torch.nn.functional as F

from core.block_mask import block_count
from core.level_mask import LEVELS
from kernels_common.selection import MASS_UNIT, ROUNDING
from kernels_common.triton_choice import runs_triton

COARSEST = LEVELS[-1]


def levels_by_rank(importance: torch.Tensor, bounds: tuple[float, ...], forced: torch.Tensor) -> torch.Tensor:
    """The most important blocks whole, the next ones pooled, the rest left out.

    Args:
        importance (Tensor): ``[B, H, Mq, Mk]``, not negative.
        bounds (tuple[float, ...]): for each level the share of the key blocks that have it or a finer one,
            not decreasing.
        forced (Tensor): ``[Mq, Mk]`` bool.

    Returns:
        Tensor: ``[B, H, Mq, Mk]`` int8, 0 left out.
    """
    blocks = importance.shape[3]
    finest, *others = (int(bound * blocks + ROUNDING) for bound in bounds)
    numbers = (max(1, finest), *others)  # no row is empty
    if runs_triton(importance):
        from plugins.gilbert_block.kernels import rank_levels

        return rank_levels(importance, numbers, forced)
    of_rank = torch.zeros(blocks, dtype=torch.int8, device=importance.device)
    for level, number in reversed(list(zip(LEVELS, numbers, strict=True))):
        of_rank[:number] = level
    _, order = _ranked(importance, forced)
    return _levels_of_ranks(of_rank.expand(order.shape), order, forced)


def levels_by_mass(
    importance: torch.Tensor, bounds: tuple[float, ...], least: float, forced: torch.Tensor
) -> torch.Tensor:
    """As many blocks of each level as hold a share of the importance together with the finer ones.

    The block with which a share is reached is included, unless not one block of the level fits into it.

    Args:
        importance (Tensor): ``[B, H, Mq, Mk]``, not negative.
        bounds (tuple[float, ...]): for each level the share of the importance of all blocks that have it or a
            finer one, not decreasing; from 1 on every block.
        least (float): share of the key blocks that level 1 has at least.
        forced (Tensor): ``[Mq, Mk]`` bool.

    Returns:
        Tensor: ``[B, H, Mq, Mk]`` int8, 0 left out.
    """
    blocks = importance.shape[3]
    fewest = max(1, int(least * blocks + ROUNDING))
    if runs_triton(importance):
        from plugins.gilbert_block.kernels import mass_levels

        return mass_levels(importance, bounds, fewest, forced)
    ranked, order = _ranked(importance, forced)
    sums = (ranked.clamp(min=0.0).to(torch.float64) * MASS_UNIT).to(torch.int64).cumsum(-1)
    total = sums[..., -1].to(torch.float64)
    place = torch.arange(blocks, device=order.device)
    passed = torch.zeros_like(order, dtype=torch.int8)  # levels that end before a rank
    end = torch.full_like(sums[..., 0], fewest)
    for level, bound in zip(LEVELS, bounds, strict=True):
        within = (sums <= (bound * total)[..., None]).sum(-1).masked_fill(total == 0, 0)
        opens = (within > end) | (level == 1)
        end = torch.where(opens, torch.maximum(within + 1, end), end)
        if bound >= 1.0:
            end = torch.full_like(end, blocks)
        passed += place >= end[..., None]
    of_rank = (1 << passed).masked_fill(passed == len(LEVELS), 0)
    return _levels_of_ranks(of_rank, order, forced)


def level_caps(key: torch.Tensor, block: int, thresholds: tuple[float, ...]) -> torch.Tensor:
    """Coarsest level whose runs of keys are alike enough to be averaged, for each key block.

    A run is judged by the cosine of two of its keys: the first two of 2, the first and the last of 4 and
    of 8; a block by the mean over its complete runs. The coarsest level above its threshold is taken, 1 if
    there is none.

    Args:
        key (Tensor): ``[B, H, N, D]`` in the order of the blocks.
        block (int): tokens of a key block.
        thresholds (tuple[float, ...]): mean cosine that levels 2, 4 and 8 ask for.

    Returns:
        Tensor: ``[B, H, Mk]`` int8.
    """
    blocks = block_count(key.shape[2], block)
    caps = torch.ones(*key.shape[:2], blocks, dtype=torch.int8, device=key.device)
    for level, threshold in zip(LEVELS[1:], thresholds, strict=True):
        runs = key[:, :, : key.shape[2] // level * level].unflatten(2, (-1, level))
        cosines = F.cosine_similarity(runs[:, :, :, 0].float(), runs[:, :, :, level - 1].float(), dim=-1)
        per_block = block // level
        padded = F.pad(cosines, (0, blocks * per_block - cosines.shape[2])).unflatten(2, (-1, per_block))
        complete = torch.arange(blocks * per_block, device=key.device) < cosines.shape[2]
        means = padded.sum(-1) / complete.view(-1, per_block).sum(-1)  # NaN, not above, without a whole run
        caps.masked_fill_(means > threshold, level)
    return caps


def with_remainder(levels: torch.Tensor) -> torch.Tensor:
    """The same levels with every block that was left out at the coarsest one.

    What is not seen exactly is still seen, once: the global tokens of BLADE (arXiv 2508.10774) count the kept
    blocks a second time.
    """
    return levels.masked_fill(levels == 0, COARSEST)


def _ranked(importance: torch.Tensor, forced: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Importances in order of rank, forced blocks last with -1, and the blocks' indices."""
    candidates = importance.clamp(min=0.0).masked_fill(forced, -1.0)
    return candidates.sort(dim=-1, descending=True, stable=True)


def _levels_of_ranks(of_rank: torch.Tensor, order: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Levels ``[B, H, Mq, Mk]`` int8 of the blocks from those of their ranks."""
    return torch.zeros_like(order, dtype=torch.int8).scatter_(-1, order, of_rank).masked_fill(forced, 1)
