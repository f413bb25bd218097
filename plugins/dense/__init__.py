"""dense: the baseline every other strategy is compared with."""

from core.hookspecs import hookimpl
from core.strategy import AttentionStrategy


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    from plugins.dense.strategy import DenseStrategy

    return [DenseStrategy]
