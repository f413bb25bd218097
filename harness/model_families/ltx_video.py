"""LTX-Video in the harness."""

from typing import Any, ClassVar

import torch

from harness.model_families.base import CallSettings, ModelFamily


class LTXVideoFamily(ModelFamily):
    """LTX-Video, text to video.

    Settings are the defaults of diffusers' ``LTXPipeline.__call__``. So is the frame rate, which the model is
    told: `CallSettings.fps` changes that of the files alone.
    """

    name: ClassVar[str] = "ltx-video"
    pipeline_class: ClassVar[str] = "LTXPipeline"

    FRAME_RATE: ClassVar[int] = 25
    DECODE_TIMESTEP: ClassVar[float] = 0.0
    """The pipeline's default, at which a decoder that takes a timestep (from 0.9.1 on) gets no noise."""

    def own_settings(self, pipeline: Any) -> CallSettings:
        return CallSettings(
            height=512, width=704, num_frames=161, steps=50, guidance_scale=3.0, fps=self.FRAME_RATE
        )

    def size_multiple(self, pipeline: Any) -> int:
        return pipeline.vae_spatial_compression_ratio * pipeline.transformer_spatial_patch_size

    def frame_factor(self, pipeline: Any) -> int:
        return pipeline.vae_temporal_compression_ratio

    def call_arguments(self, pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": 128, "frame_rate": self.FRAME_RATE}

    def decode(self, pipeline: Any, latents: torch.Tensor, settings: CallSettings) -> torch.Tensor:
        vae, factor = pipeline.vae, pipeline.vae_spatial_compression_ratio
        latents = pipeline._unpack_latents(
            latents,
            (settings.num_frames - 1) // self.frame_factor(pipeline) + 1,
            settings.height // factor,
            settings.width // factor,
            pipeline.transformer_spatial_patch_size,
            pipeline.transformer_temporal_patch_size,
        )
        latents = pipeline._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        # The pipeline goes through the dtype of the prompt's embeddings.
        latents = latents.to(pipeline.text_encoder.dtype).to(vae.dtype)
        timestep = None
        if vae.config.timestep_conditioning:
            timestep = latents.new_full((latents.shape[0],), self.DECODE_TIMESTEP)
        return vae.decode(latents, timestep, return_dict=False)[0]
