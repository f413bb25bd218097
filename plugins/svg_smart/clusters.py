"""Semantic order: tokens grouped by k-means, cluster pairs chosen by their centroids (arXiv 2505.18875).

Shape letters: H heads of all batch entries, S tokens, C clusters, D head dimension.
"""

import torch
import torch.nn.functional as F

DISTANCES_PER_CHUNK = 1 << 26


def k_means(
    points: torch.Tensor, centroids: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm on every head at once; an empty cluster keeps its centroid.

    Args:
        points (Tensor): ``[H, S, D]``.
        centroids (Tensor): ``[H, C, D]`` fp32, where to start.
        iterations (int): number of updates, >= 0.

    Returns:
        tuple[Tensor, Tensor]: labels ``[H, S]`` int64 and the centroids that they were given by,
        ``[H, C, D]`` fp32.
    """
    for _ in range(iterations):
        labels = nearest(points, centroids)
        index = labels[..., None].expand_as(points)
        sums = torch.zeros_like(centroids).scatter_add_(1, index, points.float())
        sizes = cluster_sizes(labels, centroids.shape[1])[..., None]
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    return nearest(points, centroids), centroids


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Closest centroid of every point by Euclidean distance, ``[H, S]`` int64."""
    half_norms = 0.5 * centroids.square().sum(-1)[:, None]
    step = max(1, DISTANCES_PER_CHUNK // (points.shape[1] * centroids.shape[1]))
    labels = [
        (points[i : i + step].float() @ centroids[i : i + step].transpose(1, 2) - half_norms[i : i + step])
        .argmax(-1)
        for i in range(0, len(points), step)
    ]  # fmt: skip
    return torch.cat(labels)


def cluster_sizes(labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Tokens of every cluster, ``[H, C]`` int64."""
    ones = torch.ones_like(labels)
    return labels.new_zeros(labels.shape[0], clusters).scatter_add_(1, labels, ones)


def kept_pairs(
    query_centroids: torch.Tensor,
    key_centroids: torch.Tensor,
    key_sizes: torch.Tensor,
    *,
    mass: float,
    least_share: float,
) -> torch.Tensor:
    """Key clusters that each query cluster attends to, ``[H, Cq, Ck]`` bool.

    The estimated weight of a key cluster is its size times the exponential of the scaled product of the
    centroids. Clusters are taken in falling weight until their share reaches ``mass`` (the one that crosses
    it included), and at least ``least_share`` of the clusters.

    Args:
        query_centroids (Tensor): ``[H, Cq, D]`` fp32.
        key_centroids (Tensor): ``[H, Ck, D]`` fp32.
        key_sizes (Tensor): ``[H, Ck]`` int64; empty clusters weigh nothing.
        mass (float): share of the estimated weight, in (0, 1].
        least_share (float): smallest share of key clusters, in [0, 1].
    """
    scores = query_centroids @ key_centroids.transpose(1, 2) * query_centroids.shape[-1] ** -0.5
    shares = (scores + key_sizes.log()[:, None]).softmax(-1)
    ranked, order = shares.sort(-1, descending=True)
    before = F.pad(ranked.cumsum(-1), (1, 0))[..., :-1]
    rank = torch.arange(shares.shape[-1], device=shares.device)
    taken = (before < mass) | (rank < least_share * shares.shape[-1])
    if mass >= 1:
        taken = torch.ones_like(taken)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def covered_blocks(kept: torch.Tensor, query_spans: torch.Tensor, key_spans: torch.Tensor) -> torch.Tensor:
    """Blocks of sorted tokens that hold any kept pair of clusters, ``[H, Mq, Mk]`` bool.

    Args:
        kept (Tensor): ``[H, Cq, Ck]`` bool.
        query_spans (Tensor): ``[H, Mq, 2]`` int64, first and last cluster that a query block touches.
        key_spans (Tensor): ``[H, Mk, 2]`` int64, likewise.
    """
    summed = F.pad(kept.to(torch.int32).cumsum(1).cumsum(2), (1, 0, 1, 0))

    def corner(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        wide = summed.gather(1, rows[..., None].expand(-1, -1, summed.shape[2]))
        return wide.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))

    first_row, last_row = query_spans[..., 0], query_spans[..., 1] + 1
    first_column, last_column = key_spans[..., 0], key_spans[..., 1] + 1
    inside = corner(last_row, last_column) - corner(first_row, last_column)
    inside += corner(first_row, first_column) - corner(last_row, first_column)
    return inside > 0
