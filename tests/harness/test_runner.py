"""The order of passes and the arithmetic of pairs, with a model that only pretends."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core import ExecutionReport, Metric
from harness import runner as runner_module
from harness.generate import Denoised, Generated
from harness.jobs import make_jobs, resolve_specs
from harness.models import CallSettings, LoadedModel
from harness.results import read_rows
from harness.run_folder import RunFolder
from harness.runner import Runner

SETTINGS = CallSettings(height=32, width=32, num_frames=5, steps=4, guidance_scale=1.0, fps=8)
ENVIRONMENT = {"device": "d", "versions": {}, "commit": None}
STRATEGIES = ["radial", "radial:decay_factor=0.5"]


class Stage:
    """Stands in for `denoise` and `generate`: the n-th pass takes n seconds; notes what ran."""

    def __init__(self):
        self.passes = []
        self.broken = lambda strategy, prompt: False
        self.clock = 0

    def denoise(self, model, strategy, prompt, seed, *, steps=None, on_step=None):
        name = "D" if strategy.name == "dense" else {1.0: "A", 0.5: "B"}[strategy.parameters.decay_factor]
        if self.broken(strategy, prompt):
            raise ValueError("boom\nsecond line")
        self.clock += 1
        self.passes.append(f"warm {name}" if steps else name)
        report = ExecutionReport(strategy.name, {}, 1, 0.5, [[0.5, float("nan")]], {}, {}, self.clock / 10)
        return Denoised(torch.zeros(1), float(self.clock), 7, report)

    def generate(self, model, strategy, prompt, seed, on_step=None):
        denoised = self.denoise(model, strategy, prompt, seed)
        self.passes[-1] += "+video"
        frames = np.full((5, 32, 32, 3), 60 if strategy.name == "dense" else 70, dtype=np.uint8)
        return Generated(denoised, frames, 99.0, 1)


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(runner_module, "denoise", stage.denoise)
    monkeypatch.setattr(runner_module, "generate", stage.generate)
    return stage


@pytest.fixture
def start(tmp_path, stage):
    specs, _ = resolve_specs(STRATEGIES, (), "cpu")
    jobs = make_jobs(specs, ["p", "q"], [0], {})
    model = LoadedModel("m", None, SETTINGS, torch.device("cpu"), "float32")
    return SimpleNamespace(
        folder=RunFolder(tmp_path), run=lambda: Runner(model, RunFolder(tmp_path), jobs, ENVIRONMENT).run()
    )


def test_every_job_follows_a_dense_pass_of_its_own(start, stage):
    assert start.run() == 0
    first = ["warm D", "D+video", "warm A", "A+video", "warm B", "D", "B+video"]
    later = ["D+video", "A+video", "D", "B+video"]
    assert stage.passes == first + later


def test_speedups_are_ratios_of_neighbouring_passes(start, stage):
    start.run()
    dense, near, far = read_rows(start.folder.results)[:3]
    assert (dense.denoise_time_s, dense.speedup, dense.attention_speedup) == (2.0, 1.0, 1.0)
    assert (near.dense_denoise_time_s, near.denoise_time_s, near.speedup) == (2.0, 4.0, 0.5)
    assert (far.dense_denoise_time_s, far.denoise_time_s) == (6.0, 7.0)
    assert far.speedup == pytest.approx(6 / 7)
    assert far.attention_speedup == pytest.approx(0.6 / 0.7)


def test_rows_are_complete(start):
    start.run()
    dense, near = read_rows(start.folder.results)[:2]
    assert near.identical is False
    assert near.psnr_db == pytest.approx(28.13, abs=0.01)
    assert near.temporal == {"flow_warp_error": 0.0, "flow_warp_error_dense": 0.0}
    assert near.density_by_layer == [[0.5, None]]
    assert (near.tokens, near.wall_time_s, near.peak_memory_bytes) == (7, 99.0, 1)
    assert (dense.psnr_db, dense.ssim, dense.identical) == (None, None, None)
    for row in (dense, near):
        assert (start.folder.path / row.video).is_file()
        assert (start.folder.path / row.frames).is_file()


def test_a_second_call_has_nothing_to_do(start, stage):
    start.run()
    stage.passes.clear()
    assert start.run() == 0
    assert stage.passes == []


def test_a_lost_video_is_made_again_with_its_pair(start, stage):
    start.run()
    row = read_rows(start.folder.results)[1]
    (start.folder.path / row.video).unlink()
    stage.passes.clear()
    start.run()
    assert stage.passes == ["warm A", "warm D", "D", "A+video"]


def test_a_failing_job_is_a_row_and_the_run_goes_on(start, stage):
    stage.broken = lambda strategy, prompt: strategy.name == "radial" and prompt == "p"
    assert start.run() == 2
    rows = read_rows(start.folder.results)
    assert [row.status for row in rows] == ["ok", "failed", "failed", "ok", "ok", "ok"]
    assert rows[1].error == "ValueError: boom"
    assert rows[1].speedup is None
    assert "boom\nsecond line" in (start.folder.path / "errors.log").read_text()


def test_failed_jobs_run_again_at_the_next_start(start, stage):
    stage.broken = lambda strategy, prompt: strategy.name == "radial"
    start.run()
    stage.broken = lambda strategy, prompt: False
    stage.passes.clear()
    assert start.run() == 0
    assert [name for name in stage.passes if "video" in name] == ["A+video", "B+video"] * 2
    assert all(row.ok for row in read_rows(start.folder.results))


def test_without_a_dense_video_there_is_nothing_to_compare_with(start, stage):
    stage.broken = lambda strategy, prompt: strategy.name == "dense" and prompt == "p"
    assert start.run() == 3
    rows = read_rows(start.folder.results)
    assert "the dense job of this prompt and seed failed" in rows[1].error
    assert [row.status for row in rows[3:]] == ["ok"] * 3


def test_metrics_of_other_plugins_are_added_and_may_fail(start, monkeypatch):
    def fails(video, reference):
        raise RuntimeError("no weights")

    extra = [Metric("mean", lambda video, reference: float(video.mean())), Metric("broken", fails)]
    registry = runner_module.installed()
    own = registry.metrics()
    monkeypatch.setattr(registry, "metrics", lambda: own + extra)
    start.run()
    near = read_rows(start.folder.results)[1]
    assert near.metrics == {"mean": 70.0, "broken": None}
    assert near.notes == ["metric broken failed: RuntimeError: no weights"]
