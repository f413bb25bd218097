"""How many key blocks each row may choose for a density, counted in (query, key) pairs as the report does."""

import logging
from typing import NamedTuple

import torch

from core.block_mask import block_lengths
from core.layout import TokenLayout
from core.notices import warn_once

logger = logging.getLogger(__name__)

TOLERANCE = 0.06  # of the density asked for


class Budget(NamedTuple):
    """What executes a density.

    Args:
        forced (Tensor): blocks kept in any case, ``[Mq, Mk]`` bool.
        keep (Tensor): blocks to choose beside them, ``[1, Mq]`` int32.
        density (float): executed share of all pairs, 0 to 1.
    """

    forced: torch.Tensor
    keep: torch.Tensor
    density: float


def density_budget(
    layout: TokenLayout, density: float, forced: torch.Tensor, block_size: tuple[int, int]
) -> Budget:
    """The budget nearest to a density. Rows get equally many blocks, some of them one more.

    A short last key block is kept by every row: what executes then does not depend on who would choose it.
    A row that is not full chooses at least one block, so that it sees more than what is forced.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        density (float): wanted share of all (query, key) pairs, in (0, 1].
        forced (Tensor): blocks kept in any case, ``[Mq, Mk]`` bool, on the CPU.
        block_size (tuple[int, int]): tokens of a (query block, key block).

    Returns:
        Budget: on the CPU. If its density is more than 6 % off the wanted one, a warning is logged.
    """
    length = layout.sequence_length
    rows, columns = (block_lengths(length, size) for size in block_size)
    forced = forced | (columns < block_size[1])
    free = (~forced).sum(-1)
    rest = density * length**2 - int(rows @ (forced * columns).sum(-1))

    def chosen(keep: torch.Tensor) -> int:
        return int(rows @ keep) * block_size[1]

    number = 1
    while number < int(free.max()) and chosen(free.clamp(max=number + 1)) <= rest:
        number += 1
    keep = free.clamp(max=number)
    more = round((rest - chosen(keep)) / (block_size[0] * block_size[1]))
    # A short last row would take one block of the extra ones for a fraction of its pairs.
    keep = keep + _spread((free > number) & (rows == block_size[0]), more)
    executed = (density * length**2 - rest + chosen(keep)) / length**2
    if abs(executed - density) > TOLERANCE * density:
        warn_once(
            logger,
            f"sparge: density {density:g} is out of reach for {layout.describe()}: the nearest that whole "
            f"blocks of {block_size[0]} x {block_size[1]} make, of which text, sink and a short last block "
            f"are kept in any case and one more per row, is {executed:.3f}",
        )
    return Budget(forced, keep.to(torch.int32)[None], executed)


def _spread(rows: torch.Tensor, number: int) -> torch.Tensor:
    """1 for so many of the rows (``[Mq]`` bool), evenly spread over them, ``[Mq]`` int64."""
    of = int(rows.sum())
    number = max(0, min(number, of))
    place = rows.cumsum(0)
    return rows * (place * number // max(1, of) - (place - 1) * number // max(1, of))
