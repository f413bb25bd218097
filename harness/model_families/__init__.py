"""Model families. A new one is one class in a file of its own, and its place in `FAMILIES`."""

from harness.model_families.base import CallSettings, ModelFamily
from harness.model_families.cogvideox import CogVideoXFamily
from harness.model_families.hunyuan_video import HunyuanVideoFamily
from harness.model_families.ltx_video import LTXVideoFamily
from harness.model_families.wan import WanFamily

__all__ = [
    "COGVIDEOX",
    "FAMILIES",
    "HUNYUAN_VIDEO",
    "LTX_VIDEO",
    "WAN",
    "CallSettings",
    "ModelFamily",
    "family_of_class",
    "family_of_name",
]

COGVIDEOX, HUNYUAN_VIDEO = CogVideoXFamily(), HunyuanVideoFamily()
LTX_VIDEO, WAN = LTXVideoFamily(), WanFamily()
FAMILIES: tuple[ModelFamily, ...] = (COGVIDEOX, HUNYUAN_VIDEO, LTX_VIDEO, WAN)


def family_of_class(pipeline_class: str) -> ModelFamily | None:
    """The family whose pipelines have that class, if one is known."""
    return next((family for family in FAMILIES if family.pipeline_class == pipeline_class), None)


def family_of_name(own: str) -> ModelFamily | None:
    """The family whose name the model's name begins with, if there is one."""
    return next((family for family in FAMILIES if own.startswith(family.name)), None)
