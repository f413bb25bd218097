"""Half-widths of the radial band: how far apart two places may lie at each distance between frames.

Notation: ``s`` tokens per frame, ``F`` frames, ``d = |i - j|`` the distance of query frame i and key frame j,
``W[d]`` the half-width. Place k of frame i may look at place l of frame j where ``|k - l| <= W[|i - j|]``;
``W = s - 1`` is the whole frame pair, ``W = -1`` none of it.
"""

import math
from typing import Literal

import torch

from core.errors import ParameterError

Rule = Literal["cogvideox", "official", "paper"]


def half_widths(
    frames: int, tokens_per_frame: int, *, rule: Rule, decay_factor: float, block: int
) -> torch.Tensor:
    """``W[d]`` of one rule.

    ``"paper"`` is the formula of the paper, arXiv 2506.19852; ``"official"`` and ``"cogvideox"`` start from a
    power of two, never get narrower than a block and thin out far frames instead.

    Args:
        frames (int): frames of the token grid, F.
        tokens_per_frame (int): tokens of one frame, s.
        rule (str): ``"cogvideox"``, ``"official"`` or ``"paper"``.
        decay_factor (float): factor on the widths from d = 2 on, > 0.
        block (int): tokens of a block: narrowest band of the rules other than ``"paper"``.

    Returns:
        Tensor: ``[F]`` int64 in ``[-1, s - 1]``.

    Raises:
        ParameterError: unknown rule, or ``decay_factor`` is not positive and finite.
    """
    if not 0.0 < decay_factor < math.inf:
        raise ParameterError(f"decay_factor must be positive and finite, got {decay_factor}")
    if rule not in ("cogvideox", "official", "paper"):
        raise ParameterError(f"rule must be 'cogvideox', 'official' or 'paper', got {rule!r}")
    whole = tokens_per_frame - 1
    widths = [whole]
    for distance in range(1, frames):
        if rule == "paper":
            width = _paper_width(distance, tokens_per_frame, decay_factor)
        elif distance == 1:
            width = whole
            if rule == "cogvideox":
                width = max(int(min(tokens_per_frame // 2 * max(decay_factor, 1.0), whole)), block)
        else:
            width = _power_of_two_width(distance, tokens_per_frame, decay_factor, block)
        widths.append(min(width, whole))
    return torch.tensor(widths)


def _paper_width(distance: int, tokens_per_frame: int, decay_factor: float) -> int:
    """``floor(g s / m) - 1`` with ``m = 2^floor(log2 d)``.

    Once that is narrower than one place, ``k = l`` at every ``ceil(m / (g s))``-th frame.
    """
    if distance == 1:
        return tokens_per_frame - 1
    share = decay_factor * tokens_per_frame / _floor_power_of_two(distance)
    if share >= 1.0:
        return int(min(share, tokens_per_frame)) - 1
    return 0 if share * distance >= 1.0 and distance % math.ceil(1.0 / share) == 0 else -1


def _power_of_two_width(distance: int, tokens_per_frame: int, decay_factor: float, block: int) -> int:
    """``max(base g, block)`` with ``base = 2^floor(log2 s) / 2^floor(log2 d)``.

    Where ``base max(g, 1) < n = min(block, s)``, only multiples of ``n / (base max(g, 1))`` stay:
    the quotient is taken down to a power of two so that a larger ``g`` never drops a frame.
    """
    base = _floor_power_of_two(tokens_per_frame) / _floor_power_of_two(distance)
    undecayed = base * max(decay_factor, 1.0)
    narrowest = min(block, tokens_per_frame)
    if undecayed < narrowest and distance % _floor_power_of_two(narrowest / undecayed):
        return -1
    return max(int(min(base * decay_factor, tokens_per_frame)), block)


def _floor_power_of_two(value: float) -> int:
    """Largest power of two that is not above ``value >= 1``."""
    return 1 << (int(value).bit_length() - 1)


def frame_pair_widths(
    widths: torch.Tensor, tokens_per_frame: int, *, sink: bool, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Half-width of every (query frame, key frame).

    Args:
        widths (Tensor): ``W[d]``, ``[F]`` int64.
        tokens_per_frame (int): tokens of one frame, s.
        sink (bool): every query sees all of frame 0, whatever ``visible`` says.
        visible (Tensor, Optional): ``[F, F]`` bool, frames that a frame may look at (see `scenes`). Default:
            all

    Returns:
        Tensor: ``[F, F]`` int64 in ``[-1, s - 1]``.
    """
    frame = torch.arange(len(widths))
    pairs = widths[(frame[:, None] - frame).abs()]
    if visible is not None:
        pairs = pairs.masked_fill(~visible, -1)
    if sink:
        pairs[:, 0] = tokens_per_frame - 1
    return pairs


def element_density(pair_widths: torch.Tensor, tokens_per_frame: int, text_length: int) -> float:
    """Allowed share of all (query, key) pairs before rounding to blocks, text included, 0 to 1.

    Args:
        pair_widths (Tensor): ``[F, F]`` int64, of `frame_pair_widths`.
        tokens_per_frame (int): tokens of one frame, s.
        text_length (int): text tokens of the sequence.
    """
    allowed = tokens_per_frame * (2 * pair_widths + 1) - pair_widths * (pair_widths + 1)
    video = len(pair_widths) * tokens_per_frame
    text_pairs = (video + text_length) ** 2 - video**2
    return (int(allowed[pair_widths >= 0].sum()) + text_pairs) / (video + text_length) ** 2
