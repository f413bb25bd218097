"""Named parameter sets of gilbert-block."""

from core.extensions import Preset

PRESETS = (
    Preset(
        "gilbert-block",
        "cogvideox-2b",
        {
            "tau": (0.98, 0.9),
            "min_ratio": (0.12, 0.1),
            "max_ratio": (1.0, 0.8),
            "samples": 8,
            "block_size": 64,
            "dense_timesteps": 5,
        },
        "CogVideoX-2b, 50 steps: 90 to 98 % of the importance, fewer blocks towards the end.",
    ),
    Preset(
        "gilbert-block",
        "cogvideox-5b",
        {
            "selection": "rank",
            "bounds": (0.1, 0.15, 0.15, 0.35),
            "key_block_size": 128,
            "dense_timesteps": 15,
        },
        "CogVideoX-5b, 50 steps: PSA's levels by rank, the first 30 % of the steps dense.",
    ),
    Preset(
        "gilbert-block",
        "cogvideox1.5-5b",
        {"selection": "rank", "bounds": (0.1, 0.15, 0.15, 0.35), "dense_timesteps": 15},
        "CogVideoX1.5: as for 5b, with smaller key blocks (64; published are 32).",
    ),
    Preset(
        "gilbert-block",
        "wan2.1-1.3b",
        {
            "selection": "mass",
            "bounds": (0.5, 0.6, 0.7, 0.8),
            "min_ratio": 0.06,
            "key_block_size": 128,
            "dense_timesteps": 15,
        },
        "Wan2.1 1.3B, 50 steps: PSA's levels by mass.",
    ),
    Preset(
        "gilbert-block",
        "wan2.1-14b",
        {
            "selection": "mass",
            "bounds": (0.4, 0.5, 0.6, 0.8),
            "min_ratio": 0.06,
            "key_block_size": 128,
            "dense_timesteps": 15,
        },
        "Wan2.1 14B, 50 steps: PSA's levels by mass.",
    ),
    Preset(
        "gilbert-block",
        "wan2.2-5b",
        {
            "selection": "mass",
            "bounds": (0.6, 0.7, 0.7, 0.8),
            "min_ratio": 0.06,
            "key_block_size": 128,
            "dense_timesteps": 15,
        },
        "Wan2.2 5B, 50 steps: PSA's levels by mass.",
    ),
    Preset(
        "gilbert-block",
        "wan2.2-a14b",
        {
            "selection": "mass",
            "bounds": (0.5, 0.6, 0.6, 0.8),
            "min_ratio": 0.06,
            "key_block_size": 128,
            "dense_timesteps": 12,
        },
        "Wan2.2 A14B, 40 steps: PSA's levels by mass.",
    ),
    Preset(
        "gilbert-block",
        "levels",
        {"selection": "rank", "remainder": True, "key_block_size": 128},
        "Levels by rank with every other block at level 8: nothing is left out.",
    ),
    Preset(
        "gilbert-block",
        "distilled",
        {"tau": 0.95, "min_ratio": 0.05, "max_ratio": 0.1, "key_block_size": 128},
        "Models fine-tuned under this very sparsity (BLADE): a tenth of the blocks, no dense steps.",
    ),
    Preset(
        "gilbert-block",
        "demo",
        {
            "selection": "rank",
            "bounds": (0.05, 0.1, 0.15, 0.25),
            "block_size": 64,
            "dense_layers": 1,
            "dense_timesteps": 2,
        },
        "The demo model (17 frames of 240 tokens, 8 layers, 8 steps): blocks of 64 for its small frames.",
    ),
)
