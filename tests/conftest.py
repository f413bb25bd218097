"""Fixtures that more than one folder of tests uses."""

import copy
import functools
import os
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Read when Triton's functions are decorated, so before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

from core.testing import tiny_transformer


@functools.cache
def untouched_vae() -> Any:
    """The autoencoder that pipelines copy: building it anew takes seconds."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def build_pipeline(**overrides: Any) -> Any:
    """A CogVideoX pipeline with random weights that takes prompt embeddings and returns latents."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    pipeline = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=copy.deepcopy(untouched_vae()),
        transformer=tiny_transformer(**overrides),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: Any, *, steps: int = 3, guidance: float = 6.0, seed: int = 0, **options: Any
) -> torch.Tensor:
    """Latents of one video; equal arguments give equal latents."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 1, 16, 32, generator=torch.Generator().manual_seed(99))
    text = text.to(pipeline._execution_device, pipeline.transformer.dtype)
    call = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": steps} | options
    return pipeline(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
        max_sequence_length=16,
        **call,
    ).frames


@pytest.fixture
def make_pipeline() -> Any:
    return build_pipeline


@pytest.fixture
def run_pipeline() -> Any:
    return functools.partial(generate)
