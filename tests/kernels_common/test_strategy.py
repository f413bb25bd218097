"""The base class of block-sparse methods: orders are applied and undone, text parameters are read."""

from typing import ClassVar

import pytest
import torch

from core import AttentionContext, BlockSparseMask, ParameterError, TokenLayout
from core.testing import StrategyConformance, dense_fp64, random_qkv
from kernels_common.strategy import BlockSparseParameters, BlockSparseStrategy, SparsePattern


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
