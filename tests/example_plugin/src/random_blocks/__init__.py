"""random-blocks: keeps a random share of the key blocks. The example of docs/writing_a_plugin.md."""

import logging

from core import AttentionStrategy, ExecutionReport, Preset, hookimpl

logger = logging.getLogger(__name__)


@hookimpl
def register_strategies() -> list[type[AttentionStrategy]]:
    from random_blocks.strategy import RandomBlocksStrategy

    return [RandomBlocksStrategy]


@hookimpl
def register_presets() -> list[Preset]:
    return [Preset("random-blocks", "sparse", {"keep_ratio": 0.2}, "a fifth of the blocks")]


@hookimpl
def generation_started(strategy: AttentionStrategy, num_steps: int | None) -> None:
    logger.info("%s: a video of %s steps begins", strategy.name, num_steps)


@hookimpl
def generation_finished(strategy: AttentionStrategy, report: ExecutionReport) -> None:
    logger.info("%s: executed density %.3f", strategy.name, report.density)
