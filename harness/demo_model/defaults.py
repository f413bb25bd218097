"""Where the shipped weights are and the call settings they were trained for."""

from dataclasses import dataclass
from pathlib import Path

WEIGHTS_DIR = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True)
class DemoDefaults:
    """Call settings of the demo pipeline.

    Args:
        height: frame height in pixels; fixed by the learned positions.
        width: frame width in pixels; fixed by the learned positions.
        num_frames: frames per video; fixed by the learned positions.
        num_inference_steps: denoising steps.
        guidance_scale: 1.0 runs the conditional branch only; no unconditional branch was trained.
        max_sequence_length: text tokens, one per word, padded.
        fps: frames per second at which the clips are meant to be played.
    """

    height: int = 192
    width: int = 320
    num_frames: int = 17
    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    max_sequence_length: int = 16
    fps: int = 8

    def call_arguments(self) -> dict:
        """Returns the keyword arguments of `CogVideoXPipeline.__call__` (everything but `fps`)."""
        arguments = dict(self.__dict__)
        arguments.pop("fps")
        return arguments


DEMO_DEFAULTS = DemoDefaults()
