import pytest
import torch
import torch.nn.functional as F

from core import LevelMask, TokenLayout
from plugins.gilbert_block import reference
from plugins.gilbert_block.levels import level_caps, levels_by_mass, levels_by_rank, with_remainder
from plugins.gilbert_block.mask import adaptive_top_k, forced_blocks

BLOCKS = 40


@pytest.fixture
def importance():
    """Rows of very different sharpness, with ties."""
    draw = torch.rand(1, 2, BLOCKS, BLOCKS) ** torch.tensor([1.0, 12.0])[:, None, None]
    draw[..., 5:9] = draw[..., 5:6]
    return draw / draw.sum(-1, keepdim=True)


@pytest.fixture
def forced():
    forced = torch.eye(BLOCKS, dtype=torch.bool)
    forced[:, -2:] = forced[-2:] = True
    return forced


@pytest.mark.parametrize(
    "bounds",
    [(0.05, 0.15, 0.25, 0.5), (0.1, 0.15, 0.15, 0.35), (0.29, 1.0, 1.0, 1.0), (0.001, 0.01, 0.2, 0.2)],
)
def test_levels_by_rank_are_the_definition(bounds, importance, forced):
    found = levels_by_rank(importance, bounds, forced)
    for head in range(2):
        for row in range(BLOCKS):
            expected = reference.rank_row(importance[0, head, row], bounds, forced[row])
            assert torch.equal(found[0, head, row], expected)


def test_density_by_rank_is_the_cost_of_its_levels(importance):
    nothing = torch.zeros(BLOCKS, BLOCKS, dtype=torch.bool)
    levels = levels_by_rank(importance, (0.05, 0.15, 0.25, 0.5), nothing)
    length = BLOCKS * 64
    mask = LevelMask.from_levels(levels, (64, 64), length, length)
    assert float(mask.density()) == pytest.approx(0.05 + 0.1 / 2 + 0.1 / 4 + 0.25 / 8)
    whole = LevelMask.from_levels(with_remainder(levels), (64, 64), length, length)
    assert float(whole.density()) == pytest.approx(0.05 + 0.1 / 2 + 0.1 / 4 + 0.75 / 8)


@pytest.mark.parametrize(
    "bounds", [(0.5, 0.6, 0.7, 0.8), (0.6, 0.7, 0.7, 0.8), (0.3, 0.3, 0.3, 1.0), (0.01, 0.02, 0.03, 0.5)]
)
@pytest.mark.parametrize("least", [0.01, 0.3])
def test_levels_by_mass_are_the_definition(bounds, least, importance, forced):
    found = levels_by_mass(importance, bounds, least, forced)
    for head in range(2):
        for row in range(BLOCKS):
            expected = reference.mass_row(
                importance[0, head, row], bounds, max(1, int(least * BLOCKS)), forced[row]
            )
            assert torch.equal(found[0, head, row], expected), (head, row)


def test_levels_by_mass_hold_their_shares(importance):
    bounds = (0.5, 0.6, 0.7, 0.8)
    nothing = torch.zeros(BLOCKS, BLOCKS, dtype=torch.bool)
    levels = levels_by_mass(importance, bounds, 0.01, nothing)
    for level, bound in zip((1, 8), (bounds[0], bounds[3]), strict=True):
        held = (importance * ((levels > 0) & (levels <= level))).sum(-1)
        assert (held >= bound - 1e-5).all() if level == 1 else (held > bounds[0] - 1e-5).all()


def test_a_row_without_importance_keeps_few_blocks(forced):
    levels = levels_by_mass(torch.zeros(1, 1, BLOCKS, BLOCKS), (0.5, 0.6, 0.7, 0.8), 0.05, forced)
    assert ((levels[0, 0, 0] > 0).sum()) == 3 + 2


def test_similarity_caps_by_hand():
    """Blocks of 16: all alike, alike in pairs, alike in fours, all different; then a ragged one of 6."""
    directions = torch.eye(64)
    runs = [16, 2, 4, 1]
    parts = [directions[torch.arange(16) // run] for run in runs]
    key = torch.cat([*parts, directions[:1].expand(6, -1)])[None, None]
    assert level_caps(key, 16, (0.7, 0.65, 0.6)).tolist() == [[[8, 2, 4, 1, 4]]]
    assert level_caps(key[:, :, :1], 16, (0.7, 0.65, 0.6)).tolist() == [[[1]]]


def test_similarity_caps_are_mean_cosines():
    key = torch.randn(1, 1, 32, 8)
    pair = F.cosine_similarity(key[0, 0, ::2], key[0, 0, 1::2], dim=-1).view(2, 8).mean(-1)
    threshold = float(pair.mean())
    expected = [2 if value > threshold else 1 for value in pair.tolist()]
    assert level_caps(key, 16, (threshold, 1.0, 1.0)).tolist() == [[expected]]


@pytest.mark.parametrize(
    "layout", [TokenLayout(20, 3, 7, 9), TokenLayout(100, 2, 8, 9, text_first=False), TokenLayout(0, 3, 8, 9)]
)
@pytest.mark.parametrize("blocks", [(64, 64), (32, 64), (64, 16)], ids=str)
def test_forced_blocks_hold_text_or_lie_on_the_diagonal(layout, blocks):
    length = layout.sequence_length
    tokens = torch.eye(length, dtype=torch.bool)
    tokens[layout.text_slice] = tokens[:, layout.text_slice] = True
    expected = [[bool(cell.any()) for cell in row.split(blocks[1], 1)] for row in tokens.split(blocks[0])]
    assert forced_blocks(layout, blocks).tolist() == expected


def test_adaptive_top_k_adds_blocks_to_flat_rows(forced):
    """Of 40 blocks the share 0.1 is 4; rows whose first 4 hold 95, 80 and 40 %."""
    row = torch.full((3, BLOCKS), 0.0)
    for index, share in enumerate((0.95, 0.8, 0.4)):
        row[index] = (1 - share) / (BLOCKS - 4)
        row[index, 10:14] = share / 4
    importance = torch.zeros(1, 1, BLOCKS, BLOCKS)
    importance[0, 0, :3] = row
    nothing = torch.zeros_like(forced)
    length = BLOCKS * 64
    mask = adaptive_top_k(importance, 0.1, (64, 64), length, length, nothing)
    assert mask.counts[0, 0, :3].tolist() == [4, 8, 12]
    assert mask.to_blocks()[0, 0, :3, 10:14].all()
    kept = adaptive_top_k(importance, 0.1, (64, 64), length, length, forced)
    assert (kept.to_blocks()[0, 0] >= forced).all() and kept.counts[0, 0, 0] == 4 + 3


@pytest.mark.parametrize("tau, least, most", [(0.3, 0.01, 1.0), (0.9, 0.05, 0.4), (0.6, 0.5, 1.0)])
def test_energy_blocks_are_the_definition(tau, least, most, importance, forced):
    from kernels_common.selection import select_mass

    length = BLOCKS * 64
    bounds = {"min_blocks": least, "max_blocks": most, "forced": forced}
    mask = select_mass(importance, tau, (64, 64), length, length, include_crossing=True, **bounds)
    kept = mask.to_blocks()
    numbers = (max(1, int(least * BLOCKS)), int(most * BLOCKS))
    for head in range(2):
        for row in range(BLOCKS):
            expected = reference.energy_row(importance[0, head, row], tau, *numbers, forced[row])
            assert torch.equal(kept[0, head, row], expected)
    if most == 1.0:
        assert ((importance * kept).sum(-1) >= tau - 1e-5).all()
