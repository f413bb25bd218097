"""Which video tokens others are merged into, and which may be merged.

All of frame 0 and one token of every space-time cell of the later frames are destinations; all other
video tokens are sources (tomesd's cells, arXiv 2303.17604, with time as a third direction).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from core.errors import ParameterError
from core.layout import TokenLayout

TILE = 64  # sources of one tile: the rows of one kernel program


class Partition(NamedTuple):
    """Destinations and sources of one layout, and which sources look at which destinations.

    Sources that share their candidates are gathered in tiles. Rows of ``tiles`` and ``candidates`` that are
    shorter than the longest are filled up with their first entry, which changes no maximum.

    Args:
        sources (Tensor): tokens of the sequence, ascending, ``[Ns]`` int64.
        destinations (Tensor): tokens of the sequence, ascending, ``[Nd]`` int64.
        tiles (Tensor): places in ``sources``, ``[T, TILE]`` int32.
        candidates (Tensor): places in ``destinations``, ascending, ``[T, C]`` int32, or ``[1, Nd]`` where
            every source looks at all of them.
        order (Tensor): all tokens of the sequence, destinations first, then the others, each ascending,
            ``[S]`` int64.
        source_places (Tensor): places of the sources in ``order``, ``[Ns]`` int64.
    """

    sources: torch.Tensor
    destinations: torch.Tensor
    tiles: torch.Tensor
    candidates: torch.Tensor
    order: torch.Tensor
    source_places: torch.Tensor

    def to(self, device: torch.device | str) -> "Partition":
        """The same partition on another device."""
        return Partition(*(part.to(device) for part in self))


def cell_counts(layout: TokenLayout, cell: tuple[int, int, int]) -> tuple[int, int, int]:
    """Whole cells along frames, rows and columns; the cells begin at frame 1."""
    return (layout.frames - 1) // cell[0], layout.height // cell[1], layout.width // cell[2]


def make_partition(
    layout: TokenLayout, cell: tuple[int, int, int], *, seed: int | None, local: bool
) -> Partition:
    """Partition of the video tokens of a layout, on the CPU.

    Tokens past the last whole cell of a direction are sources. With ``F`` frames of ``s`` tokens there are
    ``s + cells`` destinations.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        cell (tuple[int, int, int]): frames, rows and columns of a cell, each >= 1.
        seed (int, Optional): seed of the destination's place in each cell; None takes the first place.
        local (bool): a source looks only at destinations of its own and the neighbouring cells, in frame 0
            at those in the same rows and columns; otherwise at all.

    Returns:
        Partition: empty sources for a single frame.

    Raises:
        ParameterError: a size of the cell is not positive.
    """
    if min(cell) < 1:
        raise ParameterError(f"cell must be three sizes of at least 1: frames, rows, columns; got {cell!r}")
    is_destination = torch.zeros(layout.frames, layout.height, layout.width, dtype=torch.bool)
    is_destination[0] = True
    frame, row, column = _drawn_places(cell_counts(layout, cell), cell, seed)
    is_destination[1 + frame, row, column] = True
    sources, destinations = (
        (~is_destination).nonzero(),
        is_destination.nonzero(),
    )  # [N, 3]: frame, row, column
    tiles, candidates = _tiles(layout, cell, sources, destinations, local)
    strides = torch.tensor([layout.tokens_per_frame, layout.width, 1])
    source_tokens = (sources * strides).sum(-1) + layout.video_start
    destination_tokens = (destinations * strides).sum(-1) + layout.video_start
    rest = torch.ones(layout.sequence_length, dtype=torch.bool)
    rest[destination_tokens] = False
    order = torch.cat([destination_tokens, rest.nonzero()[:, 0]])
    source_places = order.argsort()[source_tokens]
    return Partition(source_tokens, destination_tokens, tiles, candidates, order, source_places)


def _drawn_places(
    counts: tuple[int, int, int], cell: tuple[int, int, int], seed: int | None
) -> tuple[torch.Tensor, ...]:
    """Frame (from the first cell on), row and column of every cell's destination, ``[cells]`` int64 each."""
    cells, volume = torch.Size(counts).numel(), torch.Size(cell).numel()
    inside = torch.zeros(cells, dtype=torch.int64)
    if seed is not None:
        inside = torch.randint(volume, (cells,), generator=torch.Generator().manual_seed(seed))
    corners = torch.unravel_index(torch.arange(cells), counts)
    offsets = torch.unravel_index(inside, cell)
    return tuple(corner * size + offset for corner, size, offset in zip(corners, cell, offsets, strict=True))


def _tiles(
    layout: TokenLayout,
    cell: tuple[int, int, int],
    sources: torch.Tensor,
    destinations: torch.Tensor,
    local: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of sources and their candidates; without ``local`` one row of candidates for all tiles."""
    if not local or not len(sources):
        tiles = torch.arange(len(sources)).split(TILE) if len(sources) else ()
        return _filled(tiles, TILE), torch.arange(len(destinations), dtype=torch.int32)[None]
    last = torch.tensor(cell_counts(layout, cell)).clamp(min=1) - 1  # the cell that leftovers belong to
    source_cells, destination_cells = (
        torch.minimum((places - torch.tensor([1, 0, 0])).div(torch.tensor(cell), rounding_mode="floor"), last)
        for places in (sources, destinations)
    )
    cells, owners = source_cells.unique(dim=0, return_inverse=True)
    sizes = torch.bincount(owners).tolist()
    groups = [places.split(TILE) for places in owners.argsort(stable=True).split(sizes)]
    lists = []
    for place, group in zip(cells, groups, strict=True):
        near = (destination_cells - place).abs() <= 1
        near[:, 0] |= destinations[:, 0] == 0
        lists += [near.all(-1).nonzero()[:, 0]] * len(group)
    tiles = [tile for group in groups for tile in group]
    return _filled(tiles, TILE), _filled(lists, max(map(len, lists)))


def _filled(lists: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Lists as the rows of one int32 matrix of ``width`` columns, filled up with their first entries."""
    rows = torch.empty(len(lists), width, dtype=torch.int32)
    for row, entries in zip(rows, lists, strict=True):
        row[: len(entries)] = entries
        row[len(entries) :] = entries[0]
    return rows
