"""What was executed: one record per attention call, and the report over one video."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from core.context import AttentionContext

if TYPE_CHECKING:
    from core.strategy import AttentionResult

WARM_UP = "dense warm-up"


@dataclass(frozen=True)
class CallRecord:
    """One attention call: where it stood, what ran and why it was dense if it was meant sparse."""

    layer: int
    step: int
    density: float | torch.Tensor
    backend: str
    shares: Mapping[str, float | torch.Tensor]
    dense_reason: str | None
    time_s: "float | CudaSpan | None"


@dataclass(frozen=True)
class CudaSpan:
    """Two recorded CUDA events."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    def seconds(self) -> float:
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


class Stopwatch:
    """Time of one call on one device: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._start: torch.cuda.Event | float
        if device.type == "cuda":
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> float | CudaSpan:
        if isinstance(self._start, float):
            return time.perf_counter() - self._start
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        return CudaSpan(self._start, end)


@dataclass(frozen=True)
class ExecutionReport:
    """What one strategy executed during one video.

    Args:
        strategy (str): registered name.
        parameters (dict): the strategy's parameters.
        calls (int): attention calls.
        density (float): executed share of all (query, key) pairs, mean over calls, 0 to 1; dense
            warm-up and fallbacks count as 1. NaN when nothing was called.
        density_by_layer (list[list[float]]): rows are layers, columns are denoising steps; NaN
            where the model did not call that layer (a step cache, for example).
        backends (dict[str, int]): calls per backend.
        dense_calls (dict[str, int]): calls that ran dense, per reason.
        attention_time_s (float, Optional): time inside the strategy, prediction and reordering
            included; None unless timing was asked for.
        shares_by_layer (dict[str, list[list[float]]]): further figures of the method, 0 to 1, each laid out
            as ``density_by_layer``; NaN where a call did not give it.
    """

    strategy: str
    parameters: dict[str, Any]
    calls: int
    density: float
    density_by_layer: list[list[float]]
    backends: dict[str, int]
    dense_calls: dict[str, int]
    attention_time_s: float | None
    shares_by_layer: dict[str, list[list[float]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        backends = ", ".join(f"{name} x{count}" for name, count in self.backends.items())
        if not self.calls:
            return f"{self.strategy}: no attention calls yet"
        lines = [f"{self.strategy}: {self.calls} attention calls, executed density {self.density:.3f}"]
        lines.append(f"  backends: {backends or 'none'}")
        lines.extend(f"  dense: {count} calls, {reason}" for reason, count in self.dense_calls.items())
        if self.attention_time_s is not None:
            lines.append(f"  attention time: {self.attention_time_s:.3f} s")
        for layer, densities in enumerate(self.density_by_layer):
            lines.append(f"  layer {layer:2d}: " + " ".join(f"{value:.2f}" for value in densities))
        for name, table in self.shares_by_layer.items():
            given = [value for row in table for value in row if not math.isnan(value)]
            lines.append(f"  {name}: {sum(given) / len(given):.3f}, mean over {len(given)} layers and steps")
        return "\n".join(lines)


class ExecutionRecord:
    """Collects the calls of one video.

    Args:
        timed (bool): measure the time of every call. Default: False
    """

    def __init__(self, timed: bool = False) -> None:
        self.timed = timed
        self._calls: list[CallRecord] = []
        self._paused = False

    def clear(self) -> None:
        self._calls.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing: what runs was counted before."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def start(self, device: torch.device) -> Stopwatch | None:
        return Stopwatch(device) if self.timed else None

    def add(
        self,
        context: AttentionContext,
        result: "AttentionResult",
        dense_reason: str | None,
        stopwatch: Stopwatch | None,
    ) -> None:
        """Append one call. Figures that are tensors are read by `report` only: nothing synchronises here."""
        if self._paused:
            return
        time_s = stopwatch.stop() if stopwatch else None
        place = (context.layer_index, context.step_index)
        self._calls.append(
            CallRecord(*place, result.density, result.backend, result.shares, dense_reason, time_s)
        )

    def report(self, strategy: str, parameters: dict[str, Any]) -> ExecutionReport:
        """Sum up all calls since `clear`; synchronises with the device."""
        densities = [float(call.density) for call in self._calls]
        return ExecutionReport(
            strategy=strategy,
            parameters=parameters,
            calls=len(self._calls),
            density=sum(densities) / len(densities) if densities else float("nan"),
            density_by_layer=self._table(zip(self._calls, densities, strict=True)),
            backends=dict(Counter(call.backend for call in self._calls)),
            dense_calls=dict(Counter(call.dense_reason for call in self._calls if call.dense_reason)),
            attention_time_s=self._total_time() if self.timed else None,
            shares_by_layer={name: self._share_table(name) for name in self._share_names()},
        )

    def _share_names(self) -> list[str]:
        return list(dict.fromkeys(name for call in self._calls for name in call.shares))

    def _share_table(self, name: str) -> list[list[float]]:
        return self._table((call, float(call.shares[name])) for call in self._calls if name in call.shares)

    def _table(self, figures: Iterable[tuple[CallRecord, float]]) -> list[list[float]]:
        """Mean figure of every layer (row) and step (column) that was called."""
        cells: dict[tuple[int, int], list[float]] = {}
        for call, figure in figures:
            cells.setdefault((call.layer, call.step), []).append(figure)
        layers = 1 + max((call.layer for call in self._calls), default=-1)
        steps = 1 + max((call.step for call in self._calls), default=-1)
        means = {place: sum(values) / len(values) for place, values in cells.items()}
        return [[means.get((layer, step), float("nan")) for step in range(steps)] for layer in range(layers)]

    def _total_time(self) -> float:
        spans = (call.time_s for call in self._calls)
        return sum(span.seconds() if isinstance(span, CudaSpan) else span or 0.0 for span in spans)
