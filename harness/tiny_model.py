"""Pipelines with random weights: ``tiny-random`` (CogVideoX) and ``tiny-random-wan`` for trying things out,
``cogvideox-2b-random`` for measuring at the true size without a download, and what others of them share."""

from collections.abc import Sequence
from typing import Any

import torch

TEXT_LENGTH = 16
TEXT_DIM = 32
LATENT_CHANNELS, WAN_LATENT_CHANNELS = 4, 16
WAN_TEXT_LENGTH = 512


def build_tiny_pipeline() -> Any:
    """A `CogVideoXPipeline` with fixed random weights: 2 layers, 2 heads of 64, under a million parameters.

    Its videos are noise; it checks installation and plumbing in seconds.
    """
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    tokenizer = letter_tokenizer(TEXT_LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = (text_encoder(len(tokenizer), TEXT_DIM), _vae(LATENT_CHANNELS), _transformer())
    for part in parts:
        part.eval()
    return CogVideoXPipeline(tokenizer, *parts, CogVideoXDDIMScheduler())


def build_tiny_wan_pipeline() -> Any:
    """A `WanPipeline` with fixed random weights: 2 layers, 2 heads of 64, under a million parameters.

    Its videos are noise; the scheduler is that of Wan 2.1 for 480p.
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline

    tokenizer = letter_tokenizer(WAN_TEXT_LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = (_wan_text_encoder(len(tokenizer)), _wan_vae(), _wan_transformer())
    for part in parts:
        part.eval()
    text_encoder, vae, transformer = parts
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)


def build_random_2b_pipeline(dtype: torch.dtype, device: torch.device) -> Any:
    """A `CogVideoXPipeline` whose transformer has the architecture of CogVideoX-2b and fixed random weights.

    Text encoder and autoencoder are tiny. Times and memory of denoising are those of the real model; videos
    are noise, and so are errors of strategies that look at the inputs.

    Args:
        dtype (torch.dtype): of the weights, which are made in it.
        device (torch.device): where the weights are made.
    """
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    usual = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            transformer = CogVideoXTransformer3DModel()  # the defaults of diffusers are this model
        finally:
            torch.set_default_dtype(usual)
        config = transformer.config
        tokenizer = letter_tokenizer(config.max_text_seq_length)
        parts = (
            text_encoder(len(tokenizer), config.text_embed_dim).to(dtype),
            _vae(config.in_channels).to(dtype),
            transformer,
        )
    for part in parts:
        part.eval()
    return CogVideoXPipeline(tokenizer, *parts, CogVideoXDDIMScheduler())


def letter_tokenizer(length: int, whole: Sequence[str] = ()) -> Any:
    """A tokenizer of lower-case letters, ended by ``</s>`` and padded on the right.

    Args:
        length (int): tokens of the longest text.
        whole (Sequence[str]): pieces of text that are one token each. Default: none
    """
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    letters = " abcdefghijklmnopqrstuvwxyz.,"
    pieces = [(token, 0.0) for token in special] + [(letter, -1.0) for letter in letters]
    pieces += [(piece, -0.1) for piece in dict.fromkeys(whole)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[1],
        unk_token=special[2],
        model_max_length=length,
    )


def text_encoder(vocabulary: int, width: int) -> Any:
    """A T5 encoder of two layers with random weights."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_text_sizes(vocabulary, width)))


def _wan_text_encoder(vocabulary: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**_text_sizes(vocabulary, TEXT_DIM)))


def _text_sizes(vocabulary: int, width: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _vae(latent_channels: int) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def _transformer() -> Any:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=16,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=True,
    )


def _wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=4, z_dim=WAN_LATENT_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def _wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=WAN_LATENT_CHANNELS,
        out_channels=WAN_LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
    )
