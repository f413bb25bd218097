"""Model families: what the harness must know about a text-to-video pipeline beside its call.

A new family is one class here and its place in `FAMILIES`.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from core.apply import find_denoisers
from harness.errors import BenchError


@dataclass(frozen=True)
class CallSettings:
    """How every video of a run is generated.

    Args:
        height (int): pixels, a multiple of what the family's patches need.
        width (int): pixels, likewise.
        num_frames (int): 4k + 1 where the autoencoder compresses time by 4.
        steps (int): denoising steps.
        guidance_scale (float): classifier-free guidance; 1.0 means none. Of all denoisers, if there are two.
        fps (int): frames per second of the video files.
    """

    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float
    fps: int

    @property
    def size(self) -> dict[str, int]:
        """Height, width and frames, as rows record them."""
        return {"height": self.height, "width": self.width, "num_frames": self.num_frames}

    def changed(self, requested: dict[str, Any]) -> "CallSettings":
        """The same settings with every value of ``requested`` that is not None."""
        given = {name: value for name, value in requested.items() if value is not None}
        return CallSettings(**(asdict(self) | given))


class ModelFamily(ABC):
    """One family of text-to-video pipelines."""

    name: ClassVar[str]
    """Presets of the whole family have it, and names of its models begin with it."""
    pipeline_class: ClassVar[str]
    """Its text-to-video pipeline in diffusers."""
    exact_parts: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that stay in float32 whatever the dtype."""

    def preset_names(self, own: str) -> tuple[str, ...]:
        """Presets that fit the model of that name, the most special one first."""
        return own, self.name

    def gpu_dtype(self, own: str) -> str:
        """The usual dtype of the model of that name on a GPU."""
        return "bfloat16"

    @abstractmethod
    def own_settings(self, pipeline: Any) -> CallSettings:
        """What the model was made for."""

    @abstractmethod
    def size_multiple(self, pipeline: Any) -> int:
        """Pixels that height and width are multiples of: the autoencoder's factor times the patch."""

    @abstractmethod
    def call_arguments(self, pipeline: Any) -> dict[str, Any]:
        """What the pipeline is called with beside prompt, settings, seed and output type."""

    @abstractmethod
    def decode(self, pipeline: Any, latents: torch.Tensor, settings: CallSettings) -> torch.Tensor:
        """The pipeline's own way from its latents to the video.

        Args:
            pipeline (Any): the pipeline.
            latents (Tensor): as it returns them.
            settings (CallSettings): what they were made with.

        Returns:
            Tensor: ``[1, 3, F, H, W]``, -1 to 1.
        """

    def check_settings(self, name: str, pipeline: Any, settings: CallSettings) -> None:
        """Refuse sizes that the pipeline would change without a word, or fail at.

        Raises:
            BenchError: the size is not one that the model can make.
        """
        multiple, factor = self.size_multiple(pipeline), pipeline.vae_scale_factor_temporal
        if settings.height % multiple or settings.width % multiple:
            raise BenchError(
                f"model '{name}' makes videos whose height and width are multiples of {multiple}, got "
                f"{settings.width}x{settings.height}"
            )
        if (settings.num_frames - 1) % factor:
            raise BenchError(
                f"model '{name}' makes videos of {factor}k + 1 frames, got {settings.num_frames}"
            )


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


COGVIDEOX, WAN = CogVideoXFamily(), WanFamily()
FAMILIES: tuple[ModelFamily, ...] = (COGVIDEOX, WAN)


def family_of_class(pipeline_class: str) -> ModelFamily | None:
    """The family whose pipelines have that class, if one is known."""
    return next((family for family in FAMILIES if family.pipeline_class == pipeline_class), None)


def family_of_name(own: str) -> ModelFamily | None:
    """The family whose name the model's name begins with, if there is one."""
    return next((family for family in FAMILIES if own.startswith(family.name)), None)
