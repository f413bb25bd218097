"""The contract between strategies, models and the benchmark."""

from core.adapter import AttendFunction, DenoiserCall, ModelAdapter
from core.apply import AppliedStrategy, apply_strategy
from core.block_mask import BlockSparseMask
from core.context import AttentionContext
from core.denoiser_record import DenoiserRecord, InstalledDenoiser
from core.dense import attention
from core.errors import (
    InstallError,
    LayoutError,
    NonFiniteOutputError,
    ParameterError,
    PluginConflictError,
    SparseAttnError,
    StrategyNotFoundError,
    UnsupportedCallError,
)
from core.extensions import Metric, Preset
from core.hookspecs import hookimpl
from core.layout import TokenLayout
from core.level_mask import LevelMask
from core.parameters import StrategyParameters
from core.random import call_generator
from core.record import ExecutionReport
from core.registry import Registry, StrategyEntry, available_strategies, create_strategy
from core.strategy import AttentionResult, AttentionStrategy, Capabilities

__all__ = [
    "AppliedStrategy",
    "AttendFunction",
    "AttentionContext",
    "AttentionResult",
    "AttentionStrategy",
    "BlockSparseMask",
    "Capabilities",
    "DenoiserCall",
    "DenoiserRecord",
    "ExecutionReport",
    "InstallError",
    "InstalledDenoiser",
    "LayoutError",
    "LevelMask",
    "Metric",
    "ModelAdapter",
    "NonFiniteOutputError",
    "ParameterError",
    "PluginConflictError",
    "Preset",
    "Registry",
    "SparseAttnError",
    "StrategyEntry",
    "StrategyNotFoundError",
    "StrategyParameters",
    "TokenLayout",
    "UnsupportedCallError",
    "apply_strategy",
    "attention",
    "available_strategies",
    "call_generator",
    "create_strategy",
    "hookimpl",
]
