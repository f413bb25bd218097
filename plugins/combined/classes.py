"""Which heads run by frame patterns: those that are not sparse and look alike from every frame.

Shape letters: B batch, H heads (of all batch entries where there is no B), N tokens, m sampled places, D head
dimension.
"""

from typing import NamedTuple

import torch

from core.context import AttentionContext
from core.layout import TokenLayout
from core.random import call_generator
from plugins.combined.frame_tables import SCORES_PER_CHUNK, draw_places, frame_tables

TOP_SHARE = 0.2  # of the keys, whose mass tells a sparse head
SIMILARITY_DRAWS = 2


class ClassOptions(NamedTuple):
    """Numbers of the tests, as `CombinedParameters` documents them."""

    places: int
    key_stride: int
    sparse_mass: float
    similarity: float
    seed: int


class HeadGroups(NamedTuple):
    """Heads of one layer by class.

    Args:
        step (int): denoising step of the decision.
        flags (tuple[bool, ...]): of every (batch, head), whether it runs by frame patterns.
        pattern (Tensor): indices ``batch * H + head`` of those, ``[n]`` int64.
        others (Tensor): indices of the rest.
    """

    step: int
    flags: tuple[bool, ...]
    pattern: torch.Tensor
    others: torch.Tensor

    @classmethod
    def from_flags(cls, flags: list[bool], step: int, device: torch.device) -> "HeadGroups":
        """Groups on a device."""
        pattern, others = (
            torch.tensor([index for index, flag in enumerate(flags) if flag is wanted], dtype=torch.int64)
            for wanted in (True, False)
        )
        return cls(step, tuple(flags), pattern.to(device), others.to(device))


def pattern_heads(
    query: torch.Tensor, key: torch.Tensor, context: AttentionContext, options: ClassOptions
) -> torch.Tensor:
    """Which heads run by frame patterns, ``[B, H]`` bool.

    Args:
        query (Tensor): ``[B, H, N, D]``.
        key (Tensor): ``[B, H, N, D]``.
        context (AttentionContext): the call.
        options (ClassOptions): numbers of the tests.
    """
    layout = context.layout
    queries, keys = query.flatten(0, 1), key.flatten(0, 1)
    generator = call_generator(options.seed, context, query.device)
    places = draw_places(layout, options.places, generator)
    chosen = largest_weights(queries, keys, layout, places, options.key_stride) <= options.sparse_mass
    for _ in range(SIMILARITY_DRAWS):
        places = draw_places(layout, options.places, generator)
        chosen &= frame_tables(queries, keys, layout, places).similarity > options.similarity
    return chosen.view(query.shape[:2])


def largest_weights(
    query: torch.Tensor, key: torch.Tensor, layout: TokenLayout, places: torch.Tensor, key_stride: int
) -> torch.Tensor:
    """Attention mass of the largest 20 % of the weights, mean over sampled queries of frame 0; ``[H]`` fp32.

    Args:
        query (Tensor): ``[H, N, D]``.
        key (Tensor): ``[H, N, D]``; every ``key_stride``-th takes part.
        layout (TokenLayout): text and grid of the sequence.
        places (Tensor): ``[m]`` int64, places of a frame.
        key_stride (int): see ``key``.
    """
    queries, keys = query.index_select(1, layout.video_start + places), key[:, ::key_stride]
    top = max(1, round(TOP_SHARE * keys.shape[1]))
    step = max(1, SCORES_PER_CHUNK // (len(places) * keys.shape[1]))
    masses = []
    for start in range(0, len(queries), step):
        chunk = slice(start, start + step)
        scores = torch.bmm(queries[chunk].float(), keys[chunk].float().transpose(1, 2))
        scores *= query.shape[-1] ** -0.5
        masses.append(scores.softmax(-1).topk(top, -1, sorted=False).values.sum(-1).mean(-1))
    return torch.cat(masses)
