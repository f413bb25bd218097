import pytest
import torch

from core import AttentionContext, TokenLayout
from core.block_mask import block_lengths
from core.notices import warn_once
from core.testing import random_qkv
from plugins.sparge.budget import TOLERANCE, density_budget
from plugins.sparge.prediction import forced_blocks
from plugins.sparge.strategy import SpargeStrategy

HUNYUAN = TokenLayout(9, 5, 16, 16, text_first=False)
COGVIDEOX = TokenLayout(12, 5, 16, 16)
WAN = TokenLayout(0, 5, 16, 16)
GRIDS = (HUNYUAN, COGVIDEOX, WAN, TokenLayout(0, 2, 17, 19))
PUBLISHED = (TokenLayout(226, 13, 30, 45), TokenLayout(226, 11, 48, 85), TokenLayout(16, 17, 12, 20))


@pytest.fixture(autouse=True)
def _unsaid():
    warn_once.cache_clear()


def budget(layout, density, block, sink=False):
    return density_budget(layout, density, forced_blocks(layout, block, sink=sink), block)


@pytest.mark.parametrize("density", [0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("layout", GRIDS, ids=TokenLayout.describe)
def test_the_report_is_what_was_asked_for(layout, block, density, caplog):
    strategy = SpargeStrategy(density=density, block_size=block)
    strategy(*random_qkv(layout), AttentionContext(layout))
    executed = strategy.report().density
    assert executed == pytest.approx(budget(layout, density, (block, 64)).density, abs=1e-12)
    # Half a block, and what a short last row cannot give.
    nearest = block * 64 / layout.sequence_length**2
    least = budget(layout, 1e-9, (block, 64)).density
    assert executed == pytest.approx(max(density, least), abs=nearest)
    warned = [record for record in caplog.records if f"density {density:g} is" in record.getMessage()]
    assert len(warned) == (abs(executed - density) > TOLERANCE * density)
    assert not warned or f"is {executed:.3f}" in warned[0].getMessage()


@pytest.mark.parametrize("density", [0.2, 0.3, 0.45, 0.6])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("layout", PUBLISHED, ids=TokenLayout.describe)
def test_published_shapes(layout, block, density, caplog):
    found = budget(layout, density, (block, 64))
    assert found.density == pytest.approx(density, abs=block * 64 / layout.sequence_length**2)
    assert not caplog.records


@pytest.mark.parametrize("order", ["model", "gilbert"])
@pytest.mark.parametrize("sink", [False, True])
def test_pairs_are_counted(sink, order):
    """Text, a sink, short last blocks of queries and keys: the sum over the mask itself."""
    layout = TokenLayout(70, 3, 13, 17)
    options = {"density": 0.5, "attention_sink": sink, "order": order}
    strategy = SpargeStrategy(**options)
    query, key, _ = random_qkv(layout)
    pairs = strategy.pattern(query, key, AttentionContext(layout)).mask.to_dense()
    found = budget(layout, 0.5, (128, 64), sink)
    assert float(pairs.double().mean()) == pytest.approx(found.density, abs=1e-12)
    assert pairs[..., layout.sequence_length // 64 * 64 :].all()
    assert found.density == pytest.approx(0.5, abs=128 * 64 / layout.sequence_length**2)


def test_rows_share_the_budget_evenly():
    keep = budget(TokenLayout(0, 1, 64, 64), 0.3, (64, 64)).keep[0]  # 64 x 64 blocks: 19.2 of a row
    assert keep.sum() == round(0.3 * 64 * 64) and set(keep.tolist()) == {19, 20}
    extra = (keep == 20).nonzero()[:, 0]
    assert (extra.diff() - 64 / len(extra)).abs().max() < 1


def test_every_row_chooses_a_block_and_a_density_out_of_reach_is_named(caplog):
    found = budget(HUNYUAN, 0.05, (64, 64))
    free = (~found.forced).sum(-1)
    assert torch.equal(found.keep[0].long(), free.clamp(max=1))
    rows = block_lengths(HUNYUAN.sequence_length, 64)
    pairs = rows @ (found.forced * rows).sum(-1) + rows @ found.keep[0].long() * 64
    assert found.density == pytest.approx(int(pairs) / HUNYUAN.sequence_length**2)
    assert f"density 0.05 is out of reach for {HUNYUAN.describe()}" in caplog.text
    assert f"is {found.density:.3f}" in caplog.text and found.density > 0.053


def test_topk_is_a_share_of_the_blocks(caplog):
    plan = SpargeStrategy(topk=0.3).plan(COGVIDEOX, 2, 64, torch.device("cpu"), torch.float32)
    assert plan.keep == 0.3 and not plan.forced[1:, -1].any() and not caplog.records
