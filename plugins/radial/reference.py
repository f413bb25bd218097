"""Radial attention by its formulas: token mask, blocks by counting, softmax in fp64. Slow and obvious.

Nothing here is shared with `mask` and `widths`, which are tested against it. Memory is quadratic in the
tokens.
"""

import torch

from core.block_mask import BlockSparseMask
from core.layout import TokenLayout


def half_width(
    distance: int, tokens_per_frame: int, rule: str, decay_factor: float, block: int
) -> float | None:
    """``W`` at a distance between frames; None where the frame pair is left out.

    ``"paper"`` is equation 5 of arXiv 2506.19852, with ``decay_factor`` as a factor on ``s`` from d = 2 on.

    Args:
        distance (int): ``|i - j|`` of the two frames.
        tokens_per_frame (int): tokens of one frame.
        rule (str): ``"cogvideox"``, ``"official"`` or ``"paper"``.
        decay_factor (float): factor on the widths from d = 2 on.
        block (int): tokens of a block.
    """
    d, s, g = distance, tokens_per_frame, decay_factor
    if rule == "paper":
        m = 2 ** (max(d, 1).bit_length() - 1)
        room = s if d < 2 else s * g
        if m <= room:
            return room / m - 1
        return 0 if d % -(-m // room) == 0 else None
    if d == 0:
        return s
    if d == 1:
        return s if rule == "official" else max(s // 2 * max(g, 1), block)
    base = 2 ** s.bit_length() / 2 ** d.bit_length()
    split = 1
    while base * max(g, 1) * split * 2 <= min(block, s):
        split *= 2
    return max(base * g, block) if d % split == 0 else None


def element_mask(
    layout: TokenLayout,
    *,
    rule: str,
    decay_factor: float,
    block: int,
    sink: bool,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Allowed (query, key) pairs, ``[S, S]`` bool; arguments as in `plugins.radial.mask.radial_mask`."""
    s, start = layout.tokens_per_frame, layout.video_start
    allowed = torch.ones(layout.sequence_length, layout.sequence_length, dtype=torch.bool)
    place = torch.arange(s)
    for i in range(layout.frames):
        for j in range(layout.frames):
            width = half_width(abs(i - j), s, rule, decay_factor, block)
            if sink and j == 0:
                pair = torch.ones(s, s, dtype=torch.bool)
            elif width is None or (visible is not None and not visible[i, j]):
                pair = torch.zeros(s, s, dtype=torch.bool)
            else:
                pair = (place[:, None] - place).abs() <= width
            allowed[start + i * s : start + (i + 1) * s, start + j * s : start + (j + 1) * s] = pair
    return allowed


def kept_blocks(
    allowed: torch.Tensor,
    layout: TokenLayout,
    block_size: tuple[int, int],
    *,
    keep: str,
    threshold: float,
    sink: bool,
) -> torch.Tensor:
    """Blocks that stay, ``[Mq, Mk]`` bool, counted pair by pair.

    Args:
        allowed (Tensor): ``[S, S]`` bool, of `element_mask`.
        layout (TokenLayout): text and grid of the sequence.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        keep (str): ``"cover"``, ``"fraction"`` or ``"strict"``.
        threshold (float): share of allowed pairs for ``"fraction"``.
        sink (bool): key blocks with tokens of frame 0 stay (not with ``"strict"``).
    """
    length = layout.sequence_length
    frame = layout.token_frames()
    query_ranges = [range(at, min(at + block_size[0], length)) for at in range(0, length, block_size[0])]
    key_ranges = [range(at, min(at + block_size[1], length)) for at in range(0, length, block_size[1])]
    blocks = torch.zeros(len(query_ranges), len(key_ranges), dtype=torch.bool)
    for row, queries in enumerate(query_ranges):
        for column, keys in enumerate(key_ranges):
            part = allowed[queries.start : queries.stop, keys.start : keys.stop]
            query_frames, key_frames = frame[list(queries)], frame[list(keys)]
            always = bool(set(queries) & set(keys)) or bool(
                (query_frames < 0).any() or (key_frames < 0).any()
            )
            if keep == "strict":
                stays = strict_keeps(
                    part, query_frames, key_frames, (row, column), layout=layout, block_size=block_size
                )
            else:
                always |= sink and bool((key_frames == 0).any())
                share = part.double().mean()
                stays = bool(share > 0 if keep == "cover" else share >= threshold)
            blocks[row, column] = always or stays
    return blocks


def strict_keeps(
    part: torch.Tensor,
    query_frames: torch.Tensor,
    key_frames: torch.Tensor,
    place: tuple[int, int],
    *,
    layout: TokenLayout,
    block_size: tuple[int, int],
) -> bool:
    """The official code's verdict on one block: each frame pair alone, the rest of the block forbidden.

    Args:
        part (Tensor): allowed pairs of the block, ``[Nq, Nk]`` bool.
        query_frames (Tensor): frame of each query of the block, ``[Nq]``; -1 for text.
        key_frames (Tensor): frame of each key of the block, ``[Nk]``; -1 for text.
        place (tuple[int, int]): row and column of the block.
        layout (TokenLayout): text and grid of the sequence.
        block_size (tuple[int, int]): tokens of a (query block, key block).
    """
    s = layout.tokens_per_frame

    def looked_at(frame: int, axis: int) -> bool:
        first = (layout.video_start + frame * s) // block_size[axis]
        return frame >= 0 and place[axis] - first < -(-s // block_size[axis])

    for i in query_frames.unique().tolist():
        for j in key_frames.unique().tolist():
            if not (looked_at(i, 0) and looked_at(j, 1)):
                continue
            pair = part[query_frames == i][:, key_frames == j]
            column_density = pair.double().sum(0) / block_size[0]
            dense = (column_density > 1 / 3).sum()
            if dense / ((column_density > 0).sum() + 1e-9) > 0.6:
                return True
    return False


def radial_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    block_size: tuple[int, int],
    rule: str,
    decay_factor: float,
    sink: bool,
    keep: str,
    threshold: float,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over the kept blocks in fp64.

    Args:
        query (Tensor): ``[B, H, S, D]``; key and value likewise.
        layout (TokenLayout): text and grid of the sequence; the rest as in `plugins.radial.mask.radial_mask`.

    Returns:
        Tensor: ``[B, H, S, D]`` fp64.
    """
    allowed = element_mask(
        layout, rule=rule, decay_factor=decay_factor, block=max(block_size), sink=sink, visible=visible
    )
    blocks = kept_blocks(allowed, layout, block_size, keep=keep, threshold=threshold, sink=sink)
    length = layout.sequence_length
    kept = BlockSparseMask.from_blocks(blocks, block_size, length, length).to_dense()
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~kept, float("-inf")).softmax(-1) @ value
