"""Named parameter sets of radial."""

from core.extensions import Preset

PRESETS = (
    Preset(
        "radial",
        "cogvideox",
        {"rule": "cogvideox", "decay_factor": 1.0, "dense_layers": 2, "dense_timesteps": 5},
        "CogVideoX-2b and 5b, 49 frames, 50 steps: the CogVideoX widths, 2 dense layers, 5 dense steps.",
    ),
    Preset(
        "radial",
        "short",
        {"rule": "cogvideox", "decay_factor": 1.0, "dense_layers": 1, "dense_timesteps": 3},
        "CogVideoX clips of fewer than 30 pixel frames: shorter dense warm-up.",
    ),
    Preset(
        "radial",
        "long",
        {"rule": "cogvideox", "decay_factor": 1.0, "dense_layers": 3, "dense_timesteps": 8},
        "CogVideoX clips of more than 50 pixel frames: longer dense warm-up.",
    ),
    Preset(
        "radial",
        "wan",
        {"rule": "official", "decay_factor": 0.2, "dense_layers": 1, "dense_timesteps": 12},
        "Wan2.1-14B, 50 steps: the official code's widths, decay 0.2 and sink.",
    ),
    Preset(
        "radial",
        "wan2.2-a14b",
        {"rule": "official", "decay_factor": 0.8, "dense_layers": 1, "dense_timesteps": 11},
        "Wan2.2 A14B, 40 steps: the official code's widths, decay 0.8 and sink.",
    ),
    Preset(
        "radial",
        "hunyuan",
        {"rule": "official", "decay_factor": 0.95, "sink": False, "dense_timesteps": 12},
        "HunyuanVideo, 50 steps: the official code's widths and decay 0.95, without the sink.",
    ),
    Preset(
        "radial",
        "paper",
        {"rule": "paper", "sink": True, "dense_layers": 1, "dense_timesteps": 12},
        "The paper's formula (arXiv 2506.19852) with its warm-up: the first layer, 12 of 50 steps.",
    ),
    Preset(
        "radial",
        "demo",
        {"rule": "cogvideox", "block_size": 64, "dense_layers": 1, "dense_timesteps": 2},
        "The demo model (17 frames of 240 tokens, 8 layers, 8 steps): blocks of 64 for its small frames.",
    ),
)
