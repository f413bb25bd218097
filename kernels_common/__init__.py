"""Operators that more than one sparse-attention method uses."""

from core.dense import attention
from kernels_common.block_sparse_attention import block_sparse_attention, resolve_backend
from kernels_common.lse_merge import merge_by_lse
from kernels_common.permutation import gather_tokens, invert_permutation, scatter_tokens

__all__ = [
    "attention",
    "block_sparse_attention",
    "gather_tokens",
    "invert_permutation",
    "merge_by_lse",
    "resolve_backend",
    "scatter_tokens",
]
