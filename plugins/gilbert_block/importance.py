"""Which key blocks matter to which query block: sampled or mean tokens, in all dimensions or in a few.

Shape letters: B batch, H heads, N tokens, M blocks, D head dimension.
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
from kernels_common.score_projection import Projection, reduce_tokens

Estimator = Literal["max", "sum", "mean"]


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

    Tokens are read where they stand in the model's sequence.

    Args:
        query (Tensor): ``[B, Hq, N, D]`` in the model's order.
        key (Tensor): ``[B, Hkv, N, D]``, likewise; Hq is a multiple of Hkv.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        generator (torch.Generator): source of the samples, on the device of ``query``.
        order (Tensor, Optional): ``[N]`` int32 or int64 token order of the blocks. Default: the model's
        estimator (str): ``"sum"`` of the attention weights between sampled tokens of two blocks; ``"max"``,
            the largest of them (BLADE, arXiv 2508.10774); ``"mean"``, weight between mean tokens
            (SpargeAttn, arXiv 2502.18137). Default: ``"sum"``
        samples (int): sampled tokens of a query block, a power of two; key blocks of another size give in
            proportion. Default: 32
        projection (str): in which dimensions tokens are compared: ``"none"``, all; ``"optimal"``, ``"pca"``,
            ``"channels"`` or ``"random"``, as :func:`kernels_common.score_projection.score_projection` finds
            them from the sampled or mean tokens. Default: ``"none"``
        directions (int): dimensions that a projection leaves. Default: 16

    Returns:
        Tensor: ``[B, Hq, Mq, Mk]`` fp32.
    """
    scale = 1.0 / math.sqrt(query.shape[3])
    length = query.shape[2]
    if estimator == "mean":
        query, key = (
            block_means(part, size, order=order).mean
            for part, size in zip((query, key), block_size, strict=True)
        )
        query, key = reduce_tokens(query, key, projection, directions)
        return mean_pool_importance(query, key, scale=scale)
    shares = (samples, max(1, samples * block_size[1] // block_size[0]))
    drawn = [sample_blocks(length, *sizes, generator) for sizes in zip(block_size, shares, strict=True)]
    query_sample, key_sample = (_in_order(sample, order) for sample in drawn)
    if projection != "none":
        query, key = gather_tokens(query, query_sample.positions), gather_tokens(key, key_sample.positions)
        query, key = reduce_tokens(query, key, projection, directions)
        query_sample, key_sample = _all_tokens(query_sample), _all_tokens(key_sample)
    pool = sampled_max_importance if estimator == "max" else sampled_sum_importance
    return pool(query, key, query_sample, key_sample, scale=scale)


def _in_order(sample: BlockSample, order: torch.Tensor | None) -> BlockSample:
    return sample if order is None else BlockSample(order[sample.positions], sample.per_block)


def _all_tokens(sample: BlockSample) -> BlockSample:
    """The sample of a sequence that holds the sampled tokens only."""
    positions = torch.arange(len(sample.positions), device=sample.positions.device)
    return BlockSample(positions, sample.per_block)
