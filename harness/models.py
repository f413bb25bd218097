"""Models of the benchmark: loading a pipeline, and the call settings it is run with."""

import importlib
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness.errors import BenchError
from harness.tiny_model import build_random_2b_pipeline, build_tiny_pipeline

DEMO = "demo"
TINY = "tiny-random"
RANDOM_2B = "cogvideox-2b-random"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_REASON = 300
SIZE_MULTIPLE = 16  # pixels: 8 of the autoencoder times 2 of the patches
MOST_PIXELS, MOST_FRAMES = 4096, 1025  # past any CogVideoX model; a typing error, not a wish


@dataclass(frozen=True)
class CallSettings:
    """How every video of a run is generated.

    Args:
        height (int): pixels, a multiple of 16.
        width (int): pixels, a multiple of 16.
        num_frames (int): 4k + 1 where the autoencoder compresses time by 4.
        steps (int): denoising steps.
        guidance_scale (float): classifier-free guidance; 1.0 means none.
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


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline on its device, with its settings."""

    name: str
    pipeline: Any
    settings: CallSettings
    device: torch.device
    dtype: str


TINY_SETTINGS = CallSettings(height=128, width=128, num_frames=9, steps=4, guidance_scale=6.0, fps=8)


def demo_settings() -> CallSettings:
    """Settings that the demo model was trained for."""
    from harness.demo_model import DEMO_DEFAULTS as demo

    return CallSettings(
        height=demo.height,
        width=demo.width,
        num_frames=demo.num_frames,
        steps=demo.num_inference_steps,
        guidance_scale=demo.guidance_scale,
        fps=demo.fps,
    )


def preset_name(model: str) -> str:
    """Name under which plugins register presets for a model: ``zai-org/CogVideoX-2b`` is ``cogvideox-2b``."""
    return model.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()


def preset_names(model: str) -> tuple[str, ...]:
    """Presets that fit a model: its own (``cogvideox-2b``), then its family's (``cogvideox``)."""
    own = preset_name(model)
    return (own,) if model in (DEMO, TINY) else (own, "cogvideox")


def default_dtype(model: str, device: torch.device) -> str:
    """float32 on a CPU; on CUDA bfloat16, or float16 for CogVideoX-2b, which was trained in it."""
    if device.type == "cpu":
        return "float32"
    return "float16" if preset_name(model).endswith("-2b") else "bfloat16"


def check_request(model: str, requested: dict[str, Any]) -> None:
    """Refuse what no CogVideoX model can do, before anything is loaded.

    Args:
        model (str): name as given to ``--model``.
        requested (dict): settings from the command line; None where not given.

    Raises:
        BenchError: a value is out of range, the model does not exist, or the demo model is asked for
            another size.
    """
    for name in ("height", "width"):
        value = requested.get(name)
        if value is not None and (not 0 < value <= MOST_PIXELS or value % SIZE_MULTIPLE):
            raise BenchError(
                f"--{name} must be a positive multiple of {SIZE_MULTIPLE}, at most {MOST_PIXELS}, got {value}"
            )
    for name in ("steps", "fps"):
        value = requested.get(name)
        if value is not None and value < 1:
            raise BenchError(f"--{name} must be at least 1, got {value}")
    guidance = requested.get("guidance_scale")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise BenchError(f"--guidance-scale must be a number of at least 0, got {guidance}")
    frames = requested.get("num_frames")
    if frames is not None and (frames < 1 or frames % 4 != 1):
        near = max(1, 4 * ((frames - 1) // 4) + 1)
        raise BenchError(f"--num-frames must be 4k + 1, got {frames}; the nearest are {near} and {near + 4}")
    if frames is not None and frames > MOST_FRAMES:
        raise BenchError(f"--num-frames must be at most {MOST_FRAMES}, got {frames}")
    if model == DEMO:
        _check_demo_size(requested)
    elif model not in {TINY, RANDOM_2B}:
        _check_exists(model)


def load_model(
    name: str,
    requested: dict[str, Any],
    device: torch.device,
    dtype: str | None = None,
    low_memory: bool = False,
) -> LoadedModel:
    """Load a CogVideoX pipeline.

    Args:
        name (str): ``"demo"``, ``"tiny-random"``, ``"cogvideox-2b-random"``, a folder or a hub id.
        requested (dict): settings that replace the model's own; None where not given.
        device (torch.device): where to run.
        dtype (str, Optional): key of `DTYPES`. Default: see `default_dtype`
        low_memory (bool): keep on the GPU only the part that runs, and decode in tiles. Default: False

    Raises:
        BenchError: the model cannot be loaded, or cannot make videos of that size.
    """
    dtype = dtype or default_dtype(name, device)
    silence_libraries()
    if name == TINY:
        pipeline = _tiny(DTYPES[dtype])
    elif name == RANDOM_2B:
        pipeline = build_random_2b_pipeline(DTYPES[dtype], device)
    else:
        pipeline = _read_pipeline(name, DTYPES[dtype])
    settings = _own_settings(name, pipeline).changed(requested)
    _check_settings(name, pipeline, settings)
    pipeline.set_progress_bar_config(disable=True)
    if low_memory:
        pipeline.vae.enable_tiling()
    if low_memory and device.type == "cuda":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return LoadedModel(name, pipeline, settings, device, dtype)


def silence_libraries() -> None:
    """Keep advice and loading bars of diffusers and transformers out of the progress display."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _tiny(dtype: torch.dtype) -> Any:
    pipeline = build_tiny_pipeline()
    return pipeline if dtype == torch.float32 else pipeline.to(dtype)


def _check_demo_size(requested: dict[str, Any]) -> None:
    own = demo_settings().size
    asked = {name: requested.get(name) or value for name, value in own.items()}
    if asked != own:
        raise BenchError(
            f"the demo model has learned positions for {own['num_frames']} frames of "
            f"{own['width']}x{own['height']} only, got {asked['num_frames']} frames of "
            f"{asked['width']}x{asked['height']}; leave the size out, or take another --model"
        )


def _check_exists(name: str) -> None:
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").is_file():
            raise BenchError(f"folder '{name}' holds no diffusers pipeline (it has no model_index.json)")
        return
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise BenchError(
            f"there is no model '{name}'; expected {DEMO}, {TINY}, {RANDOM_2B}, an existing folder or a hub "
            "id such as zai-org/CogVideoX-2b"
        )


def _read_pipeline(name: str, dtype: torch.dtype) -> Any:
    # Of the parts of diffusers only this one; the others are loaded by name from model_index.json.
    from diffusers import CogVideoXPipeline, DiffusionPipeline

    source = name
    if name == DEMO:
        weights = importlib.import_module("harness.demo_model").WEIGHTS_DIR
        source = str(weights)
        if not (weights / "model_index.json").is_file():
            raise BenchError(f"the demo model's weights are missing from this installation ({weights})")
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except Exception as error:  # hub, file and weight errors come in dozens of types
        reason = str(error).strip().split("\n")[0][:LONGEST_REASON] or type(error).__name__
        raise BenchError(f"cannot load model '{name}': {reason}") from error
    if not isinstance(pipeline, CogVideoXPipeline):
        kind = type(pipeline).__name__
        raise BenchError(f"model '{name}' is a {kind}; expected a CogVideoX text-to-video pipeline")
    return pipeline


def _own_settings(name: str, pipeline: Any) -> CallSettings:
    if name in {DEMO, TINY}:
        return demo_settings() if name == DEMO else TINY_SETTINGS
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


def _check_settings(name: str, pipeline: Any, settings: CallSettings) -> None:
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
