"""HunyuanVideo in the harness."""

from typing import Any, ClassVar

import torch

from harness.model_families.base import CallSettings, ModelFamily


class HunyuanVideoFamily(ModelFamily):
    """HunyuanVideo, text to video.

    Settings are the defaults of diffusers' ``HunyuanVideoPipeline.__call__``, the frame rate is that of the
    example in its docstring. The model is told its guidance and runs once per step; the pipeline's second
    call per step (``true_cfg_scale``) is off, as by default.
    """

    name: ClassVar[str] = "hunyuan"
    pipeline_class: ClassVar[str] = "HunyuanVideoPipeline"

    def own_settings(self, pipeline: Any) -> CallSettings:
        return CallSettings(height=720, width=1280, num_frames=129, steps=50, guidance_scale=6.0, fps=15)

    def size_multiple(self, pipeline: Any) -> int:
        return pipeline.vae_scale_factor_spatial * pipeline.transformer.config.patch_size

    def call_arguments(self, pipeline: Any) -> dict[str, Any]:
        return {"max_sequence_length": 256}

    def decode(self, pipeline: Any, latents: torch.Tensor, settings: CallSettings) -> torch.Tensor:
        vae = pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
