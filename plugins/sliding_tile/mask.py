"""Windows of tiles as blocks, and the window that a density asks for.

A block is kept if it holds any pair of tokens that the window allows, or text. Where the tile divides the
grid and its tokens are a multiple of the block, every block lies in one tile and the kept blocks are exactly
the window; elsewhere they cover it.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from core.block_mask import BlockSparseMask, block_lengths
from core.errors import ParameterError
from plugins.sliding_tile.tiles import Box, Tiling


def sliding_tile_mask(tiling: Tiling, windows: list[Box], block: int) -> BlockSparseMask:
    """Blocks of the reordered sequence, one head for each window, on the CPU.

    Args:
        tiling (Tiling): tiles of the grid.
        windows (list[Box]): tiles along frames, rows and columns that a tile sees, its own among them.
        block (int): tokens of a query block and of a key block.

    Returns:
        BlockSparseMask: batch dimension 1, as many heads as windows.

    Raises:
        ParameterError: a window is even along an axis that it does not fill.
    """
    kept = torch.stack([window_blocks(tiling, window, block) for window in windows])
    length = tiling.layout.sequence_length
    return BlockSparseMask.from_blocks(kept, (block, block), length, length)


def window_blocks(tiling: Tiling, window: Box, block: int) -> torch.Tensor:
    """Blocks that one window keeps, ``[M, M]`` bool; arguments and errors as in `sliding_tile_mask`."""
    video, length = tiling.layout.video_length, tiling.layout.sequence_length
    # Pairs of tiles in a corner of their matrix; the pairs of any rectangle follow from its four corners.
    corners = visible_tiles(tiling, window).cumsum(0, dtype=torch.int32).cumsum_(1)
    corners = F.pad(corners, (1, 0, 1, 0))
    tokens = tiling.tokens()
    ends = tokens.cumsum(0)
    starts = torch.arange(0, length, block)
    stops = (starts + block).clamp(max=length)
    first = torch.searchsorted(ends, starts, right=True)
    last = torch.searchsorted(ends - tokens, stops)
    top, bottom = corners[first], corners[last]
    pairs = bottom[:, last] - bottom[:, first] - top[:, last] + top[:, first]
    text = stops > video
    return (pairs > 0) | text[:, None] | text


def visible_tiles(tiling: Tiling, window: Box) -> torch.Tensor:
    """Tiles that every tile sees, ``[T, T]`` bool in the order of the sequence.

    Raises:
        ParameterError: the window is even along an axis that it does not fill.
    """
    places = tiling.places()
    visible = torch.ones(len(places), len(places), dtype=torch.bool)
    for axis, seen in enumerate(_axis_windows(tiling, window)):
        place = places[:, axis]
        visible &= seen[place][:, place]
    return visible


def allowed_density(tiling: Tiling, window: Box) -> float:
    """Share of all (query, key) pairs that a window allows before rounding to blocks, text included, 0 to 1.

    Raises:
        ParameterError: the window is even along an axis that it does not fill.
    """
    pairs = 1
    for axis, seen in enumerate(_axis_windows(tiling, window)):
        lengths = tiling.lengths(axis)
        pairs *= int((lengths[:, None] * lengths)[seen].sum())
    video, length = tiling.layout.video_length, tiling.layout.sequence_length
    return (pairs + length**2 - video**2) / length**2


def executed_density(tiling: Tiling, window: Box, block: int) -> float:
    """Share of all (query, key) pairs in the blocks that a window keeps, 0 to 1; errors as above."""
    tokens = block_lengths(tiling.layout.sequence_length, block).double()
    return float(tokens @ window_blocks(tiling, window, block).double() @ tokens / tokens.sum() ** 2)


def half_window(tiling: Tiling) -> Box:
    """The smallest odd number of tiles that is at least half of each axis."""
    frames, rows, columns = ((count + 1) // 2 | 1 for count in tiling.counts)
    return frames, rows, columns


def window_for_density(tiling: Tiling, density: float, block: int) -> Box:
    """The evenest window whose executed density is at most ``density``.

    Evenest: its smallest share of an axis is the largest; of equal ones the window with the most allowed
    pairs.

    Args:
        tiling (Tiling): tiles of the grid.
        density (float): largest executed share of all pairs, in (0, 1].
        block (int): tokens of a block.

    Returns:
        Box: tiles along each axis, odd or the whole axis.

    Raises:
        ParameterError: a window of one tile executes more than that.
    """
    axes = [[*range(1, count, 2), count] for count in tiling.counts]

    def rank(window: Box) -> tuple[float, float]:
        least_share = min(seen / count for seen, count in zip(window, tiling.counts, strict=True))
        return least_share, allowed_density(tiling, window)

    for window in sorted(itertools.product(*axes), key=rank, reverse=True):
        if rank(window)[1] <= density and executed_density(tiling, window, block) <= density:
            return window
    least = math.ceil(1000 * executed_density(tiling, (1, 1, 1), block)) / 1000
    raise ParameterError(
        f"sliding-tile: density {density:g} is out of reach for {tiling.layout.describe()}: text and windows "
        f"of one {'x'.join(map(str, tiling.tile))} tile, in blocks of {block}, execute {least:.3f}; "
        "ask for at least that, or take smaller blocks or tiles"
    )


def _axis_windows(tiling: Tiling, window: Box) -> list[torch.Tensor]:
    """Of each axis, the places that every place sees, ``[n, n]`` bool."""
    return [_axis_window(count, seen) for count, seen in zip(tiling.counts, window, strict=True)]


def _axis_window(count: int, seen: int) -> torch.Tensor:
    """``seen`` neighbours around each of ``count`` places, moved inwards at the ends (arXiv 2502.04507)."""
    if seen % 2 == 0 and seen < count:
        raise ParameterError(
            f"sliding-tile: a window must be odd along an axis that it does not fill, got {seen} of {count} "
            f"tiles; take {seen - 1} or {seen + 1}"
        )
    place = torch.arange(count)
    first = (place - seen // 2).clamp(0, max(0, count - seen))[:, None]
    return (place >= first) & (place < first + seen)
