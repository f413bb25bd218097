"""Tiles: boxes of tokens that cut the video grid, and the order that makes each a run of the sequence."""

import itertools
import math
from dataclasses import dataclass

import torch

from core.errors import ParameterError
from core.layout import TokenLayout

Box = tuple[int, int, int]  # along frames, rows, columns

MOST_TILES = 1 << 13  # pairs of tiles are held as a matrix: 8192 tiles take about 0.6 GB for a moment


@dataclass(frozen=True)
class Tiling:
    """The tiles of one grid; where a tile does not divide an axis, the last one there is smaller.

    Tiles of full size stand first in the sequence, the smaller ones after them, text at the end: as many
    tiles as possible begin at a multiple of the tokens of a tile. Inside both groups tiles are row-major,
    and so are the tokens inside a tile.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        tile (Box): tokens of a full tile along frames, rows and columns.

    Raises:
        ParameterError: the tile is so small that the grid has more than ``MOST_TILES``.
    """

    layout: TokenLayout
    tile: Box

    def __post_init__(self) -> None:
        if math.prod(self.counts) > MOST_TILES:
            raise ParameterError(
                f"sliding-tile: tile {self.tile} cuts {self.layout.describe()} into {math.prod(self.counts)} "
                f"tiles, expected at most {MOST_TILES}; take a larger tile, or tile='auto'"
            )

    @property
    def counts(self) -> Box:
        """Tiles along each axis."""
        frames, rows, columns = (-(-size // tile) for size, tile in zip(self.grid, self.tile, strict=True))
        return frames, rows, columns

    @property
    def grid(self) -> Box:
        """Tokens along each axis."""
        return self.layout.frames, self.layout.height, self.layout.width

    def lengths(self, axis: int) -> torch.Tensor:
        """Tokens of the tiles along one axis, ``[n]`` int64; only the last may be shorter."""
        starts = torch.arange(0, self.grid[axis], self.tile[axis])
        return (self.grid[axis] - starts).clamp(max=self.tile[axis])

    def places(self) -> torch.Tensor:
        """Coordinates of all tiles in the order of the sequence, ``[T, 3]`` int64."""
        axes = torch.meshgrid(*map(torch.arange, self.counts), indexing="ij")
        places = torch.stack(axes, -1).view(-1, 3)
        tokens = self._tokens_at(places)
        return places[torch.argsort((tokens < tokens[0]).long(), stable=True)]

    def tokens(self) -> torch.Tensor:
        """Tokens of all tiles in the order of the sequence, ``[T]`` int64."""
        return self._tokens_at(self.places())

    def order(self) -> torch.Tensor:
        """Place ``i`` of the reordered sequence holds token ``order[i]``; ``[S]`` int64."""
        axes = torch.meshgrid(*map(torch.arange, self.grid), indexing="ij")
        tile_of_token = self._row_major(torch.stack(axes, -1).view(-1, 3) // torch.tensor(self.tile))
        rank = torch.argsort(self._row_major(self.places()))
        video = torch.argsort(rank[tile_of_token], stable=True) + self.layout.video_start
        text = torch.arange(self.layout.text_length) + self.layout.text_start
        return torch.cat([video, text])

    def _tokens_at(self, places: torch.Tensor) -> torch.Tensor:
        frames, rows, columns = (self.lengths(axis)[places[:, axis]] for axis in range(3))
        return frames * rows * columns

    def _row_major(self, places: torch.Tensor) -> torch.Tensor:
        _, rows, columns = self.counts
        return (places[:, 0] * rows + places[:, 1]) * columns + places[:, 2]


def fitting_tile(layout: TokenLayout, block: int) -> Box:
    """The tile of ``block`` tokens that suits a grid best.

    No side is more than four times another, but for axes of a single token. As many tokens as possible lie
    in tiles of full size; of equal ones the tile with the smallest surface, then the one with fewer frames,
    then fewer rows.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        block (int): tokens of a block, 64 or 128.
    """
    grid = (layout.frames, layout.height, layout.width)

    def rank(tile: Box) -> tuple[int, int, Box]:
        covered = math.prod(size // side * side for size, side in zip(grid, tile, strict=True))
        frames, rows, columns = tile
        return -covered, frames * rows + rows * columns + frames * columns, tile

    powers = [2**exponent for exponent in range(1, block.bit_length())]
    boxes = itertools.product(*((1,) if size == 1 else powers for size in grid))
    compact = (box for box in boxes if math.prod(box) == block and max(box) <= 4 * _shortest(box))
    return min(compact, key=rank, default=grid)


def _shortest(box: Box) -> int:
    """Shortest side of more than one token."""
    return min((side for side in box if side > 1), default=1)
