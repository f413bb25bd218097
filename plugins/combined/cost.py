"""What heads by frame patterns and the tests cost, in pairs of a query and a key.

A pair counts its score and its value, of D products each. What computes a score alone counts half, and so do
the D products by which a pattern enters the mean of a frame.
"""

import torch

from core.layout import TokenLayout
from plugins.combined.classes import SIMILARITY_DRAWS, ClassOptions


def pattern_cost(
    layout: TokenLayout, places: int, exact: int, patterns: float | torch.Tensor = 0.0
) -> float | torch.Tensor:
    """Share of all pairs of one head by frame patterns.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        places (int): places that the table of frame masses samples.
        exact (int): frames whose queries attend exactly.
        patterns (float | Tensor): patterns of one key frame that are computed beside them. Default: 0
    """
    frames, tokens = layout.frames, layout.tokens_per_frame
    text = layout.text_length * (layout.sequence_length + layout.video_length)
    mixed = frames * frames * exact * tokens / 2
    pairs = text + exact * tokens * layout.video_length + mixed + _table(layout, places)
    return (pairs + patterns * tokens**2) / layout.sequence_length**2


def decision_cost(layout: TokenLayout, options: ClassOptions) -> float:
    """Share of all pairs of one head that the tests of its class cost."""
    places = min(options.places, layout.tokens_per_frame)
    sparsity = places * -(-layout.sequence_length // options.key_stride) / 2
    return (sparsity + SIMILARITY_DRAWS * _table(layout, places)) / layout.sequence_length**2


def _table(layout: TokenLayout, places: int) -> float:
    sampled = layout.frames * min(places, layout.tokens_per_frame)
    return sampled * (layout.text_length + sampled) / 2
