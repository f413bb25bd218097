"""tome: similar tokens are averaged, so that attention has fewer keys (arXiv 2210.09461, 2303.17604)."""

from core.extensions import Preset
from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    """`TomeStrategy`."""
    from plugins.tome.strategy import TomeStrategy

    return [TomeStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    """The sets of `presets`."""
    from plugins.tome.presets import PRESETS

    return list(PRESETS)
