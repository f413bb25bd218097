"""How much the frames look at each other, and how alike: both from a few places of every frame.

The same places are taken in all frames, as queries and as keys. A sampled key stands for several of its
frame, which the text keys, all present, are weighed against.

Shape letters: H heads of all batch entries, N tokens, T text tokens, F frames, P places of a frame, m sampled
places, D head dimension.
"""

import math
from typing import NamedTuple

import torch

from core.layout import TokenLayout

SCORES_PER_CHUNK = 1 << 26


class FrameTables(NamedTuple):
    """Sampled attention masses and likeness of frames; made by :func:`frame_tables`.

    Args:
        frames (Tensor): ``[H, F, F]`` fp32, mass that a frame's queries give to a frame, mean over places.
        text (Tensor): ``[H, F]`` fp32, mass that they give to the text; rows of both sum to 1 together.
        similarity (Tensor): ``[H]`` fp32, mean cosine of the weights towards a frame, over all pairs of
            frames that they come from, each with itself included.
    """

    frames: torch.Tensor
    text: torch.Tensor
    similarity: torch.Tensor


def draw_places(layout: TokenLayout, count: int, generator: torch.Generator) -> torch.Tensor:
    """Places of a frame without repetition, ``[min(count, P)]`` int64 on the generator's device."""
    draw = torch.rand(layout.tokens_per_frame, generator=generator, device=generator.device)
    return draw.argsort()[:count]


def frame_tables(
    query: torch.Tensor, key: torch.Tensor, layout: TokenLayout, places: torch.Tensor
) -> FrameTables:
    """Masses and likeness of frames by the sampled places.

    Args:
        query (Tensor): ``[H, N, D]``.
        key (Tensor): ``[H, N, D]``.
        layout (TokenLayout): text and grid of the sequence.
        places (Tensor): ``[m]`` int64, places of a frame; all of them give the exact tables.
    """
    starts = torch.arange(layout.frames, device=places.device) * layout.tokens_per_frame
    tokens = (layout.video_start + starts[:, None] + places).flatten()
    queries = query.index_select(1, tokens)
    keys = torch.cat([key[:, layout.text_slice], key.index_select(1, tokens)], 1)
    step = max(1, SCORES_PER_CHUNK // (queries.shape[1] * keys.shape[1]))
    chunks = [
        _tables(queries[start : start + step], keys[start : start + step], layout, len(places))
        for start in range(0, len(queries), step)
    ]
    return FrameTables(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _tables(queries: torch.Tensor, keys: torch.Tensor, layout: TokenLayout, sampled: int) -> FrameTables:
    text, frames = layout.text_length, layout.frames
    scores = torch.bmm(queries.float(), keys.float().transpose(1, 2)) * queries.shape[-1] ** -0.5
    scores[..., :text] += math.log(sampled / layout.tokens_per_frame)
    weights = scores.softmax(-1)
    text_mass = weights[..., :text].sum(-1).unflatten(1, (frames, sampled)).mean(-1)
    blocks = weights[..., text:].unflatten(2, (frames, sampled)).unflatten(1, (frames, sampled))
    masses = blocks.sum(-1).mean(2)  # [H, F, F]
    # The mean cosine of all pairs is the squared length of the mean of the unit vectors. Weights are divided
    # by their largest first: the squares of small ones would be 0.
    blocks = blocks / blocks.amax((2, 4), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    norms = blocks.square().sum((2, 4), keepdim=True).sqrt()
    mean_unit = (blocks / norms.clamp(min=0.5)).mean(1)  # [H, m, F, m]; a norm is 0 or at least 1
    return FrameTables(masses, text_mass, mean_unit.square().sum((1, 3)).mean(-1))
