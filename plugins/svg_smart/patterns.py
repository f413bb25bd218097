"""The spatial and the temporal pattern of a layout: token order, allowed pairs, executed blocks.

Both patterns have the same form. In its order, a query sees the columns that are kept for everybody (text
and, where wanted, frame 0) and one interval of its own; text queries see everything. Blocks are judged from
counts of allowed pairs, without a token matrix.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from core.block_mask import BlockSparseMask, block_count, block_lengths
from core.layout import TokenLayout

Keep = Literal["cover", "fraction"]

FRACTION = 0.5  # share of allowed pairs from which a block is kept whole
ROWS_PER_STRIP = 4096
KEYS_PER_WORD = 64


class TokenPattern(NamedTuple):
    """Allowed pairs of one pattern, in places of its own order.

    Args:
        order (Tensor): ``[S]`` int64; place ``i`` holds token ``order[i]``.
        always (Tensor): ``[S]`` bool, places that every query sees.
        first (Tensor): ``[S]`` int64, start of each query's own interval.
        end (Tensor): ``[S]`` int64, its end (exclusive).
    """

    order: torch.Tensor
    always: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor

    def pairs(self) -> int:
        """Allowed (query, key) pairs."""
        outside = _outside_before(self.always)
        own = outside[self.end] - outside[self.first]
        return int(self.always.sum()) * len(self.always) + int(own.sum())

    def density(self) -> float:
        """Allowed share of all pairs, 0 to 1, before rounding to blocks."""
        return self.pairs() / len(self.always) ** 2

    def allowed(self) -> torch.Tensor:
        """``[S, S]`` bool. Quadratic memory: for tests and pictures."""
        places = torch.arange(len(self.always))
        inside = (places >= self.first[:, None]) & (places < self.end[:, None])
        return self.always | inside


class BlockPattern(NamedTuple):
    """A pattern and the blocks that are executed for it.

    Args:
        pattern (TokenPattern): allowed pairs.
        blocks (Tensor): executed blocks in the order of ``pattern``, ``[Mq, Mk]`` bool.
        block_size (tuple[int, int]): tokens of a (query block, key block).
    """

    pattern: TokenPattern
    blocks: torch.Tensor
    block_size: tuple[int, int]

    def density(self) -> float:
        """Executed share of all pairs, 0 to 1, as the report counts it."""
        length = len(self.pattern.always)
        rows, columns = (block_lengths(length, size).to(torch.float64) for size in self.block_size)
        return float(rows @ self.blocks.to(torch.float64) @ columns) / length**2


class HeadPatterns(NamedTuple):
    """What the two classes of heads execute; index 0 is spatial, 1 is temporal.

    Args:
        orders (Tensor): ``[2, S]`` int32, place -> token.
        places (Tensor): ``[2, S]`` int32, token -> place.
        seen (Tensor): ``[2, Mq, ceil(S / 64)]`` int64, keys that the queries of a block see: bit ``j`` of
            word ``i`` is token ``64 i + j``.
        masks (BlockSparseMask): the executed blocks, batch dimension 1, head dimension 2.
    """

    orders: torch.Tensor
    places: torch.Tensor
    seen: torch.Tensor
    masks: BlockSparseMask

    def to(self, device: torch.device) -> "HeadPatterns":
        """The same patterns on another device."""
        orders, places, seen, masks = self
        return HeadPatterns(orders.to(device), places.to(device), seen.to(device), masks.to(device))


def frame_patterns(layout: TokenLayout, *, diagonal: int) -> list[TokenPattern]:
    """The patterns of Smart attention: frames up to ``diagonal`` apart and frame 0, or as many places.

    The temporal window is the narrowest that allows at least as many pairs as the spatial pattern.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        diagonal (int): largest distance of two frames, >= 0.

    Returns:
        list[TokenPattern]: spatial, temporal.
    """
    spatial = _neighbouring_frames(layout, diagonal)

    def window(width: int) -> TokenPattern:
        return token_major(layout, -(width // 2), width - width // 2, sink=True)

    wanted = spatial.pairs()
    too_narrow = last_true(layout.video_length * 2, lambda width: window(width).pairs() < wanted)
    return [spatial, window(too_narrow + 1)]


def executed_blocks(
    layout: TokenLayout, pattern: TokenPattern, *, block_size: tuple[int, int], keep: Keep
) -> BlockPattern:
    """Round a pattern to the blocks that are executed.

    Kept whatever the pattern says: blocks that hold text and blocks on the diagonal.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        pattern (TokenPattern): allowed pairs.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        keep (str): ``"cover"``, blocks with any allowed pair; ``"fraction"``, blocks with at least half of
            their pairs allowed.
    """
    share = allowed_shares(pattern, block_size)
    chosen = share > 0.0 if keep == "cover" else share >= FRACTION
    return BlockPattern(pattern, forced_blocks(layout, block_size, diagonal=True) | chosen, block_size)


def head_patterns(patterns: list[BlockPattern]) -> HeadPatterns:
    """What the two classes of heads execute, on the CPU.

    Args:
        patterns (list[BlockPattern]): spatial, temporal; of one sequence and block size.
    """
    length, block_size = len(patterns[0].pattern.order), patterns[0].block_size
    blocks = torch.stack([one.blocks for one in patterns])
    masks = BlockSparseMask.from_blocks(blocks, block_size, length, length)
    widest = int(masks.counts.max())
    masks = BlockSparseMask(
        masks.counts, masks.indices[..., :widest].contiguous(), block_size, length, length
    )
    orders = torch.stack([one.pattern.order for one in patterns])
    places = orders.argsort(-1)
    seen = torch.stack(
        [_packed(one[:, place // block_size[1]]) for one, place in zip(blocks, places, strict=True)]
    )
    return HeadPatterns(orders.to(torch.int32), places.to(torch.int32), seen, masks)


def _packed(seen: torch.Tensor) -> torch.Tensor:
    """Rows of bool, ``[M, S]``, as words of 64 bits, ``[M, ceil(S / 64)]`` int64."""
    bits = F.pad(seen, (0, -seen.shape[1] % KEYS_PER_WORD)).unflatten(1, (-1, 8)).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(torch.int64)


def forced_blocks(layout: TokenLayout, block_size: tuple[int, int], *, diagonal: bool) -> torch.Tensor:
    """Blocks that hold text and, with ``diagonal``, those on the diagonal: ``[Mq, Mk]`` bool."""
    length = layout.sequence_length
    row, column = (torch.arange(block_count(length, size)) * size for size in block_size)
    on_diagonal = (row[:, None] < column + block_size[1]) & (column < row[:, None] + block_size[0])
    forced = on_diagonal & diagonal
    if layout.text_length:
        text = layout.text_slice
        forced |= ((row < text.stop) & (row + block_size[0] > text.start))[:, None]
        forced |= (column < text.stop) & (column + block_size[1] > text.start)
    return forced


def allowed_shares(pattern: TokenPattern, block_size: tuple[int, int]) -> torch.Tensor:
    """Share of allowed pairs in every block, ``[Mq, Mk]`` fp64."""
    length = len(pattern.always)
    starts = torch.arange(0, length, block_size[1])
    ends = (starts + block_size[1]).clamp(max=length)
    outside = _outside_before(pattern.always)
    always = (ends - starts) - (outside[ends] - outside[starts])
    shares = []
    step = max(1, ROWS_PER_STRIP // block_size[0]) * block_size[0]
    for row in range(0, length, step):
        first, end = (part[row : row + step, None] for part in (pattern.first, pattern.end))
        low, high = torch.maximum(first, starts), torch.minimum(end, ends)
        own = (outside[torch.maximum(high, low)] - outside[low]).to(torch.float64)
        pairs = F.pad((own + always).T, (0, -own.shape[0] % block_size[0]))  # [Mk, rows]
        shares.append(pairs.unflatten(1, (-1, block_size[0])).sum(-1).T)
    rows = (length - torch.arange(0, length, block_size[0])).clamp(max=block_size[0])
    return torch.cat(shares) / (rows[:, None] * (ends - starts))


def frame_major_band(layout: TokenLayout, width: int, sink: bool) -> TokenPattern:
    """``|i - j| < width`` in the model's order."""
    places = torch.arange(layout.sequence_length)
    return _with_text(layout, places, _seen_by_all(layout, sink), places - width + 1, places + width)


def _neighbouring_frames(layout: TokenLayout, diagonal: int) -> TokenPattern:
    frame, size = layout.token_frames(), layout.tokens_per_frame
    first = layout.video_start + (frame - diagonal).clamp(min=0) * size
    end = layout.video_start + (frame + diagonal + 1).clamp(max=layout.frames) * size
    return _with_text(layout, torch.arange(layout.sequence_length), _seen_by_all(layout, True), first, end)


def token_major(layout: TokenLayout, below: int, above: int, sink: bool) -> TokenPattern:
    """Token-major order; a query sees the places from ``below`` to ``above`` (exclusive) around its own.

    With ``sink`` frame 0 stands first in its own order, and a query of frame 0 is taken to stand where its
    place begins among the other frames.
    """
    size, start = layout.tokens_per_frame, layout.video_start
    apart = size if sink else 0  # tokens of frame 0 that stand before the token-major rest
    rest = torch.arange(apart, layout.video_length).view(-1, size).T.flatten()
    order = torch.arange(layout.sequence_length)
    order[layout.video_slice] = start + torch.cat([torch.arange(apart), rest])
    centre = torch.arange(layout.sequence_length)
    centre[start : start + apart] = start + apart + torch.arange(apart) * (layout.frames - 1)
    return _with_text(layout, order, _seen_by_all(layout, sink), centre + below, centre + above)


def _seen_by_all(layout: TokenLayout, sink: bool) -> torch.Tensor:
    always = torch.zeros(layout.sequence_length, dtype=torch.bool)
    always[layout.text_slice] = True
    always[layout.video_start : layout.video_start + sink * layout.tokens_per_frame] = True
    return always


def _with_text(
    layout: TokenLayout, order: torch.Tensor, always: torch.Tensor, first: torch.Tensor, end: torch.Tensor
) -> TokenPattern:
    """The pattern whose text queries see everything, with intervals cut to the sequence."""
    length = layout.sequence_length
    first, end = first.clamp(0, length), end.clamp(0, length)
    first[layout.text_slice], end[layout.text_slice] = 0, length
    return TokenPattern(order, always, first, end)


def _outside_before(always: torch.Tensor) -> torch.Tensor:
    """Number of places before each place that are not in ``always``, ``[S + 1]`` int64."""
    return F.pad((~always).long().cumsum(0), (1, 0))


def last_true(largest: int, holds: Callable[[int], bool]) -> int:
    """The largest ``n`` in 1 to ``largest`` that ``holds`` is true for, 0 if none; true ones come first."""
    low, high = 0, largest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
