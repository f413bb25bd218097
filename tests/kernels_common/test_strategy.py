"""The base class of block-sparse methods: orders are applied and undone, text parameters are read."""

from typing import ClassVar

import pytest
import torch

from core import (
    AttentionContext,
    BlockSparseMask,
    LevelMask,
    ParameterError,
    TokenLayout,
    UnsupportedCallError,
)
from core.testing import StrategyConformance, dense_fp64, random_qkv
from kernels_common.pooled_attention_reference import pooled_attention_reference
from kernels_common.strategy import (
    BlockSparseParameters,
    BlockSparseStrategy,
    SparsePattern,
    attend_pattern,
)


class BandInOrder(BlockSparseStrategy):
    """A band of blocks over a fixed shuffle of the tokens."""

    name: ClassVar[str] = "band-in-order"

    def pattern(self, query, key, context):
        length, size = query.shape[2], self.parameters.block_size
        order = torch.randperm(length, generator=torch.Generator().manual_seed(length)).to(query.device)
        rows = torch.arange(-(-length // size), device=query.device)
        mask = BlockSparseMask.from_blocks((rows[:, None] - rows).abs() <= 1, (size, size), length, length)
        return SparsePattern(mask, mask.density(), order)


class TestBandInOrder(StrategyConformance):
    strategy = BandInOrder
    parameters = {"block_size": 64}


def test_order_is_applied_and_undone():
    layout = TokenLayout(10, 5, 8, 8)
    query, key, value = random_qkv(layout)
    strategy = BandInOrder(block_size=64)
    context = AttentionContext(layout)
    output = strategy(query, key, value, context)
    pattern = strategy.pattern(query, key, context)
    allowed = torch.zeros(1, 1, layout.sequence_length, layout.sequence_length, dtype=torch.bool)
    rows = pattern.order.expand(layout.sequence_length, -1)
    allowed[0, 0, rows.T, rows] = pattern.mask.to_dense()[0, 0]
    scores = (query.double() @ key.double().transpose(-1, -2)) / 8
    expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value.double()
    assert (output - expected).abs().max() < 5e-6
    assert (output - dense_fp64(query, key, value)).abs().max() > 1e-2


def test_block_size_is_read_from_text_and_checked():
    assert BlockSparseParameters(block_size="64").block_size == 64
    with pytest.raises(ParameterError, match="block_size: Input should be 64 or 128, got 96"):
        BandInOrder(block_size="96")


def level_pattern(length, order=None, **options):
    levels = torch.tensor([1, 2, 0, 4, 8], dtype=torch.int8)
    rows = -(-length // 64)
    places = (torch.arange(rows)[:, None] + torch.arange(rows)) % len(levels)
    mask = LevelMask.from_levels(levels[places], (64, 64), length, length)
    return SparsePattern(mask, mask.density(), order, **options)


def test_a_level_mask_runs_pooled_attention_in_its_order(generator):
    tensors = torch.randn(3, 1, 2, 330, 64, generator=generator).unbind(0)
    order = torch.randperm(330, generator=generator)
    pattern = level_pattern(330, order)
    result = attend_pattern(*tensors, pattern, "auto")
    moved = (part[:, :, order].double() for part in tensors)
    expected, _ = pooled_attention_reference(*moved, pattern.mask, scale=1 / 8)
    assert (result.output[:, :, order] - expected).abs().max() < 5e-6
    assert result.backend == "torch" and result.density == pattern.density


@pytest.mark.parametrize("causal, options", [(True, {}), (False, {"quantization": "int8_fp16"})], ids=str)
def test_pooled_blocks_refuse_what_their_operator_does_not_know(causal, options):
    tensors = torch.zeros(3, 1, 2, 330, 64).unbind(0)
    with pytest.raises(UnsupportedCallError, match="use a BlockSparseMask"):
        attend_pattern(*tensors, level_pattern(330, **options), "auto", causal=causal)
