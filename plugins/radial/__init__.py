"""radial: a fixed block mask that narrows with the distance between frames (arXiv 2506.19852)."""

from core.extensions import Preset
from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    """`RadialStrategy`."""
    from plugins.radial.strategy import RadialStrategy

    return [RadialStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    """The sets of `presets`."""
    from plugins.radial.presets import PRESETS

    return list(PRESETS)
