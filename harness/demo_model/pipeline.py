"""The architecture of the demo model as a plain `CogVideoXPipeline`, and its word-level tokenizer."""

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from harness.demo_model.captions import vocabulary
from harness.demo_model.defaults import DEMO_DEFAULTS

SPATIAL_COMPRESSION = 8
LATENT_CHANNELS = 12
TEXT_DIM = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer: lower case, punctuation dropped, one token per word, padded with `<pad>`."""
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(".", ""), normalizers.Replace(",", "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=DEMO_DEFAULTS.max_sequence_length,
        clean_up_tokenization_spaces=False,
    )


def build_text_encoder(num_layers: int = 3) -> T5EncoderModel:
    """Returns the T5 encoder (width 128, 4 heads); relative positions are exact over all 16 tokens."""
    config = T5Config(
        vocab_size=len(vocabulary()),
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=num_layers,
        num_heads=4,
        relative_attention_num_buckets=64,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
    )
    return T5EncoderModel(config)


def build_vae(block_out_channels: tuple[int, ...] = (16, 32, 48, 64)) -> AutoencoderKLCogVideoX:
    """Returns the autoencoder: 8x in space, none in time, 12 latent channels."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=block_out_channels,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=1,
        sample_height=DEMO_DEFAULTS.height,
        sample_width=DEMO_DEFAULTS.width,
        scaling_factor=1.0,
    )


def build_transformer(num_layers: int = 8, num_heads: int = 4) -> CogVideoXTransformer3DModel:
    """Returns the transformer: heads of 64, patches of 2, RoPE and learned positions, 4,080 video tokens."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=num_heads,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_DIM,
        num_layers=num_layers,
        sample_width=DEMO_DEFAULTS.width // SPATIAL_COMPRESSION,
        sample_height=DEMO_DEFAULTS.height // SPATIAL_COMPRESSION,
        sample_frames=DEMO_DEFAULTS.num_frames,
        patch_size=2,
        temporal_compression_ratio=1,
        max_text_seq_length=DEMO_DEFAULTS.max_sequence_length,
        spatial_interpolation_scale=1.0,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )


def build_scheduler() -> CogVideoXDDIMScheduler:
    """Returns the DDIM scheduler: v-prediction, zero terminal SNR, trailing steps, shift 8 towards noise."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=8.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def build_pipeline() -> CogVideoXPipeline:
    """Returns the whole pipeline with random weights, in float32 on the CPU."""
    return CogVideoXPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=build_vae(),
        transformer=build_transformer(),
        scheduler=build_scheduler(),
    )
