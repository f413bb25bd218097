"""``tiny-random-hunyuan-video``: a HunyuanVideo pipeline with fixed random weights."""

import itertools
from typing import Any

import torch

from harness.tiny_model import TEXT_DIM, letter_tokenizer

LATENT_CHANNELS = 4
TEXT_LENGTH = 351  # of the template and the prompt
CLIP_LENGTH = 77


def build_tiny_hunyuan_video_pipeline() -> Any:
    """A `HunyuanVideoPipeline`: 2 blocks of two streams, 1 of one, 2 heads of 64, 1.6 million parameters.

    Its videos are noise; the scheduler's shift is the real model's. Prompts are wrapped in the pipeline's
    own template, which is 95 tokens before the prompt as with the real tokenizer.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    tokenizer = letter_tokenizer(TEXT_LENGTH, _template_pieces())
    clip_tokenizer = letter_tokenizer(CLIP_LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "text_encoder": _llama(len(tokenizer)),
            "text_encoder_2": _clip(len(clip_tokenizer), clip_tokenizer.eos_token_id),
            "vae": _vae(),
            "transformer": _transformer(),
        }
    for part in parts.values():
        part.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return HunyuanVideoPipeline(tokenizer=tokenizer, tokenizer_2=clip_tokenizer, scheduler=scheduler, **parts)


def _template_pieces() -> list[str]:
    """What stands before the prompt in the pipeline's template, in as many pieces as the pipeline cuts."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    text = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0].lower()
    count = DEFAULT_PROMPT_TEMPLATE["crop_start"]
    places = [round(index * len(text) / count) for index in range(count + 1)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=3,  # the pipeline reads the last but two
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
    )
    return LlamaModel(config)


def _clip(vocabulary: int, end: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        eos_token_id=end,
    )
    return CLIPTextModel(config)


def _vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )


def _transformer() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        rope_axes_dim=(16, 24, 24),
    )
