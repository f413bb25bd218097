"""Named parameter sets of sparge."""

from core.extensions import Preset

PRESETS = (
    Preset("sparge", "topk", {"topk": 0.5}, "Upstream's recommended default: half of the key blocks."),
    Preset(
        "sparge",
        "cdf",
        {"cdf": 0.98, "similarity_threshold": 0.6},
        "Upstream's thresholds without calibration: 98 % of the estimated attention, gate at 0.6.",
    ),
    Preset(
        "sparge",
        "wan2.2-a14b",
        {"topk": 0.4},
        "Wan2.2 A14B: the value of upstream's example.",
    ),
    Preset(
        "sparge",
        "demo",
        {"density": 0.45, "block_size": 64, "dense_layers": 1, "dense_timesteps": 2},
        "The demo model (17 frames of 240 tokens, 8 layers, 8 steps): blocks of 64 for its small frames.",
    ),
    Preset(
        "sparge",
        "calibrated",
        {"calibration": "demo", "block_size": 64, "order": "gilbert"},
        "The demo model, with a threshold for every layer and head: at most 6 % error where it was measured.",
    ),
)
