"""Measures the shipped demo model and writes `evaluation.json` and `evaluation.md`.

    python -m harness.demo_model.evaluate                              every section
    python -m harness.demo_model.evaluate --sections speed             one section, the others stay

Sections: quality (autoencoder, judge, held-out captions), attention (mass of the best blocks), speed
(seconds, determinism).
Every section carries the device, versions and settings it was measured with.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import CogVideoXPipeline

from harness.demo_model.attention_mass import BLOCK, FRACTIONS, measure_attention_mass
from harness.demo_model.captions import CAMERAS, Scene, caption, held_out_pairs, held_out_scenes
from harness.demo_model.clips import render_clips
from harness.demo_model.defaults import DEMO_DEFAULTS, WEIGHTS_DIR
from harness.demo_model.evaluation_report import write_markdown
from harness.demo_model.export import SIZE_LIMIT_BYTES, folder_bytes
from harness.demo_model.judge import Judge, compare

REPORT_DIR = WEIGHTS_DIR.parent / "report"
SECTIONS = ("quality", "attention", "speed")
_RENDER_SEED = 7_000_000  # apart from every seed that training draws clips with
_JUDGE_BATCH = 8


def environment(device: torch.device, dtype: str) -> dict:
    """Returns device name, dtype, thread count and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def load_pipeline(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> CogVideoXPipeline:
    """Loads the pipeline without progress bars."""
    pipeline = CogVideoXPipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def camera_scenes(count: int = 24) -> list[Scene]:
    """Returns held-out single-object scenes with a camera pan, directions alternating."""
    directions = tuple(CAMERAS)
    scenes = held_out_scenes()[::4][:count]
    return [Scene(scene.objects, scene.ground, directions[index % 2]) for index, scene in enumerate(scenes)]


def spread_out(scenes: list[Scene], limit: int | None) -> list[Scene]:
    """Returns at most `limit` scenes, evenly spread over the list; all of them for None."""
    if limit is None or limit >= len(scenes):
        return scenes
    return [scenes[index * len(scenes) // limit] for index in range(limit)]


def rates(outcomes: list[dict[str, bool]]) -> dict[str, float]:
    """Returns the fraction of clips (0 to 1) that are right, part by part."""
    return {name: sum(outcome[name] for outcome in outcomes) / len(outcomes) for name in outcomes[0]}


@torch.no_grad()
def evaluate_autoencoder(vae, scenes: list[Scene], device) -> dict:
    """Returns the PSNR in dB of encoding and decoding rendered clips, over all pixels and over object
    pixels.
    """
    squared, pixels, object_squared, object_pixels = 0.0, 0, 0.0, 0
    for index, scene in enumerate(scenes):
        clips = render_clips([scene], [_RENDER_SEED + index], device=device)
        video = clips.frames.movedim(2, 1)  # (1, 3, T, H, W)
        latents = vae.encode(video.to(vae.dtype) * 2 - 1).latent_dist.mode()
        output = (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        error = (output - video).square().mean(1)
        inside = clips.masks.amax(1) > 0.5
        squared, pixels = squared + error.sum().item(), pixels + error.numel()
        object_squared, object_pixels = (
            object_squared + error[inside].sum().item(),
            object_pixels + inside.sum().item(),
        )
    decibel = lambda total, count: -10 * torch.tensor(total / count).log10().item()  # noqa: E731
    return {
        "clips": len(scenes),
        "psnr_db": decibel(squared, pixels),
        "psnr_object_db": decibel(object_squared, object_pixels),
    }


def check_judge(judge: Judge, scenes: list[Scene], device) -> dict:
    """Returns how often the judge is right on rendered clips, where the truth is known."""
    outcomes = []
    for index, scene in enumerate(scenes):
        frames = render_clips([scene], [_RENDER_SEED + 500 + index], device=device).frames[0]
        outcomes.append(compare(scene, judge.judge(frames, len(scene.objects))))
    return {"clips": len(scenes), **rates(outcomes)}


def evaluate_captions(pipeline, judge: Judge, scenes: list[Scene], steps: int) -> dict:
    """Generates each caption with its own seed and returns how often the judge finds it right."""
    arguments = {**DEMO_DEFAULTS.call_arguments(), "num_inference_steps": steps}
    outcomes, wrong = [], []
    for start in range(0, len(scenes), _JUDGE_BATCH):
        batch = scenes[start : start + _JUDGE_BATCH]
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(batch))]
        prompts = [caption(scene) for scene in batch]
        videos = pipeline(prompts, generator=generators, output_type="pt", **arguments).frames
        for offset, (scene, prompt, video) in enumerate(zip(batch, prompts, videos, strict=False)):
            outcome = compare(scene, judge.judge(video, len(scene.objects)))
            outcomes.append(outcome)
            if not outcome["all"]:
                failed = [name for name in ("colour", "shape", "motion", "ground") if not outcome[name]]
                wrong.append({"caption": prompt, "seed": start + offset, "wrong": failed})
    return {"clips": len(outcomes), **rates(outcomes), "failures": wrong}


def evaluate_quality(pipeline, options, device) -> dict:
    """Runs the autoencoder, the judge on rendered clips, and the held-out captions at each step count."""
    singles, pairs, cameras = held_out_scenes(), held_out_pairs(), camera_scenes()
    judge = Judge(device)
    singles, pairs, cameras = (spread_out(scenes, options.limit) for scenes in (singles, pairs, cameras))
    result = {
        "autoencoder": evaluate_autoencoder(pipeline.vae, singles[::8] + pairs[::4], device),
        "judge_one_object": check_judge(judge, singles, device),
        "judge_two_objects": check_judge(judge, pairs * 2, device),
        "judge_camera": check_judge(judge, cameras, device),
        "captions": {},
    }
    for steps in options.steps:
        sets = {"one_object": singles, "two_objects": pairs, "camera_pan": cameras}
        result["captions"][str(steps)] = {
            name: evaluate_captions(pipeline, judge, scenes, steps) for name, scenes in sets.items()
        }
        summary = {name: round(value["all"], 3) for name, value in result["captions"][str(steps)].items()}
        print(f"{steps} steps: all right {summary}", flush=True)
    return result


def evaluate_attention(pipeline, options, device) -> dict:
    """Returns block masses as nested lists: layer, head, fraction."""
    scenes = spread_out(held_out_scenes()[::24] + held_out_pairs()[::12], options.limit)
    prompts = [caption(scene) for scene in scenes]
    mass = measure_attention_mass(pipeline, prompts, DEMO_DEFAULTS.call_arguments())
    return {
        "block_tokens": BLOCK,
        "fractions": list(FRACTIONS),
        "prompts": prompts,
        "mass": [[[round(value, 4) for value in head] for head in layer] for layer in mass.tolist()],
        "mean": [round(value, 4) for value in mass.mean((0, 1)).tolist()],
    }


def evaluate_speed(pipeline, options, device) -> dict:
    """Times whole videos at the default settings and compares two runs of one seed bit for bit."""
    prompt = caption(held_out_scenes()[0])
    seconds, videos = [], []
    for seed in (0, 0, 1):
        start = time.perf_counter()
        call = DEMO_DEFAULTS.call_arguments()
        videos.append(
            pipeline(prompt, generator=torch.Generator().manual_seed(seed), output_type="pt", **call).frames
        )
        seconds.append(round(time.perf_counter() - start, 2))
    return {
        "prompt": prompt,
        "seconds_per_video": seconds,
        "same_seed_identical": torch.equal(videos[0], videos[1]),
        "other_seed_differs": not torch.equal(videos[0], videos[2]),
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `arguments` replaces `sys.argv` in tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--output", type=Path, default=REPORT_DIR)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--steps", nargs="+", type=int, default=[DEMO_DEFAULTS.num_inference_steps, 12, 20])
    parser.add_argument("--limit", type=int, help="clips per measurement at most; for a quick look")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the chosen sections and merges them into the report."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    pipeline = load_pipeline(options.weights, device, getattr(torch, options.dtype))
    options.output.mkdir(parents=True, exist_ok=True)
    report_file = options.output / "evaluation.json"
    report = json.loads(report_file.read_text()) if report_file.exists() else {}
    size = folder_bytes(options.weights)
    report["weights"] = {
        "bytes": size,
        "limit_bytes": SIZE_LIMIT_BYTES,
        "defaults": dict(DEMO_DEFAULTS.__dict__),
    }
    measure = {"quality": evaluate_quality, "attention": evaluate_attention, "speed": evaluate_speed}
    for section in options.sections:
        start = time.perf_counter()
        figures = measure[section](pipeline, options, device)
        report[section] = {
            "environment": environment(device, options.dtype),
            "seconds": round(time.perf_counter() - start, 1),
            **figures,
        }
        report_file.write_text(json.dumps(report, indent=2) + "\n")
    write_markdown(report, options.output / "evaluation.md")
    print((options.output / "evaluation.md").read_text())


if __name__ == "__main__":
    main()
