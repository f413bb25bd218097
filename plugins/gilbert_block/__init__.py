"""gilbert-block: adaptive blocks along a space-filling curve (arXiv 2508.10774, 2512.04025)."""

from core.extensions import Preset
from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    """`GilbertBlockStrategy`."""
    from plugins.gilbert_block.strategy import GilbertBlockStrategy

    return [GilbertBlockStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    """The sets of `presets`."""
    from plugins.gilbert_block.presets import PRESETS

    return list(PRESETS)
