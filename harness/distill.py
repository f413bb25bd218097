"""``python -m harness.distill``: fine-tune a model under sparse attention towards its own dense outputs.

    python -m harness.distill --strategy gilbert-block:block_size=64,selection=topk,keep_ratio=0.1 \\
        --output runs/distill

The output folder gets the trained transformer, ``distill.json`` with every figure, the curve of the error,
for each held-out prompt one clip (dense, sparse before, sparse after), and the first of them in one moving
picture. Exit codes: 0 done, 2 bad input, 130 stopped with Ctrl-C.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import UnsupportedCallError, create_strategy
from harness.command import make_parser, parse_options, require_at_least, run_command
from harness.distillation import DistillSettings, call_error, distill, record_teacher
from harness.environment import provenance
from harness.errors import BenchError
from harness.generate import generate
from harness.jobs import StrategySpec, parse_spec
from harness.metrics import psnr_db
from harness.model_options import ModelOptions, add_model_options
from harness.models import LoadedModel
from harness.run_folder import check_writable, locked, utc_now, write_text
from harness.video import write_mp4

HELD_OUT_SEED, TRAINING_SEED = 0, 1000
PICTURE_ROWS = 3
SMOOTHING = 16  # updates that one point of the curve is the mean of


@dataclass(frozen=True)
class DistillConfig:
    """Checked settings of one call.

    Args:
        spec (StrategySpec): sparse attention to train under.
        model (ModelOptions): which model, and how.
        held_out (list[str]): prompts of the comparison.
        prompts (list[str]): prompts to learn from.
        videos (int): videos to learn from per prompt.
        settings (DistillSettings): how to train.
        output (Path): folder to write.
    """

    spec: StrategySpec
    model: ModelOptions
    held_out: list[str]
    prompts: list[str]
    videos: int
    settings: DistillSettings
    output: Path


class Videos(NamedTuple):
    """Frames of the held-out prompts, and the mean executed density."""

    frames: list[np.ndarray]
    density: float


def parse_arguments(arguments: list[str]) -> DistillConfig:
    """Read the command line.

    Raises:
        BenchError: an option has a wrong value.
        SparseAttnError: the strategy does not exist, or cannot be trained under.
    """
    parser = make_parser("harness.distill", __doc__)
    parser.add_argument("--strategy", type=str, required=True, help="NAME or NAME:key=value,...")
    add_model_options(parser, choose_dtype=False)
    parser.add_argument("--prompts", type=int, default=8, help="prompts to learn from")
    parser.add_argument("--videos", type=int, default=1, help="videos to learn from per prompt")
    parser.add_argument("--held-out", type=int, default=2, help="prompts of the comparison, the first ones")
    parser.add_argument("--updates", type=int, default=64, help="steps of the optimiser")
    parser.add_argument("--batch", type=int, default=1, help="denoiser calls per update")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parse_options(parser, arguments)
    require_at_least(options, 1, "prompts", "videos", "held_out", "updates", "batch")
    if not options.learning_rate > 0:
        raise BenchError(f"--learning-rate must be above 0, got {options.learning_rate}")
    spec = parse_spec(options.strategy)
    if not spec.create().capabilities.backward:
        raise UnsupportedCallError(f"strategy '{spec.name}' has no backward pass, so nothing can be trained")
    model = ModelOptions(options.model, options.steps, options.device, dtype="float32")
    prompts = model.first_prompts(options.prompts + options.held_out, "--prompts and --held-out")
    return DistillConfig(
        spec=spec,
        model=model,
        held_out=prompts[: options.held_out],
        prompts=prompts[options.held_out :],
        videos=options.videos,
        settings=DistillSettings(options.updates, options.learning_rate, options.batch),
        output=options.output,
    )


def run(config: DistillConfig, command: str) -> dict[str, Any]:
    """Generate, train, compare and write everything.

    Returns:
        dict: the content of ``distill.json``.

    Raises:
        BenchError: the folder cannot be written, or another call writes to it.
    """
    lock = config.output / ".lock"
    check_writable(lock)
    with locked(lock, f"another distillation is written to {config.output}"):
        for clip in config.output.glob("clip_*.mp4"):  # of an earlier call, perhaps with more prompts
            clip.unlink()
        return _run(config, command)


def _run(config: DistillConfig, command: str) -> dict[str, Any]:
    started = time.perf_counter()
    model = config.model.load()
    denoiser = model.denoiser
    dense = _videos(model, None, config.held_out)
    before = _videos(model, config.spec, config.held_out)
    unseen = record_teacher(model, config.held_out, HELD_OUT_SEED)
    error_before = call_error(model, config.spec.create(), unseen)
    calls = record_teacher(model, config.prompts, TRAINING_SEED, config.videos)
    recorded = time.perf_counter()
    seconds = recorded - started
    print(
        f"{len(calls)} dense calls of {len(config.prompts) * config.videos} videos recorded, {seconds:.0f} s",
        flush=True,
    )
    errors = distill(model, config.spec.create(), calls, config.settings, _print_update)
    trained = time.perf_counter()
    error_after = call_error(model, config.spec.create(), unseen)
    after = _videos(model, config.spec, config.held_out)
    dense_after = _videos(model, None, config.held_out)
    denoiser.save_pretrained(config.output / "transformer")
    record = provenance(model.device, command) | {
        "strategy": config.spec.label,
        "model": model.name,
        "density": round(after.density, 4),
        "psnr_to_dense_db": {
            "before": _likeness(before, dense),
            "after": _likeness(after, dense),
            "dense_with_trained_weights": _likeness(dense_after, dense),
        },
        "call_error": {"before": round(error_before, 5), "after": round(error_after, 5)},
        "held_out": config.held_out,
        "training_prompts": len(config.prompts),
        "videos_per_prompt": config.videos,
        "updates": config.settings.updates,
        "calls_per_update": min(config.settings.batch, len(config.prompts) * config.videos),
        "learning_rate": config.settings.learning_rate,
        "relative_errors": [round(error, 5) for error in errors],
        "training_s": round(trained - recorded, 1),
        "total_s": round(time.perf_counter() - started, 1),
        "date": utc_now(),
    }
    write_text(config.output / "distill.json", json.dumps(record, indent=2) + "\n")
    _draw_curve(errors, config.output / "curve.png")
    columns = zip(dense.frames, before.frames, after.frames, strict=True)
    clips = [np.concatenate(videos, axis=2) for videos in columns]
    for number, clip in enumerate(clips):
        write_mp4(config.output / f"clip_{number}.mp4", clip, model.settings.fps)
    _write_picture(clips[:PICTURE_ROWS], config.output / "clips.webp", model.settings.fps)
    return record


def _videos(model: LoadedModel, spec: StrategySpec | None, prompts: Sequence[str]) -> Videos:
    frames, densities = [], []
    for prompt in prompts:
        strategy = create_strategy("dense") if spec is None else spec.create()
        generated = generate(model, strategy, prompt, HELD_OUT_SEED)
        frames.append(generated.frames)
        densities.append(generated.denoised.report.density)
    return Videos(frames, sum(densities) / len(densities))


def _likeness(videos: Videos, reference: Videos) -> list[float]:
    """PSNR of every video to the reference, in dB."""
    pairs = zip(videos.frames, reference.frames, strict=True)
    return [round(float(psnr_db(video, dense) or 0.0), 3) for video, dense in pairs]


def _print_update(number: int, error: float) -> None:
    print(f"update {number}: relative error {error:.4f}", flush=True)


def _write_picture(clips: Sequence[np.ndarray], path: Path, fps: float) -> None:
    """Clips ``[F, H, W, 3]`` one below the other, as an animated WebP."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in np.concatenate(clips, axis=1)]
    timing = {"duration": round(1000 / fps), "loop": 0}
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:], quality=60, **timing)


def _draw_curve(errors: Sequence[float], path: Path) -> None:
    """Error of every update, and its running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    updates = np.arange(1, len(errors) + 1)
    width = min(SMOOTHING, len(errors))
    means = np.convolve(errors, np.ones(width) / width, mode="valid")
    axes.plot(updates, errors, ".", markersize=3, alpha=0.5, label="one call")
    axes.plot(updates[width - 1 :], means, label=f"mean of {width}")
    axes.set(xlabel="update", ylabel="relative error to dense", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Distill and print what it brought.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command("harness.distill", argv, _distill)


def _distill(arguments: list[str], command: str) -> None:
    config = parse_arguments(arguments)
    record = run(config, command)
    for name, values in record["psnr_to_dense_db"].items():
        print(f"PSNR to dense, {name}: {sum(values) / len(values):.2f} dB")
    errors = record["call_error"]
    print(f"relative error of one call, held out: {errors['before']:.4f} before, {errors['after']:.4f} after")
    print(f"density {record['density']:.3f}, {record['total_s']} s; see {config.output}")


if __name__ == "__main__":
    sys.exit(main())
