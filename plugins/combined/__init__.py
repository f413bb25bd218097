"""combined: frame patterns for some heads, another strategy for the rest (the project's own method)."""

from core.extensions import Preset
from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    """`CombinedStrategy`."""
    from plugins.combined.strategy import CombinedStrategy

    return [CombinedStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    """The sets of `presets`."""
    from plugins.combined.presets import PRESETS

    return list(PRESETS)
