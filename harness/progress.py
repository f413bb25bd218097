"""Live progress of a run: a line that is redrawn on a terminal, one line per job elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from harness.jobs import DENSE, Job
from harness.results import ResultRow
from harness.tables import format_time


class Progress:
    """Jobs done, the current job with its step, and the remaining time.

    The remaining time is the time so far per planned denoising step, times the steps that are left;
    decoding, metrics and warm-up are spread over the steps.

    Args:
        total_jobs (int): jobs of the run, finished ones included.
        done_jobs (int): jobs that were finished by earlier calls.
        planned_steps (int): denoising steps of this call, paired dense passes included.
        file (TextIO, Optional): where to write. Default: standard output
    """

    def __init__(
        self, total_jobs: int, done_jobs: int, planned_steps: int, file: TextIO | None = None
    ) -> None:
        self._console = Console(file=file, highlight=False, soft_wrap=True)
        self._total, self._done = total_jobs, done_jobs
        self._planned, self._steps = planned_steps, 0
        self._started = time.monotonic()
        self._what = ""
        self._doing = ""
        self._live = Live(console=self._console, get_renderable=self._line, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._doing = ""
            self._live.stop()

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        self._console.print(escape(text))

    def start_job(self, job: Job) -> None:
        """A job begins."""
        self._what = describe(job)

    def phase(self, text: str) -> None:
        """What the current job is doing (``"warm-up"``, ``"decoding"``)."""
        self._doing = text

    def count_step(self, step: int, steps: int, paired: bool) -> None:
        """A planned denoising step is over; ``paired`` if it belongs to the dense pass before the job."""
        self._steps += 1
        if step < steps:
            self.phase(f"{'dense step' if paired else 'step'} {step} of {steps}")
        else:
            self.phase("dense pass done" if paired else "decoding")

    def finish_job(self, row: ResultRow, planned_steps: int) -> None:
        """A job's row is on disk; ``planned_steps`` is what was planned up to and including it."""
        self._done += 1
        self._steps = planned_steps
        outcome = _outcome(row)
        left = f"; {self._remaining()}" if self._done < self._total else ""
        self.note(f"[{self._done}/{self._total}] {self._what}: {outcome}{left}")

    def _remaining(self) -> str:
        if self._steps == 0:
            return "remaining time unknown yet"
        per_step = (time.monotonic() - self._started) / self._steps
        return f"about {format_duration(per_step * (self._planned - self._steps))} left"

    def _line(self) -> Text:
        if not self._doing:
            return Text("")
        overall = f"{self._done}/{self._total} jobs done, {self._remaining()}"
        return Text(f"{overall} | {self._what} | {self._doing}", overflow="ellipsis", no_wrap=True)


def describe(job: Job) -> str:
    """``radial:preset=demo, prompt 2, seed 0``; prompts count from 1."""
    return f"{job.spec.label}, prompt {job.prompt_index + 1}, seed {job.seed}"


def format_duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _outcome(row: ResultRow) -> str:
    if not row.ok:
        return f"FAILED: {row.error}"
    figures: Sequence[tuple[str, float | None, str]] = (
        ("speedup", None if row.label == DENSE else row.speedup, ".2f"),
        ("density", row.density, ".3f"),
        ("PSNR", row.psnr_db, ".1f"),
    )
    parts = [f"{name} {value:{form}}" for name, value, form in figures if value is not None]
    return f"{format_time(row.denoise_time_s)} denoising, " + ", ".join(parts)
