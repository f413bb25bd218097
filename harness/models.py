"""Models of the benchmark: loading a pipeline, and the call settings it is run with."""

import importlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import DenoiserRecord
from core.apply import find_denoisers
from harness.errors import BenchError
from harness.model_families import (
    COGVIDEOX,
    FAMILIES,
    CallSettings,
    ModelFamily,
    family_of_class,
    family_of_name,
)
from harness.small_models import TINY
from harness.tiny_model import build_random_2b_pipeline

DEMO = "demo"
RANDOM_2B = "cogvideox-2b-random"
BUILT_IN = {DEMO: COGVIDEOX, **{name: tiny.family for name, tiny in TINY.items()}, RANDOM_2B: COGVIDEOX}
SMALL = (DEMO, *TINY)
"""Models for short prompts, whose times on a GPU say nothing about large ones."""
MODEL_CHOICE = f"{', '.join(BUILT_IN)}, a folder or a hub id (CogVideoX, HunyuanVideo, LTX-Video, Wan)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_REASON = 300
SIZE_MULTIPLE = 16  # pixels: the least that a family needs, 8 of the autoencoder times 2 of the patches
MOST_PIXELS, MOST_FRAMES = 4096, 1025  # past any model; a typing error, not a wish


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline on its device, with its settings."""

    name: str
    pipeline: Any
    settings: CallSettings
    device: torch.device
    dtype: str

    @property
    def family(self) -> ModelFamily:
        """What is known of pipelines of this class."""
        return _family_or_refuse(self.name, type(self.pipeline).__name__)

    @property
    def records(self) -> list[DenoiserRecord]:
        """What the denoisers are, for files that are made for them."""
        return [DenoiserRecord.of(denoiser) for denoiser in find_denoisers(self.pipeline)]

    @property
    def denoiser(self) -> Any:
        """The denoiser, where there can be only one.

        Raises:
            BenchError: the pipeline has two, for different steps.
        """
        denoisers = find_denoisers(self.pipeline)
        if len(denoisers) > 1:
            raise BenchError(
                f"model '{self.name}' has {len(denoisers)} denoisers for different steps, and this command "
                "works on the weights of one; take a model with one"
            )
        return denoisers[0]


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
    """Presets that fit a model: its own (``cogvideox-2b``), then its family's (``cogvideox``).

    Raises:
        BenchError: a model whose name does not tell its family cannot be read, or is of none that is known.
    """
    own = preset_name(model)
    if model in SMALL:
        return (own,)
    named = None if Path(model).is_dir() else family_of_name(own)
    return (named or find_family(model)).preset_names(own)


def default_dtype(model: str, family: ModelFamily, device: torch.device) -> str:
    """float32 on a CPU; on CUDA bfloat16, or float16 for CogVideoX-2b, which was trained in it."""
    return "float32" if device.type == "cpu" else family.gpu_dtype(preset_name(model))


def find_family(model: str) -> ModelFamily:
    """The family of a model, by the class in its ``model_index.json``.

    Args:
        model (str): as given to ``--model``.

    Raises:
        BenchError: it cannot be read, or is not a text-to-video pipeline of a known family.
    """
    if model in BUILT_IN:
        return BUILT_IN[model]
    from transformers.utils import cached_file

    try:
        index = json.loads(Path(cached_file(model, "model_index.json")).read_text(encoding="utf-8"))
    except Exception as error:  # hub and file errors come in dozens of types
        raise _not_loaded(model, error) from error
    return _family_or_refuse(model, index.get("_class_name", "pipeline without a class"))


def _family_or_refuse(model: str, kind: str) -> ModelFamily:
    family = family_of_class(kind)
    if family is None:
        known = ", ".join(family.pipeline_class for family in FAMILIES)
        raise BenchError(f"model '{model}' is a {kind}; expected one for text to video: {known}")
    return family


def _not_loaded(model: str, error: Exception) -> BenchError:
    reason = str(error).strip().split("\n")[0][:LONGEST_REASON] or type(error).__name__
    return BenchError(f"cannot load model '{model}': {reason}")


def check_request(model: str, requested: dict[str, Any]) -> None:
    """Refuse what no model can do, before anything is loaded.

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
    elif model not in BUILT_IN:
        _check_exists(model)


def load_model(
    name: str,
    requested: dict[str, Any],
    device: torch.device,
    dtype: str | None = None,
    low_memory: bool = False,
) -> LoadedModel:
    """Load a text-to-video pipeline.

    Args:
        name (str): key of `BUILT_IN`, a folder or a hub id.
        requested (dict): settings that replace the model's own; None where not given.
        device (torch.device): where to run.
        dtype (str, Optional): key of `DTYPES`. Default: see `default_dtype`
        low_memory (bool): keep on the GPU only the part that runs, and decode in tiles. Default: False

    Raises:
        BenchError: the model cannot be loaded, or cannot make videos of that size.
    """
    silence_libraries()
    family = find_family(name)
    dtype = dtype or default_dtype(name, family, device)
    pipeline = _make_pipeline(name, family, DTYPES[dtype], device)
    settings = _own_settings(name, family, pipeline).changed(requested)
    family.check_settings(name, pipeline, settings)
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
            f"there is no model '{name}'; expected {', '.join(BUILT_IN)}, an existing folder or a hub id "
            "such as zai-org/CogVideoX-2b"
        )


def _make_pipeline(name: str, family: ModelFamily, dtype: torch.dtype, device: torch.device) -> Any:
    if name == RANDOM_2B:
        return build_random_2b_pipeline(dtype, device)
    exact = dict.fromkeys(family.exact_parts, torch.float32)
    if name not in TINY:
        return _read_pipeline(name, exact | {"default": dtype} if exact else dtype)
    pipeline = TINY[name].build()
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            module.to(exact.get(part, dtype))
    return pipeline


def _read_pipeline(name: str, dtype: torch.dtype | dict[str, torch.dtype]) -> Any:
    # Of the parts of diffusers only this one; the others are loaded by name from model_index.json.
    from diffusers import DiffusionPipeline

    source = name
    if name == DEMO:
        weights = importlib.import_module("harness.demo_model").WEIGHTS_DIR
        source = str(weights)
        if not (weights / "model_index.json").is_file():
            raise BenchError(f"the demo model's weights are missing from this installation ({weights})")
    try:
        return DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except Exception as error:  # hub, file and weight errors come in dozens of types
        raise _not_loaded(name, error) from error


def _own_settings(name: str, family: ModelFamily, pipeline: Any) -> CallSettings:
    if name == DEMO:
        return demo_settings()
    return TINY[name].settings if name in TINY else family.own_settings(pipeline)
