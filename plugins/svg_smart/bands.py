"""The bands of Sparse VideoGen (arXiv 2502.01776): the half-width whose whole blocks have a density."""

import logging
from collections.abc import Callable

from core.block_mask import block_count
from core.layout import TokenLayout
from core.notices import warn_once
from plugins.svg_smart.patterns import (
    BlockPattern,
    Keep,
    TokenPattern,
    executed_blocks,
    frame_major_band,
    last_true,
    token_major,
)

logger = logging.getLogger(__name__)

# The published half-width, rounded down, executes 0.236 for 0.25 at 13 x 30 x 45 tokens and 226 of text.
TOLERANCE = 0.06  # of the density asked for


def band_patterns(
    layout: TokenLayout, *, density: float, sink: bool, block: int, keep: Keep
) -> list[BlockPattern]:
    """One band in frame-major and in token-major order.

    Each half-width is the published one, the largest multiple of ``block`` that keeps the allowed pairs
    within ``density``, where its blocks execute ``density`` within 6 % of it; elsewhere the multiple whose
    blocks come nearest. If even that is more than 6 % off, it is logged with what will be executed.

    With ``sink`` frame 0 is seen by all and stands in its own order before the token-major rest, where its
    queries look at the same places of the other frames.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        density (float): share of all pairs to execute, in (0, 1]; text and sink count.
        sink (bool): every query sees frame 0.
        block (int): tokens of a query and of a key block.
        keep (str): which blocks are executed, see :func:`executed_blocks`.

    Returns:
        list[BlockPattern]: spatial, temporal.
    """

    def spatial(width: int) -> TokenPattern:
        return frame_major_band(layout, width, sink)

    def temporal(width: int) -> TokenPattern:
        return token_major(layout, 1 - width, width, sink)

    chosen = [_nearest_band(layout, band, density, block, keep) for band in (spatial, temporal)]
    found = [pattern.density() for pattern in chosen]
    if any(_is_off(executed, density) for executed in found):
        texts = [f"{executed:.3f}" for executed in found]
        parts = texts[0] if texts[0] == texts[1] else f"{texts[0]} (spatial heads) and {texts[1]} (temporal)"
        warn_once(
            logger,
            f"svg-smart: density {density:g} is out of reach for {layout.describe()}: the nearest that a "
            f"band of whole blocks of {block} tokens executes, text and sink counted, is {parts}",
        )
    return chosen


def _nearest_band(
    layout: TokenLayout, band: Callable[[int], TokenPattern], density: float, block: int, keep: Keep
) -> BlockPattern:
    """The band of the published half-width if its blocks have the density, else the nearest."""
    largest = block_count(layout.sequence_length, block)

    def rounded(blocks: int) -> BlockPattern:
        # The band of no block is the diagonal alone, which whole blocks can be too wide for.
        return executed_blocks(layout, band(max(1, blocks * block)), block_size=(block, block), keep=keep)

    published = last_true(largest, lambda blocks: band(blocks * block).density() <= density)
    place = max(1, published)
    best = rounded(place)
    if not _is_off(best.density(), density):
        return best
    # Wider bands execute more: walk towards the density until it is passed.
    step = 1 if best.density() < density else -1
    while 0 <= place + step <= largest:
        place += step
        other = rounded(place)
        gain = abs(best.density() - density) - abs(other.density() - density)
        if gain < 0:
            break
        if gain > 0:
            best = other
    return best


def _is_off(executed: float, density: float) -> bool:
    return abs(executed - density) > TOLERANCE * density
