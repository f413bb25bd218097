"""Named parameter sets of sliding-tile."""

from typing import Any

from core.extensions import Preset

FULL = 999  # more tiles than an axis has: all of them


def slabs(frames: int, rows: int, columns: int) -> dict[str, Any]:
    """Three windows for the heads in turn, each that thick along one axis and whole along the others."""
    return {"heads": ((frames, FULL, FULL), (FULL, rows, FULL), (FULL, FULL, columns))}


PRESETS = (
    Preset(
        "sliding-tile",
        "cogvideox",
        slabs(1, 3, 3) | {"dense_layers": 2, "dense_timesteps": 5},
        "CogVideoX-2b and 5b, 49 frames, 50 steps: slabs of 1, 3 and 3 tiles.",
    ),
    Preset(
        "sliding-tile",
        "cogvideox1.5-5b",
        slabs(1, 3, 3) | {"dense_layers": 2, "dense_timesteps": 5},
        "CogVideoX1.5, 81 frames, 50 steps: slabs of 1, 3 and 3 tiles.",
    ),
    Preset(
        "sliding-tile",
        "hunyuan",
        {"tile": (6, 8, 8), "window": (5, 5, 5), "dense_timesteps": 12},
        "HunyuanVideo, 117 frames of 768x1280, 50 steps: the paper's tile and its 58 % sparse window.",
    ),
    Preset(
        "sliding-tile",
        "wan",
        slabs(3, 3, 3) | {"dense_timesteps": 12},
        "Wan2.1, 81 frames of 720x1280, 50 steps: slabs of 3 tiles; the dense steps of the authors' script.",
    ),
    Preset(
        "sliding-tile",
        "demo",
        slabs(1, 1, 1) | {"block_size": 64, "dense_layers": 1, "dense_timesteps": 2},
        "The demo model (17 frames of 240 tokens, 8 layers, 8 steps): slabs of 1 tile, blocks of 64.",
    ),
)
