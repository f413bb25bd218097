"""Queries and keys with the structure that video attention has, for timing without a trained model.

Random queries and keys have nothing to predict: every block of keys matters alike. Here a token's key is
made of random Fourier features (Rahimi and Recht, 2007) of its place in the video, so that the scores of a
head are a Gaussian of the distance between two places: some heads see a neighbourhood in one frame, some
one place through time, some both.
"""

import math

import torch

from core.layout import TokenLayout

# Widths of the Gaussian in frames, rows and columns, as shares of the video; heads take them in turn.
WIDTHS = ((0.05, 0.15, 0.15), (2.0, 0.08, 0.08), (0.3, 0.1, 0.1), (1.0, 0.3, 0.3))
PEAK = 10.0  # score of two tokens at one place, after the softmax's scale
NOISE = 0.5  # of a query or key entry, as a share of the spread of the others


def structured_query_key(
    layout: TokenLayout,
    batch: int,
    heads: int,
    head_dim: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of one attention call; text tokens are random.

    Args:
        layout (TokenLayout): where text and video tokens stand.
        batch (int): samples, each with features of its own.
        heads (int): attention heads.
        head_dim (int): head dimension, even.
        generator (Generator): source of the features and noise; its device is that of the result.
        dtype (torch.dtype): of the result. Default: fp32

    Returns:
        tuple[Tensor, Tensor]: query and key, ``[B, H, S, D]``.
    """
    device = generator.device
    size = (batch, heads, layout.sequence_length, head_dim)
    query, key = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
    axes = [
        torch.linspace(0, 1, count, device=device) for count in (layout.frames, layout.height, layout.width)
    ]
    places = torch.cartesian_prod(*axes)  # [video tokens, 3]
    amplitude = math.sqrt(PEAK / math.sqrt(head_dim)) * math.sqrt(2.0)
    for sample in range(batch):
        for head in range(heads):
            widths = torch.tensor(WIDTHS[head % len(WIDTHS)], device=device)
            shape = (3, head_dim // 2)
            phases = places @ (torch.randn(shape, generator=generator, device=device) / widths[:, None])
            features = amplitude * torch.cat((phases.cos(), phases.sin()), -1)
            for part in (query, key):
                noise = torch.randn(size[2:], generator=generator, device=device) * (NOISE * amplitude)
                noise[layout.video_slice] += features
                part[sample, head] = noise
    return query, key
