"""The semantic form: queries and keys sorted by cluster, blocks chosen from the centroids."""

from typing import NamedTuple

import torch

from core.block_mask import BlockSparseMask
from core.context import AttentionContext
from core.layout import TokenLayout
from core.random import call_generator
from kernels_common.strategy import SparsePattern
from plugins.svg_smart.clusters import cluster_sizes, covered_blocks, k_means, kept_pairs
from plugins.svg_smart.patterns import forced_blocks


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
    previous: Centroids | None,
) -> tuple[SparsePattern, Centroids]:
    """Cluster the video tokens of a call and keep the blocks that the chosen cluster pairs touch.

    Text stays at its place, sees everything and is seen by all.

    Args:
        query (Tensor): ``[B, H, S, D]``.
        key (Tensor): ``[B, H, S, D]``.
        context (AttentionContext): layout, layer and step.
        options (ClusterOptions): numbers of clusters, iterations and the mass to keep.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        previous (Centroids, Optional): of an earlier step of the same layer. Default: random tokens
    """
    layout = context.layout
    generator = call_generator(options.seed, context, query.device)
    iterations = options.iterations if previous is not None else options.first_iterations
    labels, centroids = [], []
    for index, (part, clusters) in enumerate(((query, options.query_clusters), (key, options.key_clusters))):
        video = part[:, :, layout.video_slice].flatten(0, 1)
        if previous is None:
            chosen = torch.randperm(video.shape[1], generator=generator, device=video.device)[:clusters]
            start = video[:, chosen].float()
        else:
            start = (previous.query, previous.key)[index]
        label, centroid = k_means(video, start, iterations)
        labels.append(label)
        centroids.append(centroid)
    sizes = cluster_sizes(labels[1], centroids[1].shape[1])
    kept = kept_pairs(centroids[0], centroids[1], sizes, mass=options.mass, least_share=options.least_share)
    orders, spans = zip(
        *(_sorted(label, layout, size) for label, size in zip(labels, block_size, strict=True)), strict=True
    )
    blocks = covered_blocks(kept, *spans).view(*query.shape[:2], spans[0].shape[1], spans[1].shape[1])
    blocks |= forced_blocks(layout, block_size, diagonal=False).to(blocks.device)
    length = layout.sequence_length
    mask = BlockSparseMask.from_blocks(blocks, block_size, length, length)
    query_order, key_order = (order.view(*query.shape[:2], length) for order in orders)
    pattern = SparsePattern(mask, order=query_order, key_order=key_order)
    return pattern, Centroids(context.step_index, centroids[0], centroids[1])


def _sorted(labels: torch.Tensor, layout: TokenLayout, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token order ``[H, S]`` by label, and first and last label of every block ``[H, M, 2]``."""
    heads, length = labels.shape[0], layout.sequence_length
    ranked, order = labels.sort(dim=-1, stable=True)
    whole = torch.arange(length, device=labels.device).repeat(heads, 1)
    whole[:, layout.video_slice] = layout.video_start + order
    # A block that begins or ends in text is kept whole; any label inside it will do there.
    spread = ranked.new_zeros(heads, length)
    spread[:, layout.video_slice] = ranked
    if not layout.text_first:
        spread[:, layout.text_slice] = ranked[:, -1:]
    firsts = torch.arange(0, length, block, device=labels.device)
    lasts = (firsts + block - 1).clamp(max=length - 1)
    return whole, torch.stack([spread[:, firsts], spread[:, lasts]], -1)
