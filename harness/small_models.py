"""Models with random weights for trying things out: ``tiny-random`` and its like of other families."""

from collections.abc import Callable
from typing import Any, NamedTuple

from harness.model_families import COGVIDEOX, HUNYUAN_VIDEO, LTX_VIDEO, WAN, CallSettings, ModelFamily
from harness.tiny_hunyuan_video import build_tiny_hunyuan_video_pipeline
from harness.tiny_ltx_video import build_tiny_ltx_video_pipeline
from harness.tiny_model import build_tiny_pipeline, build_tiny_wan_pipeline

SETTINGS = CallSettings(height=128, width=128, num_frames=9, steps=4, guidance_scale=6.0, fps=8)


class TinyModel(NamedTuple):
    """A model that is made and not loaded: its family, what makes its pipeline, its settings."""

    family: ModelFamily
    build: Callable[[], Any]
    settings: CallSettings = SETTINGS


TINY = {
    "tiny-random": TinyModel(COGVIDEOX, build_tiny_pipeline),
    "tiny-random-hunyuan-video": TinyModel(HUNYUAN_VIDEO, build_tiny_hunyuan_video_pipeline),
    "tiny-random-ltx-video": TinyModel(
        LTX_VIDEO,
        build_tiny_ltx_video_pipeline,
        SETTINGS.changed({"height": 256, "width": 256, "num_frames": 17}),  # 192 tokens, as the others
    ),
    "tiny-random-wan": TinyModel(WAN, build_tiny_wan_pipeline),
}
