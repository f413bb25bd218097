"""sliding-tile: a 3-D window of whole tiles around every tile of tokens (arXiv 2502.04507)."""

from core.extensions import Preset
from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    """`SlidingTileStrategy`."""
    from plugins.sliding_tile.strategy import SlidingTileStrategy

    return [SlidingTileStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    """The sets of `presets`."""
    from plugins.sliding_tile.presets import PRESETS

    return list(PRESETS)
