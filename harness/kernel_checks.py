"""Whether an operator is right on a case, and how long it takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from core import UnsupportedCallError
from harness.kernel_cases import Case
from harness.kernel_operators import Operator, Outputs

RIGHT, WRONG, UNAVAILABLE = "right", "wrong", "unavailable"


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Args:
        status (str): ``"right"``, ``"wrong"`` or ``"unavailable"``.
        error (float, Optional): largest relative error among the results; None if there are none.
        reason (str): why it is not right. Default: none
    """

    status: str
    error: float | None = None
    reason: str = ""


def judge(operator: Operator, case: Case, heads: Sequence[tuple[int, int]]) -> Verdict:
    """Run an operator once and compare it with its definition.

    Free memory is filled with NaN before, so that results that were never written show; tensors of the case
    must be as they were afterwards.

    Args:
        operator (Operator): what to check.
        case (Case): on what.
        heads (Sequence[tuple[int, int]]): (batch entry, head) pairs to compare.
    """
    tolerance = operator.tolerance[case.query.dtype]
    before = [part.clone() for part in (case.query, case.key, case.value)]
    try:
        run = operator.prepare(case)
        _poison_free_memory(case)
        error = operator.error(case, run(), heads)
    except (UnsupportedCallError, ImportError) as reason:
        return Verdict(UNAVAILABLE, reason=_first_line(reason))
    except torch.OutOfMemoryError:
        return Verdict(UNAVAILABLE, reason="out of memory")
    except Exception as failure:  # whatever a kernel does, the other checks go on
        return Verdict(WRONG, reason=f"{type(failure).__name__}: {_first_line(failure)}")
    after = (case.query, case.key, case.value)
    if not all(torch.equal(part, copy) for part, copy in zip(after, before, strict=True)):
        return Verdict(WRONG, error, "changed its inputs")
    if not error <= tolerance:  # NaN too
        return Verdict(WRONG, error, f"relative error {error:.1e} is above {tolerance:.1e}")
    return Verdict(RIGHT, error)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), repr(error))


def _poison_free_memory(case: Case) -> None:
    blocks = [torch.full_like(case.query, float("nan")) for _ in range(3)]
    del blocks


def median_seconds(
    run: Callable[[], Outputs], device: torch.device, budget_s: float, most: int = 20
) -> tuple[float, int]:
    """Median time of a call, after one call to warm up.

    Args:
        run (Callable): the call.
        device (device): where it runs; CUDA events measure GPUs, the host's clock CPUs.
        budget_s (float): about how long to measure; at least 3 calls are made.
        most (int): calls at most. Default: 20

    Returns:
        tuple[float, int]: median in seconds, number of timed calls.
    """
    estimate = _seconds(run, device, 1)[0]
    calls = min(most, max(3, int(budget_s / max(estimate, 1e-6))))
    return median(_seconds(run, device, calls)), calls


def _seconds(run: Callable[[], Outputs], device: torch.device, calls: int) -> list[float]:
    if device.type != "cuda":
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start_event, end_event in events:
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize(device)
    return [start_event.elapsed_time(end_event) / 1000 for start_event, end_event in events]
