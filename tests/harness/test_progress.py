import io

import pytest

from harness.jobs import make_jobs, resolve_specs
from harness.progress import Progress, describe, format_duration
from harness.results import ResultRow


@pytest.fixture
def job():
    specs, _ = resolve_specs(["radial:sink=true"], (), "cpu")
    return make_jobs(specs, ["p"], [7], {})[1]


def row_of(job, **figures):
    facts = {"model": "m", "steps": 4, "size": {}, "guidance_scale": 1.0, "dtype": "float32", "device": "d"}
    return ResultRow(
        job_id=job.job_id,
        label=job.spec.label,
        strategy=job.spec.name,
        provider=job.spec.provider,
        preset=None,
        parameters={},
        prompt=job.prompt,
        prompt_index=job.prompt_index,
        seed=job.seed,
        versions={},
        commit=None,
        started_at="",
        **facts,
        **figures,
    )


def test_plain_lines_without_a_terminal(job):
    out = io.StringIO()
    with Progress(total_jobs=3, done_jobs=1, planned_steps=8, file=out) as progress:
        progress.start_job(job)
        for step in range(1, 5):
            progress.count_step(step, 4, paired=False)
        progress.finish_job(row_of(job, status="ok", denoise_time_s=1.5, speedup=2.0, density=0.25), 4)
        progress.finish_job(row_of(job, status="failed", error="ValueError: [boom]"), 8)
    first, second = out.getvalue().splitlines()
    assert first.startswith(
        "[2/3] radial:sink=true, prompt 1, seed 7: 1.5 s denoising, speedup 2.00, density 0.250"
    )
    assert first.endswith(" left")
    assert second == "[3/3] radial:sink=true, prompt 1, seed 7: FAILED: ValueError: [boom]"


def test_the_remaining_time_is_the_time_per_step_times_the_steps_left(job, monkeypatch):
    now = iter([0.0, 30.0])
    monkeypatch.setattr("harness.progress.time.monotonic", lambda: next(now))
    progress = Progress(total_jobs=2, done_jobs=0, planned_steps=12, file=io.StringIO())
    for step in range(1, 4):
        progress.count_step(step, 4, paired=False)
    assert progress._remaining() == "about 1 min 30 s left"


def test_descriptions(job):
    assert describe(job) == "radial:sink=true, prompt 1, seed 7"
    assert [format_duration(value) for value in (0.4, 59, 61, 3700)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 1 min",
    ]
