"""Named parameter sets of svg-smart."""

from core.extensions import Preset

PRESETS = (
    Preset(
        "svg-smart",
        "cogvideox",
        {"variant": "band", "density": 0.25, "dense_layers": 2, "dense_timesteps": 10},
        "CogVideoX, 50 steps: Sparse VideoGen's published density, its first layers and first fifth dense.",
    ),
    Preset(
        "svg-smart",
        "hunyuan",
        {"variant": "band", "density": 0.25, "sampled_rows": 64, "dense_layers": 2, "dense_timesteps": 5},
        "HunyuanVideo, 50 steps: 64 sampled rows, the first tenth of the steps dense.",
    ),
    Preset(
        "svg-smart",
        "wan",
        {
            "variant": "band",
            "density": 0.3,
            "sink": True,
            "sampled_rows": 64,
            "dense_layers": 2,
            "dense_timesteps": 10,
        },
        "Wan2.1-14B, 50 steps: density 0.3 with frame 0 for all, 0.03 of the 40 layers (rounded up) and the "
        "first fifth of the steps dense.",
    ),
    Preset(
        "svg-smart",
        "smart",
        {"variant": "frames", "diagonal": 1, "sampled_rows": 64},
        "Smart attention: neighbouring frames and frame 0, no warm-up, 64 to 70 % fewer pairs.",
    ),
    Preset(
        "svg-smart",
        "semantic",
        {"variant": "semantic", "mass": 0.8, "dense_timesteps": 15},
        "SVG2 with the paper's 100 and 500 clusters; the first 30 % of 50 steps dense. Blocks hold 0.8 of "
        "the predicted attention, not 0.9: whole blocks cost more than clusters of any size.",
    ),
    Preset(
        "svg-smart",
        "demo",
        {"variant": "band", "density": 0.4, "block_size": 64, "dense_layers": 1, "dense_timesteps": 2},
        "The demo model (17 frames of 240 tokens, 8 layers, 8 steps): blocks of 64 for its small frames.",
    ),
)
