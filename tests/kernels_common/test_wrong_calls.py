"""What a newcomer passes by mistake to the public operators: a message says what was expected."""

import pytest
import torch

from core import BlockSparseMask, LayoutError, LevelMask, ParameterError, UnsupportedCallError
from kernels_common import (
    attend_blocks,
    block_means,
    block_sparse_attention,
    gather_tokens,
    invert_permutation,
    lists_from_blocks,
    mean_pool_importance,
    merge_by_lse,
    pooled_attention,
    resolve_backend,
    sample_blocks,
    sampled_sum_importance,
    select_mass,
    select_top_k,
    token_mean,
)

TOKENS = torch.zeros(1, 2, 128, 16)
LISTS = TOKENS.tolist()
MASK = BlockSparseMask.full((64, 64), 128, 128)
LEVELS = LevelMask.from_block_mask(MASK)
IMPORTANCE = torch.ones(1, 2, 2, 2)
SIZES = ((64, 64), 128, 128)
SOURCE = torch.Generator()


def sparse(**options):
    return block_sparse_attention(TOKENS, TOKENS, TOKENS, MASK, **options)


def mass(share):
    return select_mass(IMPORTANCE, share, *SIZES, include_crossing=True)


CALLS = {
    "query in lists": (
        lambda: block_sparse_attention(LISTS, TOKENS, TOKENS, MASK),
        LayoutError,
        "query must be a tensor, got list",
    ),
    "no key": (
        lambda: block_sparse_attention(TOKENS, None, TOKENS, MASK),
        LayoutError,
        "key must be a tensor, got NoneType",
    ),
    "a scale in words": (
        lambda: sparse(scale="x"),
        ParameterError,
        "scale must be positive and finite, got 'x'",
    ),
    "causal in words": (
        lambda: sparse(causal="no"),
        ParameterError,
        "causal must be True or False, got 'no'",
    ),
    "causal as a number": (
        lambda: attend_blocks(TOKENS, TOKENS, TOKENS, MASK, causal=1),
        ParameterError,
        "causal must be True or False, got 1",
    ),
    "key lengths in a list": (lambda: sparse(key_lengths=[4]), LayoutError, "key_lengths must be a tensor"),
    "a bias in a list": (lambda: sparse(bias=[1.0]), LayoutError, "bias must be a tensor"),
    "sizes in a list": (lambda: sparse(key_sizes=[1]), LayoutError, "key_sizes must be a tensor"),
    "sizes of more keys": (
        lambda: sparse(key_sizes=torch.ones(1, 1, 129)),
        LayoutError,
        r"key_sizes must be numbers .* at most 128.* got \(1, 1, 129\)",
    ),
    "yes and no as sizes": (
        lambda: sparse(key_sizes=torch.ones(1, 1, TOKENS.shape[2], dtype=torch.bool)),
        LayoutError,
        "got .* torch.bool",
    ),
    "sizes with a gradient": (
        lambda: sparse(key_sizes=torch.ones(1, 1, 128, requires_grad=True)),
        UnsupportedCallError,
        "no gradient for key_sizes; pass key_sizes.detach",
    ),
    "a bias with a gradient": (
        lambda: sparse(bias=torch.zeros(1, 1, 128, requires_grad=True)),
        UnsupportedCallError,
        "no gradient for bias; pass bias.detach",
    ),
    "sizes and a bias": (
        lambda: sparse(key_sizes=torch.ones(1, 1, TOKENS.shape[2]), bias=torch.zeros(1, 1, TOKENS.shape[2])),
        UnsupportedCallError,
        "bias or key_sizes",
    ),
    "a threshold in a list": (
        lambda: attend_blocks(TOKENS, TOKENS, TOKENS, MASK, skip_threshold=[1.0]),
        LayoutError,
        "skip_threshold must be a tensor",
    ),
    "pooled lists": (
        lambda: pooled_attention(LISTS, TOKENS, TOKENS, LEVELS),
        LayoutError,
        "query must be a tensor",
    ),
    "pooled with a scale in words": (
        lambda: pooled_attention(TOKENS, TOKENS, TOKENS, LEVELS, scale="x"),
        ParameterError,
        "got 'x'",
    ),
    "backend of lists": (lambda: resolve_backend(LISTS, MASK), LayoutError, "query must be a tensor"),
    "tokens in lists": (
        lambda: gather_tokens(LISTS, torch.arange(4)),
        LayoutError,
        r"tokens\[0\] must be a tensor",
    ),
    "an order in a list": (lambda: gather_tokens(TOKENS, [0, 1]), LayoutError, "order must be a tensor"),
    "no tokens": (lambda: gather_tokens((), torch.arange(4)), LayoutError, "at least one tensor"),
    "inverse of a list": (lambda: invert_permutation([1, 0]), LayoutError, "order must be a tensor"),
    "inverse of floats": (lambda: invert_permutation(torch.zeros(2)), LayoutError, "int32 or int64"),
    "means of lists": (lambda: block_means(LISTS, 64), LayoutError, "tokens must be a tensor"),
    "means of half blocks": (
        lambda: block_means(TOKENS, 64.0),
        ParameterError,
        "whole number of tokens.*got 64.0",
    ),
    "means of blocks in words": (lambda: block_means(TOKENS, "64"), ParameterError, "got '64'"),
    "an offset in a list": (
        lambda: block_means(TOKENS, 64, subtract=[1]),
        LayoutError,
        "subtract must be a tensor",
    ),
    "mean of lists": (lambda: token_mean(LISTS), LayoutError, "tokens must be a tensor"),
    "top of a list": (lambda: select_top_k([[1.0]], 1, *SIZES), LayoutError, "importance must be a tensor"),
    "top with one block size": (lambda: select_top_k(IMPORTANCE, 1, 64, 128, 128), LayoutError, "got 64 and"),
    "top with empty blocks": (
        lambda: select_top_k(IMPORTANCE, 1, (0, 64), 128, 128),
        LayoutError,
        r"got \(0, 64\)",
    ),
    "top of half tokens": (lambda: select_top_k(IMPORTANCE, 1, (64, 64), 128.0, 128), LayoutError, "128.0"),
    "top with a list": (
        lambda: select_top_k(IMPORTANCE, 1, *SIZES, forced=[[True]]),
        LayoutError,
        "forced must be a tensor",
    ),
    "top true": (lambda: select_top_k(IMPORTANCE, True, *SIZES), ParameterError, "keep must be an int"),
    "mass in words": (
        lambda: mass("a"),
        ParameterError,
        "mass must be a share of the importance > 0, got 'a'",
    ),
    "no mass": (lambda: mass(None), ParameterError, "got None"),
    "lists of a list": (lambda: lists_from_blocks([[True]]), LayoutError, "blocks must be a tensor"),
    "merging lists": (
        lambda: merge_by_lse(LISTS, TOKENS[..., 0], TOKENS, TOKENS[..., 0]),
        LayoutError,
        "output must be a tensor",
    ),
    "merging outputs as sums": (
        lambda: merge_by_lse(*[TOKENS] * 4),
        LayoutError,
        r"with log-sum-exp \[..., Nq\]",
    ),
    "importance of lists": (
        lambda: mean_pool_importance(LISTS, TOKENS),
        LayoutError,
        "queries must be a tensor",
    ),
    "half samples": (lambda: sample_blocks(128.0, 64, 8, SOURCE), ParameterError, "of 128.0 tokens"),
    "samples of nothing": (
        lambda: sample_blocks(128, 64, 8, None),
        ParameterError,
        "must be a torch.Generator",
    ),
    "no samples": (
        lambda: sampled_sum_importance(TOKENS, TOKENS, None, None),
        LayoutError,
        "must come from sample_blocks",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS.keys())
def test_a_message_says_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
