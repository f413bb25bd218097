"""Built-in model adapters; a plugin like any other."""

from core.adapter import ModelAdapter
from core.hookspecs import hookimpl


@hookimpl
def register_model_adapters() -> list[ModelAdapter]:
    from core.processors.cogvideox import CogVideoXAdapter
    from core.processors.flux import FluxAdapter
    from core.processors.hunyuan_video import HunyuanVideoAdapter
    from core.processors.ltx_video import LTXVideoAdapter
    from core.processors.wan import WanAdapter

    return [CogVideoXAdapter(), FluxAdapter(), HunyuanVideoAdapter(), LTXVideoAdapter(), WanAdapter()]
