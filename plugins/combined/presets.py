"""Named parameter sets of combined."""

from core.extensions import Preset

PRESETS: tuple[Preset, ...] = (
    Preset(
        "combined",
        "cogvideox1.5-5b",
        {"form": "columns", "places": 128, "dense_timesteps": 5},
        "CogVideoX1.5-5B, 50 steps: the first project's numbers; heads tested every 10 steps, by 128 places.",
    ),
    Preset(
        "combined",
        "cogvideox-2b",
        {"places": 64, "dense_timesteps": 5},
        "CogVideoX-2b, 50 steps: two of 13 frames attend exactly in heads that look alike from every frame.",
    ),
    *(
        Preset(
            "combined",
            name,
            {"assignment": name},
            f"The demo model: a strategy for every head and step, {aim}.",
        )
        for name, aim in (
            ("demo-fastest", "a fifth of the pairs"),
            ("demo-fast", "few pairs"),
            ("demo", "balanced"),
            ("demo-fine", "close to dense"),
            ("demo-quick", "chosen by time on a CPU"),
        )
    ),
)
