"""Semantic order: tokens grouped by k-means, blocks judged by their clusters' centroids (arXiv 2505.18875).

Shape letters: H heads of all batch entries, S tokens, C clusters, M blocks, D head dimension.
"""

import torch

from core.block_mask import block_count
from core.layout import TokenLayout

DISTANCES_PER_CHUNK = 1 << 26


def k_means(
    points: torch.Tensor, centroids: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm on every head at once; an empty cluster keeps its centroid.

    Equal calls give equal bits: a cluster's points are summed one after the other.

    Args:
        points (Tensor): ``[H, S, D]``.
        centroids (Tensor): ``[H, C, D]`` fp32, where to start.
        iterations (int): number of updates, >= 0.

    Returns:
        tuple[Tensor, Tensor]: labels ``[H, S]`` int64 and the centroids that they were given by,
        ``[H, C, D]`` fp32.
    """
    for _ in range(iterations):
        ranked, order = nearest(points, centroids).sort(dim=-1, stable=True)
        sizes = cluster_starts(ranked, centroids.shape[1]).diff(dim=-1)
        grouped = points.take_along_dim(order[..., None], 1).float()
        # Checked sizes would be read by the host.
        sums = torch.segment_reduce(grouped, "sum", lengths=sizes, axis=1, unsafe=True)
        sizes = sizes[..., None]
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


def cluster_starts(ranked: torch.Tensor, clusters: int) -> torch.Tensor:
    """Where each cluster begins among sorted labels ``[H, S]``, and S: ``[H, C + 1]`` int64."""
    numbers = torch.arange(clusters + 1, device=ranked.device)
    return torch.searchsorted(ranked, numbers.repeat(len(ranked), 1))


def alike_in_a_row(labels: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same clusters under new numbers, by `bisection_order`.

    Args:
        labels (Tensor): ``[H, S]`` int64.
        centroids (Tensor): ``[H, C, D]``.

    Returns:
        tuple[Tensor, Tensor]: labels and centroids, as given.
    """
    order = bisection_order(centroids)
    return order.argsort(-1).gather(1, labels), centroids.take_along_dim(order[..., None], 1)


def bisection_order(points: torch.Tensor) -> torch.Tensor:
    """An order in which neighbours are alike, ``[H, C]`` int64: place ``i`` holds point ``order[i]``.

    All points are sorted along the coordinate in which they spread most and cut in halves, then the halves
    in the same way, down to single points.

    Args:
        points (Tensor): ``[H, C, D]``.
    """
    heads, count, dim = points.shape
    size = 1 << (count - 1).bit_length()
    order = torch.arange(size, device=points.device).repeat(heads, 1)  # from count on copies, to fill up
    while size > 1:
        parts = points.take_along_dim(order[..., None] % count, 1).view(-1, size, dim)
        widest = parts.var(1, correction=0).argmax(-1)
        ranks = parts.take_along_dim(widest[:, None, None], 2)[..., 0].argsort(dim=-1, stable=True)
        order = order.view(-1, size).gather(1, ranks).view(heads, -1)
        size //= 2
    copies_last = (order >= count).long().argsort(dim=-1, stable=True)
    return order.gather(1, copies_last[:, :count])


def block_members(ranked: torch.Tensor, clusters: int, layout: TokenLayout, block: int) -> torch.Tensor:
    """Tokens of every cluster in every block of the sorted sequence, ``[H, M, C]`` fp32.

    Args:
        ranked (Tensor): ``[H, video tokens]`` int64, sorted labels, which stand where the video does.
        clusters (int): number of clusters.
        layout (TokenLayout): text, of no cluster, and grid.
        block (int): tokens of a block.
    """
    ends = layout.video_start + cluster_starts(ranked, clusters)[:, None]
    block_starts = (
        torch.arange(block_count(layout.sequence_length, block), device=ranked.device)[:, None] * block
    )
    first = torch.maximum(ends[..., :-1], block_starts)
    last = torch.minimum(ends[..., 1:], block_starts + block)
    return (last - first).clamp(min=0).float()


def predicted_mass(
    query_centroids: torch.Tensor,
    key_centroids: torch.Tensor,
    query_members: torch.Tensor,
    key_members: torch.Tensor,
) -> torch.Tensor:
    """Attention mass of every block if all tokens stood at their centroids, ``[H, Mq, Mk]`` fp32.

    The weight of a key cluster is its size times the exponential of the scaled product of the centroids (the
    estimate of arXiv 2505.18875), spread evenly over its tokens.

    Args:
        query_centroids (Tensor): ``[H, Cq, D]`` fp32.
        key_centroids (Tensor): ``[H, Ck, D]`` fp32.
        query_members (Tensor): ``[H, Mq, Cq]`` of `block_members`.
        key_members (Tensor): ``[H, Mk, Ck]`` of `block_members`; empty clusters weigh nothing.

    Returns:
        Tensor: rows sum to 1, or to 0 in blocks without video.
    """
    sizes = key_members.sum(1, keepdim=True)
    scores = query_centroids @ key_centroids.transpose(1, 2) * query_centroids.shape[-1] ** -0.5
    weights = (scores + sizes.log()).softmax(-1)
    query_shares = query_members / query_members.sum(-1, keepdim=True).clamp(min=1)
    return query_shares @ weights @ (key_members / sizes.clamp(min=1)).transpose(1, 2)
