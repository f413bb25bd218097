"""Writes the model card; every figure in it is read from the report or from the training record."""

import json
from pathlib import Path

from harness.demo_model.defaults import DEMO_DEFAULTS, WEIGHTS_DIR
from harness.demo_model.evaluation_report import percent

_HEADER = """\
---
license: apache-2.0
pipeline_tag: text-to-video
library_name: diffusers
---

# Demo text-to-video model

A small CogVideoX model (T5 encoder, `AutoencoderKLCogVideoX`, `CogVideoXTransformer3DModel`, DDIM,
v-prediction) that makes {num_frames} frames of {width} x {height} pixels: shaded solids that move over
painted grounds. It exists so that sparse attention can be tried on real videos without a download: 4,080
video tokens and 16 text tokens, 8 layers of 4 heads of 64.

```python
import torch
from diffusers import CogVideoXPipeline
from harness.demo_model import DEMO_DEFAULTS, WEIGHTS_DIR

pipe = CogVideoXPipeline.from_pretrained(WEIGHTS_DIR)
video = pipe(
    "{example}",
    generator=torch.Generator().manual_seed(0),
    **DEMO_DEFAULTS.call_arguments(),
).frames[0]
```

## Captions

    a [small|large] COLOUR SHAPE MOTION PLACE [while the camera pans left|right]
    a [small|large] COLOUR SHAPE MOTION and a [small|large] COLOUR SHAPE MOTION PLACE

Colours: red, yellow, green, cyan, blue, purple. Shapes: ball, cube, cone, ring. Motions: moves right, moves
left, rises, falls, bounces, circles, grows, shrinks. Places: in the desert, in the meadow, at night, in the
snow, in the studio, by the sea. Two objects are named from left to right and differ in colour; the camera
pans with one object only. Other words are unknown to the model: `harness.demo_model.unknown_words(prompt)`
lists them.

## Use

The weights are float16 and compute in float32 by default. Settings:
{settings}.
No unconditional branch was trained, so keep `guidance_scale` at 1. The learned positions fix size and
number of frames: other sizes are an error, and other numbers of frames were not trained. Frames are meant
for {fps} frames per second.

## Data and training

Every clip is rendered by `harness/demo_model/clips.py` from a scene and a seed; no outside data, no outside
weights. 96 of the 1,152 combinations of colour, shape, motion and place are held out of training altogether
and used for evaluation.

    {command}
"""

EXAMPLE_PROMPT = "a large red ball bounces by the sea"


def write_model_card(folder: Path) -> None:
    """Writes `README.md` into a weights folder.

    Args:
        folder: the exported pipeline. Figures come from `report/evaluation.json` and `report/training.json`
            beside the
            shipped weights; what is not there is left out.
    """
    defaults = dict(DEMO_DEFAULTS.__dict__)
    settings = ", ".join(f"`{name}` {value}" for name, value in DEMO_DEFAULTS.call_arguments().items())
    report, training = _read("evaluation.json"), _read("training.json")
    text = _HEADER.format(
        settings=settings,
        example=EXAMPLE_PROMPT,
        command=training.get("command", "python -m harness.demo_model.train --output DIR"),
        **defaults,
    )
    text += _training(training) + _figures(report)
    (folder / "README.md").write_text(text + "\n## Licence\n\nApache-2.0, weights and code alike.\n")


def _read(name: str) -> dict:
    file = WEIGHTS_DIR.parent / "report" / name
    return json.loads(file.read_text()) if file.exists() else {}


def _training(record: dict) -> str:
    if not record:
        return ""
    stages = ", ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in record["stages"].items())
    return f"\nStages on {record['device']}: {stages}.\n"


def _figures(report: dict) -> str:
    if "quality" not in report:
        return ""
    quality, defaults = report["quality"], str(DEMO_DEFAULTS.num_inference_steps)
    vae, sets = quality["autoencoder"], quality["captions"].get(defaults, {})
    lines = [
        "\n## Figures\n",
        "From `python -m harness.demo_model.evaluate`; more in `harness/demo_model/report/evaluation.md`.\n",
        f"- autoencoder on held-out clips: {vae['psnr_db']:.1f} dB, on object pixels "
        f"{vae['psnr_object_db']:.1f} dB",
    ]
    for name, figures in sets.items():
        label = f"{figures['clips']} held-out captions, {name.replace('_', ' ')}, {defaults} steps"
        lines.append(
            f"- {label}: {percent(figures['all'])} right in colour, shape, motion and ground together"
        )
        if name == "camera_pan":
            lines[-1] += f"; the pan itself is seen in {percent(figures['camera'])}"
    if "attention" in report:
        mean = ", ".join(f"{value:.2f}" for value in report["attention"]["mean"])
        lines.append(f"- attention mass in the best 10, 25 and 50 % of the blocks of 64 tokens, mean: {mean}")
    if "speed" in report:
        speed = report["speed"]
        seconds = max(speed["seconds_per_video"])
        machine = f"{speed['environment']['device']} with {speed['environment']['threads']} threads"
        lines.append(
            f"- slowest of three videos on {machine}, {speed['environment']['dtype']}: {seconds:.0f} s"
        )
    return "\n".join(lines) + "\n"
