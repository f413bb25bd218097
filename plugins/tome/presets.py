"""Named parameter sets of tome."""

from core.extensions import Preset

COGVIDEOX_VIDEO_TOKENS = 13 * 30 * 45  # of CogVideoX-2b and 5b at 49 frames; with 226 of text 17,776
SWEEP = range(1000, 9000, 1000)

PRESETS = (
    Preset(
        "tome",
        "cogvideox",
        {"ratio": 8000 / COGVIDEOX_VIDEO_TOKENS, "gap": 5, "dense_layers": 2, "dense_timesteps": 5},
        "CogVideoX-2b and 5b, 49 frames, 50 steps: 8,000 of 17,776 tokens merged, matching every 5 steps.",
    ),
    Preset(
        "tome",
        "demo",
        {"ratio": 0.3, "gap": 2, "dense_layers": 1, "dense_timesteps": 2},
        "The demo model (17 frames of 240 tokens, 8 layers, 8 steps): matching every second step.",
    ),
    *(
        Preset(
            "tome",
            f"r{r}",
            {"ratio": r / COGVIDEOX_VIDEO_TOKENS},
            f"Merge sweep: {r:,} of CogVideoX's 17,776 tokens, as many in proportion elsewhere.",
        )
        for r in SWEEP
    ),
)
