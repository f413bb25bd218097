"""Random numbers of a strategy that leave the global generators alone."""

import hashlib

import torch

from core.context import AttentionContext
from core.errors import LayoutError


def call_generator(seed: int, context: AttentionContext, device: torch.device | str) -> torch.Generator:
    """A generator that depends on (seed, layer, step) and nothing else.

    Args:
        seed (int): the strategy's own seed.
        context (AttentionContext): layer and step of the call.
        device (torch.device | str): where random tensors are made.

    Returns:
        torch.Generator: freshly seeded; equal calls draw equal numbers.

    Raises:
        LayoutError: ``context`` is no AttentionContext.
    """
    if not isinstance(context, AttentionContext):
        raise LayoutError(f"context must be an AttentionContext, got {type(context).__name__}")
    place = f"{seed}/{context.layer_index}/{context.step_index}".encode()
    digest = hashlib.blake2b(place, digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
