"""Operators that more than one sparse-attention method uses."""

from core.dense import attention
from kernels_common.block_importance import (
    BlockSample,
    mean_pool_importance,
    sample_blocks,
    sampled_max_importance,
    sampled_sum_importance,
)
from kernels_common.block_sparse_attention import (
    BlockSparseOutput,
    attend_blocks,
    block_sparse_attention,
)
from kernels_common.block_sparse_backends import resolve_backend
from kernels_common.block_statistics import BlockStatistics, block_means, token_mean
from kernels_common.lse_merge import merge_by_lse
from kernels_common.permutation import gather_tokens, invert_permutation, scatter_tokens
from kernels_common.pooled_attention import pooled_attention, resolve_pooled_backend
from kernels_common.selection import lists_from_blocks, select_mass, select_top_k

__all__ = [
    "BlockSample",
    "BlockSparseOutput",
    "BlockStatistics",
    "attend_blocks",
    "attention",
    "block_means",
    "block_sparse_attention",
    "gather_tokens",
    "invert_permutation",
    "lists_from_blocks",
    "mean_pool_importance",
    "merge_by_lse",
    "pooled_attention",
    "resolve_backend",
    "resolve_pooled_backend",
    "sample_blocks",
    "sampled_max_importance",
    "sampled_sum_importance",
    "scatter_tokens",
    "select_mass",
    "select_top_k",
    "token_mean",
]
