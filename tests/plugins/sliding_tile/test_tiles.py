import math

import pytest
import torch

from core import ParameterError, TokenLayout
from core.testing import dense_fp64
from kernels_common import gather_tokens, scatter_tokens
from plugins.sliding_tile.reference import token_order
from plugins.sliding_tile.tiles import MOST_TILES, Tiling, fitting_tile

HUNYUAN = TokenLayout(256, 30, 48, 80, text_first=False)
GRIDS = [
    (TokenLayout(7, 4, 6, 8), (2, 3, 4)),
    (TokenLayout(0, 5, 7, 9), (2, 3, 4)),
    (TokenLayout(3, 3, 5, 4, text_first=False), (4, 2, 3)),
    (TokenLayout(2, 1, 6, 7), (1, 4, 4)),
    (TokenLayout(2, 13, 1, 1), (64, 1, 1)),
]


@pytest.mark.parametrize("layout, tile", GRIDS)
def test_order_equals_the_reference_and_goes_back(layout, tile):
    order = Tiling(layout, tile).order()
    assert order.tolist() == token_order(layout, tile)
    assert torch.equal(order.sort().values, torch.arange(layout.sequence_length))
    tokens = torch.randn(1, 2, layout.sequence_length, 3)
    assert torch.equal(scatter_tokens(gather_tokens(tokens, order), order), tokens)


@pytest.mark.parametrize("layout, tile", GRIDS)
def test_tiles_are_runs_of_the_sequence(layout, tile):
    tiling = Tiling(layout, tile)
    frames, places = layout.token_frames(), layout.token_places()
    video = tiling.order()[: layout.video_length]
    rows, columns = places[video] // layout.width, places[video] % layout.width
    cells = torch.stack([frames[video], rows, columns], -1) // torch.tensor(tile)
    assert torch.equal(cells, tiling.places().repeat_interleave(tiling.tokens(), 0))
    assert tiling.tokens().sum() == layout.video_length
    assert torch.equal(
        tiling.order()[layout.video_length :], torch.arange(layout.sequence_length)[layout.text_slice]
    )


def test_smaller_tiles_stand_last():
    tiling = Tiling(TokenLayout(7, 13, 30, 45), (4, 4, 8))
    tokens = tiling.tokens()
    full = tokens == 128
    assert full.sum() == 3 * 7 * 5 and full[: int(full.sum())].all()
    assert tokens[~full].max() < 128 and len(tokens) == math.prod(tiling.counts) == 4 * 8 * 6


def test_attention_does_not_depend_on_the_order():
    layout = TokenLayout(5, 3, 4, 7)
    order = Tiling(layout, (2, 3, 4)).order()
    tensors = tuple(torch.randn(3, 2, 2, layout.sequence_length, 16, dtype=torch.float64).unbind(0))
    moved = dense_fp64(*gather_tokens(tensors, order))
    assert (scatter_tokens(moved, order) - dense_fp64(*tensors)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "grid, block, tile",
    [
        ((13, 30, 45), 128, (4, 4, 8)),
        ((11, 48, 85), 128, (2, 8, 8)),
        ((30, 48, 80), 128, (2, 8, 8)),
        ((21, 45, 80), 128, (4, 4, 8)),
        ((17, 12, 20), 64, (4, 4, 4)),
        ((1, 64, 64), 128, (1, 8, 16)),
        ((13, 1, 1), 64, (64, 1, 1)),
        ((1, 1, 1), 64, (1, 1, 1)),
    ],
)
def test_automatic_tiles(grid, block, tile):
    assert fitting_tile(TokenLayout(3, *grid), block) == tile
    assert math.prod(tile) == block or grid == (1, 1, 1)


def test_a_tile_that_divides_the_grid_is_found():
    for grid in ((8, 8, 16), (6, 24, 40), (30, 48, 80)):
        for block in (64, 128):
            tile = fitting_tile(TokenLayout(3, *grid), block)
            assert all(size % side == 0 for size, side in zip(grid, tile, strict=True))


def test_too_many_tiles_are_refused():
    with pytest.raises(
        ParameterError, match=rf"1, 1, 1\) cuts .* into 115200 tiles, expected at most {MOST_TILES}"
    ):
        Tiling(HUNYUAN, (1, 1, 1))
