"""What a plugin's own tests look like: the conformance suite, and what is special to the method."""

from random_blocks.strategy import RandomBlocksStrategy

from core import AttentionContext, TokenLayout
from core.testing import StrategyConformance, random_qkv


class TestRandomBlocks(StrategyConformance):
    strategy = RandomBlocksStrategy
    parameters = {"keep_ratio": 0.4, "block_size": 64}
    full_density = {"keep_ratio": 1.0}


def test_another_seed_keeps_other_blocks():
    layout = TokenLayout(16, 8, 8, 16)
    qkv = random_qkv(layout)
    outputs = [RandomBlocksStrategy(seed=seed)(*qkv, AttentionContext(layout)) for seed in (0, 1)]
    assert not outputs[0].equal(outputs[1])
