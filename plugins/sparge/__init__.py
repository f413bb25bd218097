"""sparge: block sparsity predicted from mean tokens (arXiv 2502.18137)."""

from core.extensions import Preset
from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    """`SpargeStrategy`."""
    from plugins.sparge.strategy import SpargeStrategy

    return [SpargeStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    """The sets of `presets`."""
    from plugins.sparge.presets import PRESETS

    return list(PRESETS)
