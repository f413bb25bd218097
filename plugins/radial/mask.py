"""The radial block mask: half-widths rounded to blocks; run as a module it draws itself.

``python -m plugins.radial.mask --help`` lists what it draws and prints.

No token matrix is built. Block and frame borders cut the sequence into segments that lie in one block and in
one frame; the allowed pairs of two segments have a closed form. Strips of query blocks bound the memory: at
most ``PAIRS_PER_STRIP`` segment pairs at once (about 30 MB of temporaries) beside the ``ceil(N / block)^2``
booleans of the result, and one strip holds at least one row of blocks.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from core.block_mask import BlockSparseMask, block_count, block_lengths
from core.errors import LayoutError, ParameterError
from core.layout import TokenLayout
from plugins.radial.widths import Rule, frame_pair_widths, half_widths

Keep = Literal["cover", "fraction", "strict"]

PAIRS_PER_STRIP = 1 << 18

# The strict rule: a block stays if over 0.6 of its touched columns are allowed for over a third of its rows.
STRICT_COLUMN_DIVISOR = 3
STRICT_SHARE = 0.6


class Segments(NamedTuple):
    """Runs of tokens inside one block and one frame, each field ``[P]`` int64.

    Args:
        length (Tensor): tokens.
        block (Tensor): block that holds the run.
        frame (Tensor): frame that holds the run; F for text.
        place (Tensor): place of its first token in the frame; 0 for text.
        frame_block (Tensor): place of the block among those that touch the frame, from 0.
    """

    length: torch.Tensor
    block: torch.Tensor
    frame: torch.Tensor
    place: torch.Tensor
    frame_block: torch.Tensor

    def between(self, first_block: int, last_block: int) -> "Segments":
        """The segments of the blocks ``first_block`` to ``last_block - 1``."""
        inside = (self.block >= first_block) & (self.block < last_block)
        return Segments(*(field[inside] for field in self))


def radial_mask(
    layout: TokenLayout,
    *,
    block_size: tuple[int, int] = (128, 128),
    rule: Rule = "cogvideox",
    decay_factor: float = 1.0,
    sink: bool = True,
    keep: Keep = "fraction",
    threshold: float = 0.5,
    visible: torch.Tensor | None = None,
) -> BlockSparseMask:
    """The mask of one layout, the same for all batches and heads, on the CPU.

    Kept whatever the rule says: blocks on the diagonal, blocks that hold text and, with ``sink`` and another
    ``keep`` than ``"strict"``, key blocks that hold tokens of frame 0.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        block_size (tuple[int, int]): tokens of a (query block, key block). Default: ``(128, 128)``
        rule (str): half-widths, see `widths.half_widths`. Default: ``"cogvideox"``
        decay_factor (float): factor on the half-widths, > 0. Default: 1
        sink (bool): every query sees all of frame 0. Default: True
        keep (str): blocks that stay: ``"cover"``, those with any allowed pair; ``"fraction"``, those with at
            least ``threshold`` of their pairs allowed; ``"strict"``, the official code's rule. Default:
            ``"fraction"``
        threshold (float): share of allowed pairs for ``"fraction"``, in (0, 1]. Default: 0.5
        visible (Tensor, Optional): ``[F, F]`` bool, frames that a frame may look at. Default: all

    Returns:
        BlockSparseMask: batch and head dimensions of size 1.

    Raises:
        ParameterError: a value is out of range.
        LayoutError: ``visible`` is not ``[F, F]``.
    """
    if keep not in ("cover", "fraction", "strict") or not 0.0 < threshold <= 1.0:
        raise ParameterError(
            "keep must be 'cover', 'fraction' or 'strict', with a threshold in (0, 1]; "
            f"got {keep!r} and {threshold}"
        )
    pairs = pair_widths(
        layout, rule=rule, decay_factor=decay_factor, block=max(block_size), sink=sink, visible=visible
    )
    blocks = always_kept(layout, block_size, sink=sink and keep != "strict")
    if keep == "strict":
        for rows, judged in _strict_strips(layout, pairs, block_size):
            blocks[rows] |= judged
    else:
        least = threshold if keep == "fraction" else 0.0
        for rows, share in allowed_shares(layout, pairs, block_size):
            blocks[rows] |= (share >= least) & (share > 0.0)
    length = layout.sequence_length
    return BlockSparseMask.from_blocks(blocks, block_size, length, length)


def pair_widths(
    layout: TokenLayout,
    *,
    rule: Rule,
    decay_factor: float,
    block: int,
    sink: bool,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Half-width of every frame pair of a layout, ``[F, F]`` int64; arguments as in `radial_mask`.

    Raises:
        LayoutError: ``visible`` is not ``[F, F]``.
    """
    if visible is not None and visible.shape != (layout.frames, layout.frames):
        raise LayoutError(f"visible must be [{layout.frames}, {layout.frames}], got {tuple(visible.shape)}")
    places = layout.tokens_per_frame
    widths = half_widths(layout.frames, places, rule=rule, decay_factor=decay_factor, block=block)
    return frame_pair_widths(widths, places, sink=sink, visible=visible)


def always_kept(layout: TokenLayout, block_size: tuple[int, int], *, sink: bool) -> torch.Tensor:
    """Blocks of the diagonal, of text and, with ``sink``, of the keys of frame 0: ``[Mq, Mk]`` bool."""
    length = layout.sequence_length
    rows, columns = (torch.arange(block_count(length, size)) for size in block_size)
    row_end, column_end = (rows + 1) * block_size[0], (columns + 1) * block_size[1]
    row_start, column_start = rows * block_size[0], columns * block_size[1]
    kept = (row_start[:, None] < column_end) & (column_start < row_end[:, None])
    if layout.text_length:
        text = layout.text_slice
        kept |= ((row_start < text.stop) & (row_end > text.start))[:, None]
        kept |= (column_start < text.stop) & (column_end > text.start)
    if sink:
        first = layout.video_start
        kept |= (column_start < first + layout.tokens_per_frame) & (column_end > first)
    return kept


def allowed_shares(
    layout: TokenLayout, pairs: torch.Tensor, block_size: tuple[int, int]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Share of allowed pairs in every block, a strip of query blocks at a time.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        pairs (Tensor): ``[F, F]`` int64, of `pair_widths`.
        block_size (tuple[int, int]): tokens of a (query block, key block).

    Yields:
        tuple[slice, Tensor]: rows of blocks, and their shares ``[rows, Mk]`` float64, 0 to 1.
    """
    length = layout.sequence_length
    row_tokens, column_tokens = (block_lengths(length, size) for size in block_size)
    for rows, queries, keys in _strips(layout, block_size):
        counts = _allowed_pairs(queries, keys, _segment_widths(pairs, queries, keys, length))
        counts = _sum_per_block(counts, queries.block - rows.start, keys.block, rows, len(column_tokens))
        yield rows, counts.to(torch.float64) / (row_tokens[rows, None] * column_tokens)


def _strips(layout: TokenLayout, block_size: tuple[int, int]) -> Iterator[tuple[slice, Segments, Segments]]:
    queries, keys = (_segments(layout, size) for size in block_size)
    rows = block_count(layout.sequence_length, block_size[0])
    # A block of queries holds ceil(P / rows) segments on average, so this is the rows of one strip.
    step = max(1, PAIRS_PER_STRIP * rows // (len(queries.block) * len(keys.block)))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield slice(first, last), queries.between(first, last), keys


def _segments(layout: TokenLayout, block: int) -> Segments:
    length, places = layout.sequence_length, layout.tokens_per_frame
    block_starts = torch.arange(0, length, block)
    frame_starts = layout.video_start + places * torch.arange(layout.frames + 1)
    starts = torch.unique(torch.cat([block_starts, frame_starts, torch.tensor([0])]))
    starts = starts[starts < length]
    video = starts - layout.video_start
    is_text = (video < 0) | (video >= layout.video_length)
    frame = (video // places).masked_fill(is_text, layout.frames)
    first_block = (layout.video_start + frame * places) // block
    return Segments(
        length=torch.diff(starts, append=torch.tensor([length])),
        block=starts // block,
        frame=frame,
        place=(video % places).masked_fill(is_text, 0),
        frame_block=(starts // block - first_block).masked_fill(is_text, 0),
    )


def _segment_widths(pairs: torch.Tensor, queries: Segments, keys: Segments, whole: int) -> torch.Tensor:
    """Half-width of every pair of segments; ``whole`` where one of them is text."""
    with_text = torch.nn.functional.pad(pairs, (0, 1, 0, 1), value=whole)
    return with_text[queries.frame[:, None], keys.frame]


def _allowed_pairs(queries: Segments, keys: Segments, widths: torch.Tensor) -> torch.Tensor:
    """Pairs (x, y) of two segments with ``|x - y| <= width``, ``[Pq, Pk]`` int64."""
    shift = keys.place - queries.place[:, None]
    rows, columns = queries.length[:, None], keys.length

    def pairs_up_to(bound: torch.Tensor) -> torch.Tensor:
        # Pairs with y - x <= bound: the sum over x of min(max(x + bound - shift + 1, 0), columns).
        first = bound - shift + 1
        return _ramp_sum(rows + first, columns) - _ramp_sum(first, columns)

    counts = pairs_up_to(widths) - pairs_up_to(-widths - 1)
    return counts.masked_fill_(widths < 0, 0)


def _ramp_sum(end: torch.Tensor, ceiling: torch.Tensor) -> torch.Tensor:
    """Sum of ``min(max(v, 0), ceiling)`` over all integers ``v < end``."""
    end = end.clamp(min=0)
    rising = torch.minimum(end, ceiling)
    return rising * (rising - 1) // 2 + (end - rising) * ceiling


def _sum_per_block(
    values: torch.Tensor, row_blocks: torch.Tensor, column_blocks: torch.Tensor, rows: slice, columns: int
) -> torch.Tensor:
    """Add up ``[Pq, Pk]`` values of segment pairs into ``[rows, columns]`` blocks."""
    wide = values.new_zeros(values.shape[0], columns).index_add_(1, column_blocks, values)
    return values.new_zeros(rows.stop - rows.start, columns).index_add_(0, row_blocks, wide)


def _strict_strips(
    layout: TokenLayout, pairs: torch.Tensor, block_size: tuple[int, int]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks that the official code keeps, ``[rows, Mk]`` bool, a strip at a time.

    It looks at each frame pair alone: the rest of a block counts as forbidden, and only the first
    ``ceil(s / block)`` of the blocks that touch a frame are looked at.
    """
    length = layout.sequence_length
    looked_at = [block_count(layout.tokens_per_frame, size) for size in block_size]
    for rows, queries, keys in _strips(layout, block_size):
        widths = _segment_widths(pairs, queries, keys, length)
        dense = _columns_seen_by(block_size[0] // STRICT_COLUMN_DIVISOR + 1, queries, keys, widths)
        touched = _columns_seen_by(1, queries, keys, widths)
        judged = dense.to(torch.float64) > STRICT_SHARE * (touched + 1e-9)
        judged &= (queries.frame_block < looked_at[0])[:, None] & (keys.frame_block < looked_at[1])
        columns = block_count(length, block_size[1])
        votes = _sum_per_block(judged.to(torch.int64), queries.block - rows.start, keys.block, rows, columns)
        yield rows, votes > 0


def _columns_seen_by(least: int, queries: Segments, keys: Segments, widths: torch.Tensor) -> torch.Tensor:
    """Keys of a segment that at least ``least`` queries of the other one may look at, ``[Pq, Pk]`` int64."""
    first_query, rows = queries.place[:, None], queries.length[:, None]
    # min(y + w, last) - max(y - w, first) + 1 >= least, solved for y.
    low = torch.maximum(first_query - widths + least - 1, keys.place)
    high = torch.minimum(first_query + rows + widths - least, keys.place + keys.length - 1)
    possible = (widths >= 0) & (least <= rows) & (least <= 2 * widths + 1)
    return (high - low + 1).clamp(min=0).masked_fill_(~possible, 0)


if __name__ == "__main__":
    from plugins.radial.picture import main

    main()
