"""Wan 2.1 and 2.2 in the harness."""

from typing import Any, ClassVar

import torch

from core.apply import find_denoisers
from harness.model_families.base import CallSettings, ModelFamily


class WanFamily(ModelFamily):
    """Wan 2.1 and 2.2; sizes, steps, guidance and frame rates are those of the authors' own scripts."""

    name: ClassVar[str] = "wan"
    pipeline_class: ClassVar[str] = "WanPipeline"
    exact_parts: ClassVar[tuple[str, ...]] = ("vae",)

    TASK_WORDS: ClassVar[frozenset[str]] = frozenset(
        {"t2v", "i2v", "ti2v", "vace", "480p", "720p", "diffusers"}
    )
    SMALL_MODEL_HEADS: ClassVar[int] = 12  # Wan 2.1 1.3B, which was trained for 480p

    def preset_names(self, own: str) -> tuple[str, ...]:
        """Behind the name itself generation and size: ``wan2.1-14b`` of ``wan2.1-t2v-14b-diffusers``."""
        short = "-".join(word for word in own.split("-") if word not in self.TASK_WORDS)
        return tuple(dict.fromkeys((own, short, self.name)))

    def own_settings(self, pipeline: Any) -> CallSettings:
        config, denoiser = pipeline.config, find_denoisers(pipeline)[0]
        if config.expand_timesteps:  # Wan 2.2 5B
            return CallSettings(height=704, width=1280, num_frames=121, steps=50, guidance_scale=5.0, fps=24)
        large = CallSettings(height=720, width=1280, num_frames=81, steps=50, guidance_scale=5.0, fps=16)
        if config.boundary_ratio is not None:  # Wan 2.2 A14B; the authors guide its low-noise denoiser by 3
            return large.changed({"steps": 40, "guidance_scale": 4.0})
        if denoiser.config.num_attention_heads <= self.SMALL_MODEL_HEADS:
            return large.changed({"height": 480, "width": 832})
        return large

    def size_multiple(self, pipeline: Any) -> int:
        return pipeline.vae_scale_factor_spatial * find_denoisers(pipeline)[0].config.patch_size[1]

    def call_arguments(self, pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": 512}

    def decode(self, pipeline: Any, latents: torch.Tensor, settings: CallSettings) -> torch.Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.dtype)
        # The reciprocal is rounded first, as in the pipeline, so that frames are bit-identical to its own.
        mean, scale = (
            torch.tensor(numbers).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(latents / (1.0 / scale) + mean, return_dict=False)[0]
