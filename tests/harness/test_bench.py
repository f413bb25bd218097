"""Whole runs on the tiny random model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from harness import bench, run_folder, runner
from harness.notices import runs_on_cpu
from harness.results import read_rows, read_run
from harness.run_folder import RunFolder
from harness.video import read_frames

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red ball\na blue cube\na green ring\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def arguments(prompts):
    """Options of a run of four jobs; ``--output`` is missing."""
    text = f"--model tiny-random --height 64 --width 64 --steps 2 --prompts-file {prompts} --no-gallery"
    return [*text.split(), "--strategies", "radial:block_size=64"]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished run, only to be read."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert bench.main([*arguments, "--output", str(output)]) == 0
    return output


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def last_error(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_has_one_row_and_two_files_per_job(finished):
    rows = read_rows(finished / "results.jsonl")
    assert [row.label for row in rows] == ["dense", "radial:block_size=64"] * 2
    for row in rows:
        assert row.ok
        assert (row.tokens, row.steps) == (64, 2)
        assert row.size == {"height": 64, "width": 64, "num_frames": 9}
        assert row.density == pytest.approx(1.0)  # one block holds the whole sequence
        assert 0 < row.attention_time_s < row.denoise_time_s < row.wall_time_s
        assert row.speedup == pytest.approx(row.dense_denoise_time_s / row.denoise_time_s)
        assert read_frames(finished / row.video).shape == read_frames(finished / row.frames).shape
    assert len(list((finished / "videos").iterdir())) == len(list((finished / "frames").iterdir())) == 4


def test_every_line_is_strict_json(finished):
    for line in (finished / "results.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_run_json_says_where_the_figures_come_from(finished):
    run = read_run(finished)
    assert run["model"] == "tiny-random"
    assert run["versions"]["torch"]
    assert run["command"].startswith("python -m harness.bench --model tiny-random")
    assert run["config"]["steps"] == 2
    assert {"device", "commit", "dirty", "created_at", "dtype"} <= run.keys()


def test_starting_again_repeats_nothing(copy, arguments, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*/*.m*")}
    lines = (copy / "results.jsonl").read_bytes()
    assert bench.main([*arguments, "--output", str(copy)]) == 0
    assert (copy / "results.jsonl").read_bytes() == lines
    assert {path: path.stat().st_mtime_ns for path in copy.glob("*/*.m*")} == before
    output = capsys.readouterr().out
    assert "4 of 4 jobs are finished already" in output
    assert "| dense | 2 |" in output
    assert "Measured on " in output


def test_more_prompts_and_seeds_are_added_to_a_run(copy, arguments):
    old = read_rows(copy / "results.jsonl")
    assert bench.main([*arguments, "--output", str(copy), "--prompts", "1", "--seeds", "0", "1"]) == 0
    rows = read_rows(copy / "results.jsonl")
    assert rows[:4] == old
    assert [(row.prompt, row.seed) for row in rows[4:]] == [("a red ball", 1)] * 2


def test_other_settings_do_not_mix_into_a_folder(copy, arguments, capsys):
    assert bench.main([*arguments, "--output", str(copy), "--steps", "3"]) == 2
    assert "holds results with steps 2, this run has 3; choose another --output" in last_error(capsys)
    assert len(read_rows(copy / "results.jsonl")) == 4


def test_a_torn_last_line_costs_one_job(copy, arguments, capsys):
    path = copy / "results.jsonl"
    rows = read_rows(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert bench.main([*arguments, "--output", str(copy)]) == 0
    assert "the last line of" in capsys.readouterr().out
    assert [row.job_id for row in read_rows(path)] == [row.job_id for row in rows]
    assert read_rows(path)[:3] == rows[:3]
    assert (copy / "results.jsonl.torn").read_bytes()


def test_a_corrupt_line_stops_the_run_until_it_is_repaired(copy, arguments, capsys):
    path = copy / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"rubbish\n" + b"".join(lines[1:]))
    damaged = path.read_bytes()
    assert bench.main([*arguments, "--output", str(copy)]) == 2
    assert "line 2 is not a result row" in last_error(capsys)
    assert path.read_bytes() == damaged
    assert bench.main([*arguments, "--output", str(copy), "--repair"]) == 0
    assert path.read_bytes() == b"".join(lines)
    assert (copy / "results.jsonl.torn").read_bytes() == b"rubbish\n"


def test_two_runs_on_one_folder(copy, arguments, capsys):
    with RunFolder(copy).locked():
        assert bench.main([*arguments, "--output", str(copy)]) == 2
    assert "another benchmark is running in" in last_error(capsys)


def test_no_disk_space_keeps_what_is_finished(arguments, tmp_path, monkeypatch, capsys):
    free = iter([10**12, 1000, 1000])
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, next(free)))
    assert bench.main([*arguments, "--output", str(tmp_path)]) == 2
    assert "no disk space" in last_error(capsys)
    assert [row.label for row in read_rows(tmp_path / "results.jsonl")] == ["dense"]


def test_a_failing_job_gives_exit_code_1(arguments, tmp_path, monkeypatch, capsys):
    generate = runner.generate

    def fail_once(model, strategy, prompt, *rest):
        if strategy.name == "radial" and prompt == "a red ball":
            raise ArithmeticError("no luck today")
        return generate(model, strategy, prompt, *rest)

    monkeypatch.setattr(runner, "generate", fail_once)
    assert bench.main([*arguments, "--output", str(tmp_path)]) == 1
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.status for row in rows] == ["ok", "failed", "ok", "ok"]
    assert rows[1].error == "ArithmeticError: no luck today"
    assert "1 (1 failed)" in capsys.readouterr().out


def test_ctrl_c_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    def interrupt(*anything):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "generate", interrupt)
    assert bench.main([*arguments, "--output", str(tmp_path)]) == 130
    assert last_error(capsys) == "stopped; every finished job is kept, start again to go on"


def test_an_output_that_is_a_file(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench.main([*arguments, "--output", str(tmp_path / "file")]) == 2
    assert "cannot write to output folder" in last_error(capsys)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_9_in_mid_run_loses_no_finished_job(prompts, tmp_path):
    output = tmp_path / "run"
    text = f"--model tiny-random --height 64 --width 64 --steps 30 --prompts-file {prompts} --prompts all"
    command = [sys.executable, "-m", "harness.bench", *text.split(), "--no-gallery", "--output", str(output)]
    command += ["--strategies", "radial", "--seeds", "0", "1"]
    results = output / "results.jsonl"
    alike = {"stdout": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    victim = subprocess.Popen(command, **alike)
    try:
        deadline = time.monotonic() + 120
        while (not results.exists() or results.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
            assert victim.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
    finally:
        victim.kill()
        victim.wait()
    before = read_rows(results)
    assert 3 <= len(before) < 12
    subprocess.run(command, check=True, **alike)
    after = read_rows(results)
    assert after[: len(before)] == before
    assert len(after) == 12
    assert all(row.ok for row in after)
    assert not list(output.glob("*/.*.partial"))


def test_another_version_of_a_plugin_is_not_mixed_in(arguments, copy, capsys):
    results = copy / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for row in lines:
        assert row["provider"].startswith("sparse-attn-functions ")
        row["provider"] = "somebody 0.1.0 (plugins.radial)"
    results.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert bench.main([*arguments, "--output", str(copy)]) == 2
    assert "from somebody 0.1.0" in last_error(capsys)


def test_notices_stand_under_the_table(arguments, copy, capsys):
    assert bench.main([*arguments, "--output", str(copy)]) == 0
    below = capsys.readouterr().out.split("Measured on")[1]
    assert "note: radial:block_size=64 executed every pair (density 1.000): at 64 tokens" in below
    assert ("note: These times were taken on a CPU" in below) == runs_on_cpu(read_run(copy))


@pytest.mark.parametrize("content", ["[1, 2]", "3"])
def test_a_run_record_that_is_no_object_is_one_line(arguments, copy, capsys, content):
    (copy / "run.json").write_text(content)
    assert bench.main([*arguments, "--output", str(copy)]) == 2
    assert "must hold an object" in last_error(capsys)
