"""ModelFamily: what the harness must know about a text-to-video pipeline beside its call."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from harness.errors import BenchError


@dataclass(frozen=True)
class CallSettings:
    """How every video of a run is generated.

    Args:
        height (int): pixels, a multiple of what the family's patches need.
        width (int): pixels, likewise.
        num_frames (int): 4k + 1 where the autoencoder compresses time by 4, 8k + 1 where by 8.
        steps (int): denoising steps.
        guidance_scale (float): classifier-free guidance; 1.0 means none. Of all denoisers, if there are two.
            HunyuanVideo is told the number, which it was distilled with.
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

    def frame_factor(self, pipeline: Any) -> int:
        """Frames that the autoencoder makes one of: videos have so many times k, plus 1."""
        return pipeline.vae_scale_factor_temporal

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
        multiple, factor = self.size_multiple(pipeline), self.frame_factor(pipeline)
        if settings.height % multiple or settings.width % multiple:
            raise BenchError(
                f"model '{name}' makes videos whose height and width are multiples of {multiple}, got "
                f"{settings.width}x{settings.height}"
            )
        if (settings.num_frames - 1) % factor:
            raise BenchError(
                f"model '{name}' makes videos of {factor}k + 1 frames, got {settings.num_frames}"
            )
