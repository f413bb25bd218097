"""Pooled attention by its definition: pooled keys and values of every level, dense scores, softmax.

Shape letters: B batch, H query heads, N tokens, P pooled keys of one level, D head dimension.
"""

import torch
import torch.nn.functional as F

from core.block_mask import block_count
from core.level_mask import LEVELS, LevelMask


def pooled_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, level_mask: LevelMask, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the listed blocks in fp32 (fp64 for fp64 inputs), with quadratic memory.

    Arguments as in :func:`kernels_common.pooled_attention`. Differentiable by autograd.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype of ``query``, and the natural
        log-sum-exp ``[B, Hq, Nq]`` fp32.
    """
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    query_BHND = query.to(precise)
    levels = level_mask.to_levels().repeat_interleave(level_mask.block_size[0], -2)
    levels = levels[:, :, : level_mask.query_length]  # [B, H, Nq, Mk]
    scores, values = [], []
    for level in LEVELS:
        key_BHPD, value_BHPD = (
            _run_means(tensor.to(precise), level).repeat_interleave(group, 1) for tensor in (key, value)
        )
        bias_P = _run_lengths(level_mask.key_length, level, query.device).to(precise).log()
        seen = (levels == level).repeat_interleave(level_mask.block_size[1] // level, -1)
        level_scores = query_BHND @ key_BHPD.transpose(-1, -2) * scale + bias_P  # [B, H, Nq, P]
        scores.append(level_scores.masked_fill(~seen[..., : len(bias_P)], float("-inf")))
        values.append(value_BHPD)
    all_scores = torch.cat(scores, -1)
    lse = torch.logsumexp(all_scores, dim=-1)  # -inf where nothing is seen
    shift = lse.masked_fill(lse.isneginf(), 0.0)[..., None]
    output = torch.exp(all_scores - shift) @ torch.cat(values, 2)
    return output.to(query.dtype), lse.to(torch.float32)


def _run_lengths(length: int, level: int, device: torch.device) -> torch.Tensor:
    """Tokens behind every pooled key, ``[ceil(length / level)]``; only the last has fewer than ``level``."""
    return (length - torch.arange(0, length, level, device=device)).clamp(max=level)


def _run_means(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """Means of runs of ``level`` tokens, the last over the tokens that there are: ``[B, H, P, D]``."""
    length = tensor.shape[2]
    runs = F.pad(tensor, (0, 0, 0, -length % level)).unflatten(2, (block_count(length, level), level))
    return runs.sum(3) / _run_lengths(length, level, tensor.device)[:, None]
