"""What must be said beside a run's figures, lest they be read for more than they are."""

import re
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from harness.jobs import DENSE
from harness.models import SMALL
from harness.results import ResultRow
from harness.tables import format_time

SMALL_MODEL_NOTICE = (
    "This model is too small for a GPU: its calls take less time than their launches, so whoever launches "
    "more is slower. Read density and fidelity here; measure speed at the size you mean to use."
)
SHORTEST_PASS_S = 1.0  # below it the operating system's own work is a good part of a ratio


def run_notices(settings: dict[str, Any], rows: Sequence[ResultRow]) -> list[str]:
    """Everything that belongs under the table of a run, one sentence or two each.

    Args:
        settings (dict): ``run.json``.
        rows (Sequence[ResultRow]): rows of the run.
    """
    notices = [*dense_after_all(rows), times_notice(settings), short_passes_notice(rows)]
    return [notice for notice in notices if notice]


def times_notice(settings: dict[str, Any]) -> str:
    """What must be said where times do not carry over: on a CPU, and of a small model on a GPU."""
    if not runs_on_cpu(settings):
        return SMALL_MODEL_NOTICE if settings["model"] in SMALL else ""
    return (
        "These times were taken on a CPU and say nothing about times on a GPU, where other kernels run. "
        "Read density and fidelity here; measure speed on the GPU you mean to use."
    )


def runs_on_cpu(settings: dict[str, Any]) -> bool:
    """Whether the run's device is a processor, which is named with its cores, and not a GPU."""
    device = str(settings["device"])
    return device.lower().startswith("cpu") or re.search(r"\(\d+ cores?\b", device) is not None


def short_passes_notice(rows: Sequence[ResultRow]) -> str:
    """A warning of speedups over dense passes that are over in a moment, "" where they are long enough."""
    passes = [row.dense_denoise_time_s for row in rows if row.ok and row.label != DENSE]
    measured = [seconds for seconds in passes if seconds is not None]
    if not measured or median(measured) >= SHORTEST_PASS_S:
        return ""
    return f"a denoising pass took {format_time(median(measured))}; speedups of so short passes are noise"


def dense_after_all(rows: Sequence[ResultRow]) -> list[str]:
    """One remark per strategy that was meant sparse but executed every pair or more, with the reason."""
    return list(dict(_dense_remarks(rows)).values())


def _dense_remarks(rows: Sequence[ResultRow]) -> Iterator[tuple[str, str]]:
    for row in rows:
        if not row.ok or row.strategy == DENSE or row.density is None or row.density < 1.0:
            continue
        if row.density > 1.0:
            yield (
                row.label,
                f"{row.label} executed more pairs than dense attention has (density {row.density:.3f}): at "
                f"{row.tokens} tokens what it adds costs more than what it leaves out",
            )
            continue
        warm = sum(row.dense_calls.values()) == sum(row.backends.values())
        reason = ", ".join(row.dense_calls) if warm else f"at {row.tokens} tokens it leaves nothing out"
        yield row.label, f"{row.label} executed every pair (density 1.000): {reason}"
