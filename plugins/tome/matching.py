"""For every source token the destination that is most similar to it, without a matrix of all pairs.

Shape letters: S sources and C candidates of one chunk, F features of one token.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from core.errors import ParameterError
from kernels_common.triton_choice import runs_triton
from plugins.tome.partition import Partition

Metric = Literal["kv_norm", "k", "mean_k"]

SIMILARITIES_PER_CHUNK = 1 << 22


def best_destinations(
    key: torch.Tensor, value: torch.Tensor, partition: Partition, metric: Metric
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest similarity of every source and where it lies; the first place among equals.

    The similarity is the cosine of two tokens' features: ``"kv_norm"`` takes ``[k, |k|, v, |v|]``, so that
    lengths count beside directions; ``"k"`` the key (arXiv 2210.09461); ``"mean_k"`` the mean key of all
    heads, so that all heads merge alike. Products are summed in fp32.

    Args:
        key (Tensor): ``[B, H, S, D]``.
        value (Tensor): ``[B, H, S, D]``.
        partition (Partition): at least one source; on the device of ``key``.
        metric (str): ``"kv_norm"``, ``"k"`` or ``"mean_k"``.

    Returns:
        tuple[Tensor, Tensor]: similarity -1 to 1, ``[B, H, Ns]`` fp32, and place in
        ``partition.destinations``, ``[B, H, Ns]`` int64; H is 1 with ``"mean_k"``.

    Raises:
        ParameterError: there is no such metric.
    """
    if metric not in get_args(Metric):
        raise ParameterError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
    if metric == "mean_k":
        key = key.mean(1, keepdim=True, dtype=torch.float32)
    values = value if metric == "kv_norm" else None
    if runs_triton(key):
        from plugins.tome.kernels import best_destinations_triton, supports_matching

        if supports_matching(key):
            return best_destinations_triton(key, values, partition)
    return best_destinations_torch(key, values, partition)


def matching_cost(query: torch.Tensor, key: torch.Tensor, partition: Partition, metric: Metric) -> float:
    """Multiply-adds of one matching as a share of those of dense attention, scores and output."""
    products = {"kv_norm": 2 * key.shape[1], "k": key.shape[1], "mean_k": 1}[metric]
    pairs = len(partition.sources) * partition.candidates.shape[1]
    return pairs * products / (2 * query.shape[1] * query.shape[2] ** 2)


def best_destinations_torch(
    key: torch.Tensor, value: torch.Tensor | None, partition: Partition
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain form of `best_destinations`; ``value`` None compares keys alone, without their lengths."""
    near_BHNF = _features(key, value, partition.destinations)
    shape = (*key.shape[:2], len(partition.sources))
    similarity = torch.empty(shape, dtype=torch.float32, device=key.device)
    place = torch.empty(shape, dtype=torch.int64, device=key.device)
    shared = len(partition.candidates) == 1
    per_tile = partition.tiles.shape[1] * partition.candidates.shape[1] * shape[0] * shape[1]
    tiles_per_chunk = max(1, SIMILARITIES_PER_CHUNK // per_tile)
    for tiles in torch.arange(len(partition.tiles), device=key.device).split(tiles_per_chunk):
        rows = partition.tiles[tiles].flatten()
        own_BHSF = _features(key, value, partition.sources[rows])
        if shared:
            best, at = (own_BHSF @ near_BHNF.mT).max(-1)
        else:
            candidates = partition.candidates[tiles].long()  # [tiles, C]
            own = own_BHSF.unflatten(2, (len(tiles), -1))
            best, at = (own @ near_BHNF[:, :, candidates].mT).max(-1)  # [B, H, tiles, TILE]
            at = candidates.expand(*shape[:2], -1, -1).gather(-1, at)
        similarity.index_copy_(2, rows.long(), best.flatten(2, -1))
        place.index_copy_(2, rows.long(), at.flatten(2, -1))
    return similarity, place


def _features(key: torch.Tensor, value: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Unit feature vectors of some tokens, ``[B, H, N, F]`` fp32; zero for a zero token."""
    parts = [key[:, :, tokens].float()]
    if value is not None:
        parts.append(value[:, :, tokens].float())
        parts += [part.norm(dim=-1, keepdim=True) for part in parts]
    return F.normalize(torch.cat(parts, dim=-1), dim=-1)
