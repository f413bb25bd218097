"""Time and memory of one generation."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

StepCallback = Callable[[int], None]


def synchronise(device: torch.device) -> None:
    """Wait until all work queued on a GPU is done; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DenoiseClock:
    """Time from the denoiser's first call to the end of the last step.

    Text encoding before and decoding after are not in it. The device is synchronised at both ends.
    Use it as a context manager around the pipeline call and pass `on_step_end` as the pipeline's
    ``callback_on_step_end``.

    Args:
        denoiser (Module): the pipeline's transformer.
        device (torch.device): where it runs.
        num_steps (int): steps of the schedule.
        others (Sequence[Module]): further denoisers of the pipeline, for other steps. Default: none
        on_step (StepCallback, Optional): told the number of finished steps after each one.
        on_first_call (Callable, Optional): given the denoiser and (args, kwargs) of the first call, before
            the clock starts.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        device: torch.device,
        num_steps: int,
        *,
        others: Sequence[nn.Module] = (),
        on_step: StepCallback | None = None,
        on_first_call: Callable[[nn.Module, tuple, dict[str, Any]], None] | None = None,
    ) -> None:
        self.elapsed_s: float | None = None
        self._denoisers = (denoiser, *others)
        self._device = device
        self._num_steps = num_steps
        self._on_step = on_step
        self._on_first_call = on_first_call
        self._started: float | None = None

    def __enter__(self) -> "DenoiseClock":
        self._hooks = [
            denoiser.register_forward_pre_hook(self._start, prepend=True, with_kwargs=True)
            for denoiser in self._denoisers
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def on_step_end(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's callback; returns the tensors unchanged."""
        if step + 1 == self._num_steps and self._started is not None:
            synchronise(self._device)
            self.elapsed_s = time.perf_counter() - self._started
        if self._on_step:
            self._on_step(step + 1)
        return tensors

    def _start(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._started is not None:
            return
        if self._on_first_call:
            self._on_first_call(denoiser, args, kwargs)
        synchronise(self._device)
        self._started = time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: reset VmHWM
    except OSError:
        return  # the peak since the process began is reported then


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak since the last reset.

    Returns:
        int | None: on CUDA the allocator's peak on that GPU; on a CPU the peak resident memory of the
        whole process (model weights and libraries included), which only Linux can reset. None where
        the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _peak_since_start()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _peak_since_start() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def ratio(dense_s: float | None, other_s: float | None) -> float | None:
    """How many times faster than dense; None if either time is missing or zero."""
    return dense_s / other_s if dense_s and other_s else None
