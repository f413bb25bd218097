"""Sparse VideoGen and Smart attention by their formulas, pair by pair in fp64. Slow and obvious.

Nothing here is shared with `patterns`, which is tested against it. Memory is quadratic in the tokens.
"""

import torch

from core.layout import TokenLayout


def band_pairs(layout: TokenLayout, half_width: int, *, temporal: bool, sink: bool) -> torch.Tensor:
    """Allowed pairs of Sparse VideoGen in the model's order, ``[S, S]`` bool.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        half_width (int): pairs with ``|i - j| < half_width`` in the head's own order are allowed.
        temporal (bool): token-major order, else frame-major.
        sink (bool): every query sees frame 0.
    """
    return _pairs(layout, temporal, sink, lambda query, key: abs(key - query) < half_width)


def frame_pairs(layout: TokenLayout, diagonal: int) -> torch.Tensor:
    """Allowed pairs of Smart attention's spatial heads, ``[S, S]`` bool."""
    frames = layout.token_frames()
    near = (frames[:, None] - frames).abs() <= diagonal
    text = frames < 0
    return near | text | text[:, None] | (frames == 0)


def window_pairs(layout: TokenLayout, width: int) -> torch.Tensor:
    """Allowed pairs of Smart attention's temporal heads, a window of ``width`` places, ``[S, S]`` bool."""
    below = width // 2
    return _pairs(layout, True, True, lambda query, key: -below <= key - query < width - below)


def attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """Softmax attention in fp64 over the allowed pairs ``[..., S, S]``, ``[B, H, S, D]``."""
    scores = query.double() @ key.double().transpose(2, 3) * query.shape[-1] ** -0.5
    return scores.masked_fill(~pairs, float("-inf")).softmax(-1) @ value.double()


def _pairs(layout: TokenLayout, temporal: bool, sink: bool, near) -> torch.Tensor:
    """Pairs of one band around each query's place in its order; text is seen by all and sees all."""
    apart = 1 if temporal and sink else 0  # frames that stand before the token-major rest
    place = {}
    for token in range(layout.sequence_length):
        frame, spot = divmod(token - layout.video_start, layout.tokens_per_frame)
        if not temporal or not 0 <= frame < layout.frames:
            place[token] = token
        elif frame < apart:
            place[token] = layout.video_start + spot
        else:
            others = layout.frames - apart
            offset = layout.video_start + apart * layout.tokens_per_frame
            place[token] = offset + spot * others + frame - apart
    allowed = torch.zeros(layout.sequence_length, layout.sequence_length, dtype=torch.bool)
    for query in range(layout.sequence_length):
        frame, spot = divmod(query - layout.video_start, layout.tokens_per_frame)
        text_query = not 0 <= frame < layout.frames
        centre = place[query]
        if temporal and 0 <= frame < apart:
            offset = layout.video_start + apart * layout.tokens_per_frame
            centre = offset + spot * (layout.frames - apart)
        for key in range(layout.sequence_length):
            key_frame = (key - layout.video_start) // layout.tokens_per_frame
            text_key = not 0 <= key_frame < layout.frames
            allowed[query, key] = (
                text_query or text_key or (sink and key_frame == 0) or near(centre, place[key])
            )
    return allowed
