"""Sliding tile attention token by token: windows, blocks by counting, softmax in fp64. Slow and obvious.

Nothing here is shared with `tiles` and `mask`, which are tested against it. Memory is quadratic in the
tokens.
"""

import itertools
import math

import torch

from core.layout import TokenLayout

Box = tuple[int, int, int]  # along frames, rows, columns


def token_order(layout: TokenLayout, tile: Box) -> list[int]:
    """Video tokens of full tiles, then those of smaller ones, tile by tile; then text.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        tile (Box): tokens of a full tile along frames, rows and columns.
    """
    grid = (layout.frames, layout.height, layout.width)
    members: dict[Box, list[int]] = {}
    for index, (f, y, x) in enumerate(itertools.product(*map(range, grid))):
        place = (f // tile[0], y // tile[1], x // tile[2])
        members.setdefault(place, []).append(layout.video_start + index)
    full = math.prod(min(side, size) for side, size in zip(tile, grid, strict=True))
    tiles = sorted(members, key=lambda place: (len(members[place]) < full, place))
    text = range(layout.text_start, layout.text_start + layout.text_length)
    return [token for place in tiles for token in members[place]] + list(text)


def allowed_pairs(layout: TokenLayout, tile: Box, window: Box) -> torch.Tensor:
    """Pairs of tokens that the window allows, ``[S, S]`` bool in the order of the model.

    Along an axis of n tiles a query in tile c sees tile x where ``|clamp(c, k // 2, n - 1 - k // 2) - x| <=
    k // 2`` with k the window, or every tile where ``k >= n`` (arXiv 2502.04507); text sees and is seen by
    everything.
    """
    grid = (layout.frames, layout.height, layout.width)
    video: list[Box | None] = [
        (f, y, x) for f in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])
    ]
    text: list[Box | None] = [None] * layout.text_length
    places = text + video if layout.text_first else video + text

    def allows(query: Box | None, key: Box | None) -> bool:
        return query is None or key is None or all(
            _sees(query[axis] // side, key[axis] // side, -(-grid[axis] // side), window[axis])
            for axis, side in enumerate(tile)
        )  # fmt: skip

    return torch.tensor([[allows(query, key) for key in places] for query in places])


def _sees(c: int, x: int, n: int, k: int) -> bool:
    if k >= n:
        return True
    centre = min(max(c, k // 2), n - 1 - k // 2)
    return abs(centre - x) <= k // 2


def kept_blocks(allowed: torch.Tensor, order: list[int], layout: TokenLayout, block: int) -> torch.Tensor:
    """Blocks of the reordered sequence with any allowed pair, ``[M, M]`` bool, counted pair by pair.

    Args:
        allowed (Tensor): ``[S, S]`` bool, of `allowed_pairs`.
        order (list[int]): of `token_order`.
        layout (TokenLayout): text and grid of the sequence.
        block (int): tokens of a block.
    """
    ranges = [order[at : at + block] for at in range(0, layout.sequence_length, block)]
    return torch.tensor([[bool(allowed[rows][:, columns].any()) for columns in ranges] for rows in ranges])


def executed_pairs(layout: TokenLayout, tile: Box, window: Box, block: int) -> torch.Tensor:
    """Pairs of tokens in the kept blocks, ``[S, S]`` bool in the order of the model."""
    order = token_order(layout, tile)
    blocks = kept_blocks(allowed_pairs(layout, tile, window), order, layout, block)
    block_of_token = torch.empty(layout.sequence_length, dtype=torch.int64)
    block_of_token[order] = torch.arange(layout.sequence_length) // block
    return blocks[block_of_token][:, block_of_token]


def sliding_tile_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    tile: Box,
    windows: list[Box],
    block: int,
) -> torch.Tensor:
    """Attention over the kept blocks in fp64.

    Args:
        query (Tensor): ``[B, H, S, D]``; key and value likewise.
        layout (TokenLayout): text and grid of the sequence.
        tile (Box): tokens of a full tile along frames, rows and columns.
        windows (list[Box]): tiles that a tile sees along each axis; head h takes number h modulo their count.
        block (int): tokens of a block.

    Returns:
        Tensor: ``[B, H, S, D]`` fp64.
    """
    executed = [executed_pairs(layout, tile, window, block) for window in windows]
    kept = torch.stack([executed[head % len(windows)] for head in range(query.shape[1])])
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~kept, float("-inf")).softmax(-1) @ value
