"""Runner: works through the jobs of a run, one row each."""

import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core import AttentionStrategy, ExecutionReport
from core.registry import installed
from harness import video
from harness.errors import BenchError
from harness.generate import Denoised, Generated, denoise, generate
from harness.jobs import Job, StrategySpec
from harness.models import LoadedModel
from harness.progress import Progress
from harness.results import ResultRow
from harness.run_folder import RunFolder, no_space, utc_now
from harness.timing import StepCallback, ratio

WARM_UP_STEPS = 2
ROW_METRICS = ("psnr_db", "ssim", "lpips")
TEMPORAL_METRICS = ("flow_warp_error",)


class Runner:
    """Runs jobs in order and appends their rows.

    A job that is not dense is timed against a dense denoising pass made immediately before it in
    this process: the dense job itself if that came directly before, else an extra pass.

    Args:
        model (LoadedModel): pipeline and settings.
        folder (RunFolder): where rows and videos go.
        jobs (Sequence[Job]): all jobs of the run, dense first in each group.
        environment (dict): ``device``, ``versions`` and ``commit`` of the rows.
    """

    def __init__(
        self, model: LoadedModel, folder: RunFolder, jobs: Sequence[Job], environment: dict[str, Any]
    ) -> None:
        self._model, self._folder, self._environment = model, folder, environment
        self._jobs = jobs
        self._finished = folder.finished()
        self._pending = [job for job in jobs if job.job_id not in self._finished]
        self._strategies: dict[str, AttentionStrategy] = {}
        self._dense_spec = next(job.spec for job in jobs if job.spec.is_baseline)
        self._just_before: tuple[Job, Denoised] | None = None
        self._progress = Progress(0, 0, 0)

    @property
    def finished_before(self) -> int:
        """Jobs that earlier calls finished."""
        return len(self._jobs) - len(self._pending)

    def run(self) -> int:
        """Run what is not finished.

        Returns:
            int: failed jobs.

        Raises:
            BenchError: the run cannot go on (no disk space, results not writable).
        """
        failed, planned = 0, 0
        steps = [self._planned_steps(index) for index in range(len(self._pending))]
        with Progress(len(self._jobs), self.finished_before, sum(steps)) as progress:
            self._progress = progress
            for job, count in zip(self._pending, steps, strict=True):
                self._folder.check_space(self._model.settings.size)
                progress.start_job(job)
                row = self._run_job(job)
                self._folder.append(row)
                if row.ok:
                    self._finished[job.job_id] = row
                failed += not row.ok
                planned += count
                progress.finish_job(row, planned)
        return failed

    def _planned_steps(self, index: int) -> int:
        job, before = self._pending[index], self._pending[index - 1] if index else None
        paired = before is not None and before.spec.is_baseline and job.shares_noise(before)
        return self._model.settings.steps * (1 if job.spec.is_baseline or paired else 2)

    def _run_job(self, job: Job) -> ResultRow:
        started_at = utc_now()
        try:
            figures = self._measure(job)
        except BenchError:
            raise
        except Exception as error:  # a strategy may fail in any way; the other jobs go on
            self._just_before = None
            self._log_failure(job)
            self._free_memory()
            return self._row(job, started_at, {"status": "failed", "error": _one_line(error)})
        return self._row(job, started_at, {"status": "ok", **figures})

    def _measure(self, job: Job) -> dict[str, Any]:
        reference = None if job.spec.is_baseline else self._dense_frames(job)
        strategy = self._warm(job.spec, job)
        dense = None if job.spec.is_baseline else self._paired_dense(job)
        made = generate(self._model, strategy, job.prompt, job.seed, self._step_counter())
        self._just_before = (job, made.denoised)
        self._progress.phase("writing and measuring the video")
        self._write_video(job, made.frames)
        return {
            **_speed_figures(made, dense or made.denoised),
            **_execution_figures(made.denoised.report),
            **self._quality_figures(job, made.frames, reference),
            "video": str(Path("videos") / self._folder.video(job).name),
            "frames": str(Path("frames") / self._folder.frames(job).name),
        }

    def _warm(self, spec: StrategySpec, job: Job) -> AttentionStrategy:
        """The strategy of this label, compiled, tuned and planned by a short pass at its first use."""
        if spec.label not in self._strategies:
            strategy = spec.create()
            self._progress.phase("warm-up")
            # A strategy that starts dense must reach its sparse steps.
            steps = max(WARM_UP_STEPS, strategy.parameters.dense_timesteps + 1)
            steps = min(steps, self._model.settings.steps)
            denoise(self._model, strategy, job.prompt, job.seed, steps=steps)
            self._strategies[spec.label] = strategy
        return self._strategies[spec.label]

    def _paired_dense(self, job: Job) -> Denoised:
        before, self._just_before = self._just_before, None
        if before and before[0].spec.is_baseline and job.shares_noise(before[0]):
            return before[1]
        strategy = self._warm(self._dense_spec, job)
        return denoise(self._model, strategy, job.prompt, job.seed, on_step=self._step_counter(paired=True))

    def _dense_twin(self, job: Job) -> Job:
        return next(other for other in self._jobs if other.spec.is_baseline and job.shares_noise(other))

    def _dense_frames(self, job: Job) -> np.ndarray:
        """The dense video of the same prompt and seed."""
        twin = self._dense_twin(job)
        if twin.job_id not in self._finished:
            raise RuntimeError("the dense job of this prompt and seed failed: nothing to compare with")
        return video.read_frames(self._folder.frames(twin))

    def _quality_figures(self, job: Job, frames: np.ndarray, reference: np.ndarray | None) -> dict[str, Any]:
        values: dict[str, float | None] = {}
        notes = []
        for metric in installed().metrics():
            try:
                values[metric.name] = metric.compute(frames, reference)
            except Exception as error:  # one figure less, not one video less
                values[metric.name] = None
                notes.append(f"metric {metric.name} failed: {_one_line(error)}")
        temporal = {name: values.pop(name, None) for name in TEMPORAL_METRICS}
        dense = temporal
        if reference is not None:
            dense = self._finished[self._dense_twin(job).job_id].temporal
        return {
            "identical": None if reference is None else bool(np.array_equal(frames, reference)),
            **{name: values.pop(name, None) for name in ROW_METRICS},
            "temporal": temporal | {f"{name}_dense": dense.get(name) for name in TEMPORAL_METRICS},
            "metrics": values,
            "notes": notes,
        }

    def _write_video(self, job: Job, frames: np.ndarray) -> None:
        fps = self._model.settings.fps
        try:
            video.write_mp4(self._folder.video(job), frames, fps)
            video.write_lossless(self._folder.frames(job), frames, fps)
        except OSError as error:
            raise no_space(self._folder.path, error) from error

    def _row(self, job: Job, started_at: str, figures: dict[str, Any]) -> ResultRow:
        settings = self._model.settings
        return ResultRow(
            job_id=job.job_id,
            label=job.spec.label,
            strategy=job.spec.name,
            provider=job.spec.provider,
            preset=job.spec.preset,
            parameters=job.spec.parameters,
            model=self._model.name,
            prompt=job.prompt,
            prompt_index=job.prompt_index,
            seed=job.seed,
            steps=settings.steps,
            size=settings.size,
            guidance_scale=settings.guidance_scale,
            dtype=self._model.dtype,
            started_at=started_at,
            **self._environment,
            **figures,
        )

    def _step_counter(self, paired: bool = False) -> StepCallback:
        return lambda step: self._progress.count_step(step, self._model.settings.steps, paired)

    def _log_failure(self, job: Job) -> None:
        with (self._folder.path / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{utc_now()} job {job.job_id} {job.spec.label}\n{traceback.format_exc()}\n")

    def _free_memory(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()


def _speed_figures(made: Generated, dense: Denoised) -> dict[str, Any]:
    denoised = made.denoised
    attention, dense_attention = denoised.report.attention_time_s, dense.report.attention_time_s
    return {
        "tokens": denoised.tokens,
        "wall_time_s": made.wall_time_s,
        "denoise_time_s": denoised.denoise_time_s,
        "attention_time_s": attention,
        "dense_denoise_time_s": dense.denoise_time_s,
        "dense_attention_time_s": dense_attention,
        "speedup": ratio(dense.denoise_time_s, denoised.denoise_time_s),
        "attention_speedup": ratio(dense_attention, attention),
        "peak_memory_bytes": made.peak_memory_bytes,
    }


def _execution_figures(report: ExecutionReport) -> dict[str, Any]:
    return {
        "density": None if math.isnan(report.density) else report.density,
        "density_by_layer": _without_nan(report.density_by_layer),
        "shares_by_layer": {name: _without_nan(table) for name, table in report.shares_by_layer.items()},
        "backends": report.backends,
        "dense_calls": report.dense_calls,
    }


def _without_nan(table: list[list[float]]) -> list[list[float | None]]:
    return [[None if math.isnan(cell) else cell for cell in layer] for layer in table]


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
