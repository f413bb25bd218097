"""What a newcomer passes by mistake to the public functions of `core`: a message says what was expected."""

import pytest
import torch

from core import (
    AttentionContext,
    BlockSparseMask,
    LayoutError,
    LevelMask,
    ParameterError,
    StrategyNotFoundError,
    TokenLayout,
    attention,
    call_generator,
    create_strategy,
)

LAYOUT = TokenLayout(0, 2, 8, 8)
TOKENS = torch.zeros(1, 2, 128, 16)
LISTS = TOKENS.tolist()
BLOCKS = torch.ones(2, 2, dtype=torch.bool)

CALLS = {
    "attention of lists": (lambda: attention(LISTS, TOKENS, TOKENS), LayoutError, "query must be a tensor"),
    "attention in 3D": (lambda: attention(TOKENS[0], TOKENS, TOKENS), LayoutError, r"\[B, H, N, D\]"),
    "attention of integers": (lambda: attention(*[TOKENS.int()] * 3), LayoutError, "floating dtype"),
    "attention of two dtypes": (
        lambda: attention(TOKENS, TOKENS.half(), TOKENS),
        LayoutError,
        "torch.float16 on cpu",
    ),
    "a scale in words": (lambda: attention(TOKENS, TOKENS, TOKENS, scale="a"), ParameterError, "got 'a'"),
    "causal in words": (
        lambda: attention(TOKENS, TOKENS, TOKENS, causal="no"),
        ParameterError,
        "causal must be True or False, got 'no'",
    ),
    "a strategy of lists": (
        lambda: create_strategy("dense")(LISTS, TOKENS, TOKENS, AttentionContext(LAYOUT)),
        LayoutError,
        "query must be a tensor, got list",
    ),
    "a strategy of two dtypes": (
        lambda: create_strategy("dense")(TOKENS, TOKENS, TOKENS.double(), AttentionContext(LAYOUT)),
        LayoutError,
        "value torch.float64 on cpu",
    ),
    "a strategy of no batch": (
        lambda: create_strategy("dense")(TOKENS[:0], TOKENS[:0], TOKENS[:0], AttentionContext(LAYOUT)),
        LayoutError,
        r"at least one batch entry.*query \(0, 2, 128, 16\)",
    ),
    "a layout for a context": (
        lambda: create_strategy("dense")(TOKENS, TOKENS, TOKENS, LAYOUT),
        LayoutError,
        r"such as AttentionContext\(layout\)",
    ),
    "a context of numbers": (lambda: AttentionContext((0, 2, 8, 8)), LayoutError, "must be a TokenLayout"),
    "a generator of nothing": (lambda: call_generator(0, None, "cpu"), LayoutError, "got NoneType"),
    "a preset by number": (
        lambda: create_strategy("dense", preset=3),
        StrategyNotFoundError,
        "by its name, got 3",
    ),
    "no strategy": (lambda: create_strategy(None), StrategyNotFoundError, "by its name"),
    "blocks in a list": (
        lambda: BlockSparseMask.from_blocks([[True]], (64, 64), 64, 64),
        LayoutError,
        "blocks must be a tensor",
    ),
    "blocks of half tokens": (
        lambda: BlockSparseMask.from_blocks(BLOCKS, (64.0, 64.0), 128, 128),
        LayoutError,
        r"got \(64.0, 64.0\)",
    ),
    "half tokens": (
        lambda: BlockSparseMask.from_blocks(BLOCKS, (64, 64), 128.0, 128),
        LayoutError,
        "and 128.0, 128",
    ),
    "blocks of words": (lambda: BlockSparseMask.full(("a", "b"), 128, 128), LayoutError, r"got \('a', 'b'\)"),
    "one block size": (lambda: BlockSparseMask.full(64, 128, 128), LayoutError, "got 64 and"),
    "mask of half tokens": (
        lambda: BlockSparseMask(
            torch.ones(1, 1, 1, dtype=torch.int32),
            torch.zeros(1, 1, 1, 1, dtype=torch.int32),
            (64, 0),
            64,
            64,
        ),
        LayoutError,
        r"got \(64, 0\)",
    ),
    "mask of lists": (lambda: BlockSparseMask([1], [1], (64, 64), 64, 64), LayoutError, "counts must be"),
    "no flex mask": (lambda: BlockSparseMask.from_flex(None), LayoutError, "expected a BlockMask"),
    "levels in a list": (
        lambda: LevelMask.from_levels([[1]], (64, 64), 64, 64),
        LayoutError,
        "levels must be a tensor",
    ),
    "levels with one block size": (
        lambda: LevelMask.from_levels(BLOCKS.to(torch.int8), 64, 128, 128),
        LayoutError,
        "got 64 and",
    ),
    "levels of lists": (
        lambda: LevelMask([1], [1], (64, 64), 64, 64),
        LayoutError,
        "counts must be a tensor",
    ),
    "levels of a tensor": (
        lambda: LevelMask.from_block_mask(BLOCKS),
        LayoutError,
        "expected a BlockSparseMask",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS.keys())
def test_a_message_says_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
