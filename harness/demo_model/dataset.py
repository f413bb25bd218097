"""Clips rendered once and kept as latents on the training device.

Shape legend: N clips, T = 17 frames, C = 12 channels, h x w = 24 x 40 latents, S = 16 tokens.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX

from harness.demo_model.clips import render_clips
from harness.demo_model.text_binding import binding_labels, encode_captions, random_scenes
from harness.demo_model.vae import encode_frames


class LatentClips(NamedTuple):
    """`latents` float16 `(N, T, C, h, w)`, `tokens` int64 `(N, S)`, `labels` int64 `(N, S, 7)`, on one
    device.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor


@torch.no_grad()
def build_latent_clips(
    vae: AutoencoderKLCogVideoX,
    count: int,
    pair_fraction: float,
    seed: int,
    log: Callable[[str], None],
    batch_size: int = 64,
) -> LatentClips:
    """Renders and encodes training clips.

    Args:
        vae: the trained autoencoder; its device is used.
        count: number of clips.
        pair_fraction: fraction with two objects, 0 to 1.
        seed: seed of scenes and clips.
        log: called with progress lines.
        batch_size: clips rendered at once.
    """
    device = vae.device
    rng = random.Random(seed)
    scenes = random_scenes(rng, count, pair_fraction)
    latents = []
    for start in range(0, count, batch_size):
        batch = scenes[start : start + batch_size]
        clips = render_clips(batch, [rng.randrange(2**31) for _ in batch], device=device)
        images = (clips.frames.flatten(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = [encode_frames(vae, part) for part in images.split(256)]
        latents.append(torch.cat(parts).half().unflatten(0, clips.frames.shape[:2]))
        if start // batch_size % 50 == 0:
            log(f"data: {start} of {count} clips")
    return LatentClips(
        torch.cat(latents), encode_captions(scenes).to(device), binding_labels(scenes).to(device)
    )
