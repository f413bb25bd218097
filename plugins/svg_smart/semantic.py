"""The semantic form: queries and keys sorted by cluster, blocks chosen by their predicted mass."""

from typing import NamedTuple

import torch

from core.context import AttentionContext
from core.layout import TokenLayout
from core.random import call_generator
from kernels_common import select_mass
from kernels_common.strategy import SparsePattern
from plugins.svg_smart.clusters import alike_in_a_row, block_members, k_means, predicted_mass


class Centroids(NamedTuple):
    """Centroids of one layer, where its next step starts.

    Args:
        step (int): denoising step that they belong to.
        query (Tensor): ``[B * H, Cq, D]`` fp32.
        key (Tensor): ``[B * H, Ck, D]`` fp32.
    """

    step: int
    query: torch.Tensor
    key: torch.Tensor


class ClusterOptions(NamedTuple):
    """Numbers of the semantic form, see `SvgSmartParameters`."""

    query_clusters: int
    key_clusters: int
    mass: float
    least_share: float
    first_iterations: int
    iterations: int
    seed: int


def semantic_pattern(
    query: torch.Tensor,
    key: torch.Tensor,
    context: AttentionContext,
    options: ClusterOptions,
    block_size: tuple[int, int],
    forced: torch.Tensor,
    previous: Centroids | None,
) -> tuple[SparsePattern, Centroids]:
    """Cluster the video tokens of a call and keep the blocks that hold most of the predicted mass.

    Text stays at its place.

    Args:
        query (Tensor): ``[B, H, S, D]``.
        key (Tensor): ``[B, H, S, D]``.
        context (AttentionContext): layout, layer and step.
        options (ClusterOptions): numbers of clusters, iterations and the mass to keep.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        forced (Tensor): ``[Mq, Mk]`` bool, blocks that stay in any case.
        previous (Centroids, Optional): of an earlier step of the same layer. Default: random tokens
    """
    layout, shape = context.layout, query.shape[:2]
    generator = call_generator(options.seed, context, query.device)
    iterations = options.first_iterations if previous is None else options.iterations
    orders, members, centroids = [], [], []
    for index, (part, clusters) in enumerate(((query, options.query_clusters), (key, options.key_clusters))):
        video = part[:, :, layout.video_slice].flatten(0, 1)
        if previous is None:
            chosen = torch.randperm(video.shape[1], generator=generator, device=video.device)[:clusters]
            start = video[:, chosen].float()
        else:
            start = (previous.query, previous.key)[index]
        labels, centroid = alike_in_a_row(*k_means(video, start, iterations))
        ranked, places = labels.sort(dim=-1, stable=True)
        orders.append(_with_text(places, layout).view(*shape, -1))
        members.append(block_members(ranked, centroid.shape[1], layout, block_size[index]))
        centroids.append(centroid)
    importance = predicted_mass(*centroids, *members).unflatten(0, shape)
    mask = select_mass(
        importance, options.mass, block_size, layout.sequence_length, layout.sequence_length,
        include_crossing=True, min_blocks=options.least_share or 1, forced=forced,
    )  # fmt: skip
    pattern = SparsePattern(mask, order=orders[0], key_order=orders[1])
    return pattern, Centroids(context.step_index, *centroids)


def _with_text(places: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Order of all tokens, ``[H, S]`` int64, from that of the video's places."""
    order = torch.arange(layout.sequence_length, device=places.device).repeat(len(places), 1)
    order[:, layout.video_slice] = layout.video_start + places
    return order
