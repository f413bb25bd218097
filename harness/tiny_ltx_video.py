"""``tiny-random-ltx-video``: an LTX-Video pipeline with fixed random weights."""

from typing import Any

import torch

from harness.tiny_model import TEXT_DIM, letter_tokenizer, text_encoder

LATENT_CHANNELS = 8
TEXT_LENGTH = 128


def build_tiny_ltx_video_pipeline(timestep_conditioning: bool = False) -> Any:
    """An `LTXPipeline`: 2 layers, 2 heads of 64, under a million parameters.

    Its videos are noise. The autoencoder compresses as the real one does, 32 x 32 pixels of 8 frames; the
    scheduler is that of ``Lightricks/LTX-Video``.

    Args:
        timestep_conditioning (bool): the decoder takes a timestep, as from 0.9.1 on. Default: False
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    tokenizer = letter_tokenizer(TEXT_LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = text_encoder(len(tokenizer), TEXT_DIM)
        vae, transformer = _vae(timestep_conditioning), _transformer()
    for part in (encoder, vae, transformer):
        part.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return LTXPipeline(scheduler, vae, encoder, tokenizer, transformer)


def _vae(timestep_conditioning: bool) -> Any:
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    )


def _transformer() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=64,
        cross_attention_dim=128,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )
