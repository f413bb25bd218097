"""CogVideoX 1.0 and 1.5 in the harness."""

from typing import Any, ClassVar

import torch

from harness.errors import BenchError
from harness.model_families.base import CallSettings, ModelFamily


class CogVideoXFamily(ModelFamily):
    """CogVideoX 1.0 and 1.5."""

    name: ClassVar[str] = "cogvideox"
    pipeline_class: ClassVar[str] = "CogVideoXPipeline"

    def gpu_dtype(self, own: str) -> str:
        return "float16" if own.endswith("-2b") else "bfloat16"  # what it was trained in

    def own_settings(self, pipeline: Any) -> CallSettings:
        config = pipeline.transformer.config
        if config.patch_size_t is not None:  # CogVideoX 1.5, whose configuration holds no usable size
            return CallSettings(height=768, width=1360, num_frames=81, steps=50, guidance_scale=6.0, fps=16)
        return CallSettings(
            height=config.sample_height * pipeline.vae_scale_factor_spatial,
            width=config.sample_width * pipeline.vae_scale_factor_spatial,
            num_frames=config.sample_frames,
            steps=50,
            guidance_scale=6.0,
            fps=8,
        )

    def size_multiple(self, pipeline: Any) -> int:
        return pipeline.vae_scale_factor_spatial * pipeline.transformer.config.patch_size

    def call_arguments(self, pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": pipeline.transformer.config.max_text_seq_length}

    def decode(self, pipeline: Any, latents: torch.Tensor, settings: CallSettings) -> torch.Tensor:
        # CogVideoX 1.5 pads the latent frames to its temporal patch; the padding stands first.
        latent_frames = (settings.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1
        return pipeline.decode_latents(latents[:, latents.shape[1] - latent_frames :])

    def check_settings(self, name: str, pipeline: Any, settings: CallSettings) -> None:
        super().check_settings(name, pipeline, settings)
        config = pipeline.transformer.config
        if not config.use_learned_positional_embeddings:
            return
        factor = pipeline.vae_scale_factor_spatial
        own = (config.sample_frames, config.sample_width * factor, config.sample_height * factor)
        asked = (settings.num_frames, settings.width, settings.height)
        if asked != own:
            raise BenchError(
                f"model '{name}' has learned positions for {own[0]} frames of {own[1]}x{own[2]} only, got "
                f"{asked[0]} frames of {asked[1]}x{asked[2]}; leave the size out"
            )
