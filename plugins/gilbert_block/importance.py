"""Which key blocks matter to which query block: sampled or mean tokens, in all dimensions or in a few.

Shape letters: B batch, H heads, N tokens, M blocks, D head dimension, R directions.
"""

import math
from typing import Literal

import torch

from kernels_common.block_importance import (
    BlockSample,
    mean_pool_importance,
    sample_blocks,
    sampled_max_importance,
    sampled_sum_importance,
)
from kernels_common.block_statistics import block_means
from kernels_common.permutation import gather_tokens

Estimator = Literal["max", "sum", "mean"]
Projection = Literal["none", "pca", "random"]
POWER_ITERATIONS = 4


def block_importance(
    query: torch.Tensor,
    key: torch.Tensor,
    block_size: tuple[int, int],
    generator: torch.Generator,
    *,
    order: torch.Tensor | None = None,
    estimator: Estimator = "sum",
    samples: int = 32,
    projection: Projection = "none",
    directions: int = 16,
) -> torch.Tensor:
    """Estimated importance of every (query block, key block) pair; rows sum to 1.

    Sampled tokens are read where they stand in the model's sequence; only ``"mean"`` reorders all of it.

    Args:
        query (Tensor): ``[B, Hq, N, D]`` in the model's order.
        key (Tensor): ``[B, Hkv, N, D]``, likewise; Hq is a multiple of Hkv.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        generator (torch.Generator): source of samples and directions, on the device of ``query``.
        order (Tensor, Optional): ``[N]`` int64 token order of the blocks. Default: the model's
        estimator (str): ``"sum"`` of the attention weights between sampled tokens of two blocks; ``"max"``,
            the largest of them (BLADE, arXiv 2508.10774); ``"mean"``, weight between mean tokens
            (SpargeAttn, arXiv 2502.18137). Default: ``"sum"``
        samples (int): sampled tokens of a query block, a power of two; key blocks of another size give in
            proportion. Default: 32
        projection (str): ``"none"``; ``"pca"``, scores within the strongest directions of the head;
            ``"random"``, within random ones. Default: ``"none"``
        directions (int): dimensions that a projection leaves. Default: 16

    Returns:
        Tensor: ``[B, Hq, Mq, Mk]`` fp32.
    """
    scale = 1.0 / math.sqrt(query.shape[3])
    length = query.shape[2]
    if estimator == "mean":
        if order is not None:
            query, key = gather_tokens(query, order), gather_tokens(key, order)
        query, key = block_means(query, block_size[0]).mean, block_means(key, block_size[1]).mean
        query, key = _projected(query, key, projection, directions, generator)
        return mean_pool_importance(query, key, scale=scale)
    shares = (samples, max(1, samples * block_size[1] // block_size[0]))
    drawn = [sample_blocks(length, *sizes, generator) for sizes in zip(block_size, shares, strict=True)]
    query_sample, key_sample = (_in_order(sample, order) for sample in drawn)
    if projection != "none":
        query, key = gather_tokens(query, query_sample.positions), gather_tokens(key, key_sample.positions)
        query, key = _projected(query, key, projection, directions, generator)
        query_sample, key_sample = _all_tokens(query_sample), _all_tokens(key_sample)
    pool = sampled_max_importance if estimator == "max" else sampled_sum_importance
    return pool(query, key, query_sample, key_sample, scale=scale)


def _in_order(sample: BlockSample, order: torch.Tensor | None) -> BlockSample:
    return sample if order is None else BlockSample(order[sample.positions], sample.per_block)


def _all_tokens(sample: BlockSample) -> BlockSample:
    """The sample of a sequence that holds the sampled tokens only."""
    positions = torch.arange(len(sample.positions), device=sample.positions.device)
    return BlockSample(positions, sample.per_block)


def _projected(
    query: torch.Tensor,
    key: torch.Tensor,
    projection: Projection,
    directions: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in few dimensions, fp32, whose products estimate those in all dimensions."""
    dim = query.shape[3]
    if projection == "none" or directions >= dim:
        return query, key
    query, key = query.float(), key.float()
    random = torch.randn(dim, directions, generator=generator, device=query.device)
    basis_DR = torch.linalg.qr(random).Q
    if projection == "random":
        return query @ basis_DR, key @ (basis_DR * (dim / directions))  # unbiased over the draw
    basis_BHDR = principal_directions(query, key, basis_DR)
    group = query.shape[1] // key.shape[1]
    return query @ basis_BHDR.repeat_interleave(group, 1), key @ basis_BHDR


def principal_directions(query: torch.Tensor, key: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Strongest directions of each key head, by a few power iterations that wait for no device.

    Queries and keys count alike. Keys are taken from their mean: an offset that all keys share changes no
    softmax.

    Args:
        query (Tensor): ``[B, Hq, N, D]`` fp32.
        key (Tensor): ``[B, Hkv, N, D]`` fp32.
        start (Tensor): ``[D, R]`` fp32 with orthonormal columns.

    Returns:
        Tensor: ``[B, Hkv, D, R]`` fp32, orthonormal columns.
    """
    keys = key - key.mean(2, keepdim=True)
    queries = query.reshape(*key.shape[:2], -1, query.shape[3])
    moment = _unit_moment(queries) + _unit_moment(keys)
    basis = start.expand(*key.shape[:2], -1, -1)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(moment @ basis).Q
    return basis


def _unit_moment(tokens: torch.Tensor) -> torch.Tensor:
    """Second moments of ``[B, H, N, D]`` tokens, scaled to trace 1: ``[B, H, D, D]``."""
    moments = tokens.transpose(2, 3) @ tokens
    return moments / moments.diagonal(dim1=2, dim2=3).sum(-1).clamp(min=1e-30)[..., None, None]
