"""Synthetic run folders for the tests of the gallery."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from harness.results import ResultRow, append_row, write_json
from harness.video import write_mp4

HEIGHT, WIDTH, FRAMES = 96, 160, 9
LABELS = (
    "dense",
    "radial",
    "sparge",
    "svg-smart",
    "tome",
    "gilbert-block",
    "combined",
    "radial:decay_factor=0.3",
    "sparge:preset=demo",
    "tome:ratio=0.25",
)
PROMPTS = (
    "a large red ball moves right in the desert",
    "a small blue cube falls on a meadow",
    "a green cone circles at night while a yellow ring rises behind it",
    "a yellow ball bounces in the snow",
    "a purple ring grows in the studio",
    "an orange cube moves left in the desert",
)


def write_run(
    folder: Path, labels: tuple[str, ...] = LABELS[:3], prompts: tuple[str, ...] = PROMPTS[:2], **changes: Any
) -> Path:
    """A complete run: one row and one tiny video for each label and prompt.

    Args:
        folder (Path): made; the run folder.
        labels (tuple[str, ...]): the strategies, dense first.
        prompts (tuple[str, ...]): one group of videos for each.
        changes (Any): values of ``run.json`` that differ from the usual ones.
    """
    (folder / "videos").mkdir(parents=True)
    write_json(folder / "run.json", settings() | changes)
    for prompt_index, prompt in enumerate(prompts):
        for place, label in enumerate(labels):
            row = make_row(label, prompt, prompt_index, place)
            write_mp4(folder / str(row.video), clip(prompt_index, place))
            append_row(folder / "results.jsonl", row)
    return folder


def settings() -> dict[str, Any]:
    """``run.json`` of a run on a GPU."""
    return {
        "model": "demo",
        "device": "NVIDIA H200",
        "size": {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES},
        "steps": 6,
        "guidance_scale": 1.0,
        "dtype": "bfloat16",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "diffusers": "0.42.1", "sageattention": None},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "command": "nox -s bench -- --strategies dense radial sparge --output runs/demo",
        "created_at": "2026-11-20T19:40:00+00:00",
    }


def make_row(label: str, prompt: str, prompt_index: int, place: int, /, **changes: Any) -> ResultRow:
    """One finished job with plausible figures; ``place`` is the strategy's among the labels."""
    usual = settings()
    dense = label == "dense"
    wobble = 0.03 * math.sin(5 * prompt_index + place)
    job_id = f"job-{prompt_index}-{place}"
    sparse = {
        "speedup": 1 + 0.12 * place + wobble,
        "attention_speedup": 1 + 0.3 * place + wobble,
        "dense_denoise_time_s": 1.2,
        "dense_attention_time_s": 0.6,
        "psnr_db": 34 - 1.4 * place + 20 * wobble,
        "ssim": 0.97 - 0.02 * place + wobble / 4,
        "identical": False,
    }
    values = {
        "job_id": job_id,
        "label": label,
        "strategy": label.partition(":")[0],
        "preset": None,
        "parameters": {} if dense else {"dense_layers": 1, "dense_timesteps": 2, "block_size": 64},
        "model": usual["model"],
        "prompt": prompt,
        "prompt_index": prompt_index,
        "seed": 42,
        "steps": usual["steps"],
        "size": usual["size"],
        "guidance_scale": usual["guidance_scale"],
        "dtype": usual["dtype"],
        "device": usual["device"],
        "versions": usual["versions"],
        "commit": usual["commit"],
        "started_at": usual["created_at"],
        "status": "ok",
        "tokens": 4096,
        "wall_time_s": 2.5,
        "denoise_time_s": 1.2 / (1 + 0.12 * place),
        "attention_time_s": 0.6 / (1 + 0.3 * place),
        "density": density(place),
        "density_by_layer": density_map(place),
        "backends": {"triton": 48},
        "peak_memory_bytes": 2_400_000_000 - 40_000_000 * place,
        "temporal": {"flow_warp_error": 0.011 + 0.001 * place, "flow_warp_error_dense": 0.011},
        "video": f"videos/{job_id}.mp4",
        "frames": f"frames/{job_id}.mkv",
    }
    return ResultRow(**(values | ({} if dense else sparse) | changes))


def density(place: int) -> float:
    """Executed density of the strategy at this place; dense stands at place 0."""
    return 1.0 if place == 0 else 0.75 / (1 + 0.5 * place) + 0.1


def density_map(place: int, layers: int = 8, steps: int = 6) -> list[list[float | None]]:
    """Layers by steps, with a dense warm-up of one layer and two steps."""
    base = density(place)
    return [
        [1.0 if layer == 0 or step < 2 else base * (0.6 + 0.05 * (layer + step)) for step in range(steps)]
        for layer in range(layers)
    ]


def clip(prompt_index: int, place: int) -> np.ndarray:
    """A ball that crosses a painted ground; strategies differ by a slight offset and noise."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    sky = np.array(
        [(238, 206, 160), (150, 200, 235), (40, 50, 90), (215, 226, 238), (226, 222, 216), (235, 190, 140)]
    )
    ball = np.array(
        [(200, 50, 40), (45, 90, 200), (60, 170, 90), (230, 180, 40), (130, 70, 180), (235, 120, 30)]
    )
    noise = np.random.default_rng(100 * prompt_index + place)
    frames = []
    for frame in range(FRAMES):
        picture = np.empty((HEIGHT, WIDTH, 3))
        picture[:] = sky[prompt_index % 6] * (0.75 + 0.25 * (1 - rows / HEIGHT))[..., None]
        picture[rows > 0.7 * HEIGHT] *= 0.82
        x, y = 30 + 11 * frame + place, 0.62 * HEIGHT - 14 * math.sin(frame / 8 * math.pi)
        inside = (columns - x) ** 2 + (rows - y) ** 2 < 15**2
        shade = 0.65 + 0.35 * np.clip((x + 15 - columns + y + 15 - rows) / 50, 0, 1)
        picture[inside] = (ball[prompt_index % 6] * shade[..., None])[inside]
        picture += noise.normal(0, 1.2 * place, picture.shape)
        frames.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(frames)
