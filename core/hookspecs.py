"""Every hook of the plugin system (pluggy project ``sparse_attn``)."""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from core.adapter import ModelAdapter
    from core.extensions import Metric, Preset
    from core.layout import TokenLayout
    from core.record import ExecutionReport
    from core.strategy import AttentionStrategy

PROJECT = "sparse_attn"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_strategies() -> "list[type[AttentionStrategy]]":
    """Return the strategy classes of this plugin."""
    raise NotImplementedError


@hookspec
def register_presets() -> "list[Preset]":
    """Return named parameter sets for registered strategies."""
    raise NotImplementedError


@hookspec
def register_metrics() -> "list[Metric]":
    """Return video metrics that the benchmark adds to its rows."""
    raise NotImplementedError


@hookspec
def register_model_adapters() -> "list[ModelAdapter]":
    """Return adapters that put strategies into further model families."""
    raise NotImplementedError


@hookspec
def generation_started(strategy: "AttentionStrategy", layout: "TokenLayout", num_steps: int | None) -> None:
    """Called at the first denoiser call of a video, before any attention runs."""


@hookspec
def generation_finished(strategy: "AttentionStrategy", report: "ExecutionReport") -> None:
    """Called when a video is over: the next one starts or the strategy is removed."""
