"""Generate one video with one strategy, and measure it."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from core import AttentionStrategy, ExecutionReport, apply_strategy
from core.apply import find_adapter, find_denoisers
from harness.models import LoadedModel
from harness.timing import DenoiseClock, StepCallback, peak_memory_bytes, reset_peak_memory, synchronise


@dataclass(frozen=True)
class Denoised:
    """Outcome of one denoising pass.

    Args:
        latents (Tensor): as the pipeline returns them, ``[1, F, C, H, W]`` of CogVideoX, ``[1, C, F, H, W]``
            of HunyuanVideo and Wan, ``[1, F * H * W, C]`` of LTX-Video.
        denoise_time_s (float): see `DenoiseClock`.
        tokens (int): sequence length.
        report (ExecutionReport): what the strategy executed, with its attention time.
    """

    latents: torch.Tensor
    denoise_time_s: float
    tokens: int
    report: ExecutionReport


@dataclass(frozen=True)
class Generated:
    """A denoising pass with its video.

    Args:
        denoised (Denoised): the denoising pass.
        frames (ndarray): ``[F, H, W, 3]`` uint8.
        wall_time_s (float): text encoder to frames.
        peak_memory_bytes (int, Optional): see `harness.timing.peak_memory_bytes`.
    """

    denoised: Denoised
    frames: np.ndarray
    wall_time_s: float
    peak_memory_bytes: int | None


def generate(
    model: LoadedModel,
    strategy: AttentionStrategy,
    prompt: str,
    seed: int,
    on_step: StepCallback | None = None,
) -> Generated:
    """Text to frames.

    Args:
        model (LoadedModel): pipeline and settings.
        strategy (AttentionStrategy): what computes attention.
        prompt (str): the prompt.
        seed (int): seed of the initial noise, drawn on the CPU so that every device starts alike.
        on_step (StepCallback, Optional): told the number of finished steps.
    """
    reset_peak_memory(model.device)
    started = time.perf_counter()
    denoised = denoise(model, strategy, prompt, seed, on_step=on_step)
    frames = decode(model, denoised.latents)
    synchronise(model.device)
    wall_time_s = time.perf_counter() - started
    return Generated(denoised, frames, wall_time_s, peak_memory_bytes(model.device))


def denoise(
    model: LoadedModel,
    strategy: AttentionStrategy,
    prompt: str,
    seed: int,
    *,
    steps: int | None = None,
    on_step: StepCallback | None = None,
) -> Denoised:
    """Text to latents; see `generate` for the arguments. ``steps`` replaces the model's setting."""
    pipeline, settings = model.pipeline, model.settings
    steps = steps or settings.steps
    denoiser, *others = find_denoisers(pipeline)
    tokens: list[int] = []

    def read_tokens(called: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens.append(find_adapter(called).read_call(called, args, kwargs).layout.sequence_length)

    clock = DenoiseClock(
        denoiser, model.device, steps, others=others, on_step=on_step, on_first_call=read_tokens
    )
    with apply_strategy(pipeline, strategy, time_attention=True) as run, clock:
        latents = pipeline(
            prompt,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=clock.on_step_end,
            output_type="latent",
            **model.family.call_arguments(pipeline),
        ).frames
        report = run.report()
    if clock.elapsed_s is None:
        raise RuntimeError(f"the pipeline ended before step {steps}, so its denoising time is unknown")
    return Denoised(latents, clock.elapsed_s, tokens[0], report)


@torch.no_grad()
def decode(model: LoadedModel, latents: torch.Tensor) -> np.ndarray:
    """Latents to frames, as the pipeline itself does it.

    Returns:
        ndarray: ``[F, H, W, 3]`` uint8.
    """
    pipeline = model.pipeline
    video = model.family.decode(pipeline, latents, model.settings)
    frames = pipeline.video_processor.postprocess_video(video=video, output_type="np")[0]
    pipeline.maybe_free_model_hooks()
    return np.rint(frames * 255).astype(np.uint8)
