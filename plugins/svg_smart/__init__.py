"""svg-smart: a spatial or a temporal pattern for each head, chosen online (arXiv 2502.01776, 2505.18875)."""

from core.extensions import Preset
from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    """`SvgSmartStrategy`."""
    from plugins.svg_smart.strategy import SvgSmartStrategy

    return [SvgSmartStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    """The sets of `presets`."""
    from plugins.svg_smart.presets import PRESETS

    return list(PRESETS)
