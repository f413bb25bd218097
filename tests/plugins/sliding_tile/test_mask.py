import itertools
import math

import pytest
import torch

from core import ParameterError, TokenLayout
from plugins.sliding_tile.mask import (
    allowed_density,
    executed_density,
    half_window,
    sliding_tile_mask,
    visible_tiles,
    window_blocks,
    window_for_density,
)
from plugins.sliding_tile.reference import allowed_pairs, kept_blocks, token_order
from plugins.sliding_tile.tiles import Tiling

COGVIDEOX = TokenLayout(226, 13, 30, 45)
HUNYUAN = TokenLayout(256, 30, 48, 80, text_first=False)
DEMO = TokenLayout(16, 17, 12, 20)
SMALL = [
    (TokenLayout(7, 4, 6, 8), (2, 3, 4)),  # divides the grid, but 24 tokens are no block
    (TokenLayout(16, 4, 8, 6), (2, 4, 2)),  # divides the grid, 16 tokens
    (TokenLayout(0, 5, 7, 5), (2, 3, 4)),
    (TokenLayout(3, 5, 5, 6, text_first=False), (4, 2, 3)),
    (TokenLayout(2, 1, 9, 10), (1, 2, 3)),
]
WINDOWS = [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 1), (9, 9, 9)]


@pytest.mark.parametrize("layout, tile", SMALL)
def test_blocks_equal_a_count_of_all_pairs(layout, tile):
    tiling, order = Tiling(layout, tile), token_order(layout, tile)
    windows = [window for window in WINDOWS if all(map(fits, window, tiling.counts))]
    assert len(windows) >= 4
    for window in windows:
        allowed = allowed_pairs(layout, tile, window)
        assert allowed_density(tiling, window) == pytest.approx(float(allowed.double().mean()), abs=1e-12)
        for block in (16, 64):
            expected = kept_blocks(allowed, order, layout, block)
            assert torch.equal(window_blocks(tiling, window, block), expected)


def fits(seen, count):
    return seen % 2 == 1 or seen >= count


def test_every_tile_sees_as_many_tiles():
    for counts in ((5, 3, 4), (7, 1, 6), (2, 8, 9)):
        tiling = Tiling(TokenLayout(0, *counts), (1, 1, 1))
        for window in itertools.product((1, 3, 5), repeat=3):
            if not all(map(fits, window, counts)):
                continue
            seen = visible_tiles(tiling, window)
            assert (seen.sum(-1) == math.prod(map(min, window, counts))).all()
            assert seen.diagonal().all()


def test_windows_move_inwards_at_the_border():
    tiling = Tiling(TokenLayout(0, 1, 1, 7), (1, 1, 1))
    seen = [row.nonzero().flatten().tolist() for row in visible_tiles(tiling, (1, 1, 3))]
    assert seen == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [4, 5, 6]]


@pytest.mark.parametrize(
    "window, sparsity", [((5, 5, 5), 0.5833), ((3, 3, 3), 0.91), ((5, 3, 3), 0.85), ((1, 6, 10), 0.8)]
)
def test_the_papers_tile_is_exact_in_blocks_of_128(window, sparsity):
    """6x8x8 = 384 tokens on 30x48x80: three blocks, no pair beside the window; sparsity without text."""
    video = Tiling(TokenLayout(0, 30, 48, 80), (6, 8, 8))
    assert executed_density(video, window, 128) == allowed_density(video, window)
    assert 1 - allowed_density(video, window) == pytest.approx(sparsity, abs=5e-5)
    tiling = Tiling(HUNYUAN, (6, 8, 8))
    assert executed_density(tiling, window, 128) == pytest.approx(allowed_density(tiling, window), abs=1e-12)
    assert executed_density(tiling, window, 64) == pytest.approx(allowed_density(tiling, window), abs=1e-12)


@pytest.mark.parametrize("layout, tile, block", [(COGVIDEOX, (4, 4, 8), 128), (DEMO, (4, 4, 4), 64)])
def test_uneven_grids_execute_a_superset(layout, tile, block):
    tiling = Tiling(layout, tile)
    for window in ((1, 1, 1), (3, 1, 3), half_window(tiling)):
        allowed, executed = allowed_density(tiling, window), executed_density(tiling, window, block)
        assert allowed < executed < allowed + 0.06
        mask = sliding_tile_mask(tiling, [window], block)
        mask.check()
        assert float(mask.density()) == pytest.approx(executed, abs=1e-12)


def test_heads_of_the_mask_are_the_windows():
    tiling = Tiling(DEMO, (4, 4, 4))
    windows = [(1, 1, 1), (3, 3, 1), (5, 1, 3)]
    blocks = sliding_tile_mask(tiling, windows, 64).to_blocks()
    assert blocks.shape[:2] == (1, 3)
    for head, window in enumerate(windows):
        assert torch.equal(blocks[0, head], window_blocks(tiling, window, 64))


@pytest.mark.parametrize("layout, block", [(COGVIDEOX, 128), (DEMO, 64), (TokenLayout(0, 8, 16, 16), 128)])
@pytest.mark.parametrize("density", [0.2, 0.35, 0.6, 1.0])
def test_window_of_a_density_is_the_evenest_within_it(layout, block, density):
    tiling = Tiling(layout, (4, 4, 4) if block == 64 else (4, 4, 8))
    counts = tiling.counts
    axes = [{*range(1, count, 2), count} for count in counts]
    within = {
        window: allowed_density(tiling, window)
        for window in itertools.product(*axes)
        if executed_density(tiling, window, block) <= density
    }
    chosen = window_for_density(tiling, density, block)
    evenness = {window: min(map(lambda k, n: k / n, window, counts)) for window in within}
    assert evenness[chosen] == max(evenness.values())
    evenest = [window for window in within if evenness[window] == evenness[chosen]]
    assert within[chosen] == max(within[window] for window in evenest)
    assert (chosen == counts) == (density == 1.0)


def test_an_even_window_must_fill_the_axis():
    tiling = Tiling(DEMO, (4, 4, 4))  # 5x3x5 tiles
    assert executed_density(tiling, (6, 4, 8), 64) == 1.0
    with pytest.raises(ParameterError, match="got 4 of 5 tiles; take 3 or 5"):
        window_blocks(tiling, (4, 3, 5), 64)
