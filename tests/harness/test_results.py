import dataclasses
import json
import os

import pytest

from harness.errors import ResultsError
from harness.results import ResultRow, append_row, read_rows, read_run, recover, write_json


def make_row(job_id="a1", **changes):
    values = {
        "job_id": job_id,
        "label": "radial",
        "strategy": "radial",
        "preset": None,
        "parameters": {"decay_factor": 0.5},
        "model": "tiny-random",
        "prompt": "a red ball — «x»",
        "prompt_index": 0,
        "seed": 0,
        "steps": 4,
        "size": {"height": 64, "width": 64, "num_frames": 9},
        "guidance_scale": 1.0,
        "dtype": "float32",
        "device": "cpu",
        "versions": {"torch": "2", "triton": None},
        "commit": None,
        "started_at": "2026-01-01T00:00:00+00:00",
        "status": "ok",
    }
    return ResultRow(**(values | changes))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def test_a_row_comes_back_as_it_was(path):
    row = make_row(density=0.25, density_by_layer=[[1.0, None]], temporal={"flow_warp_error": 0.1})
    append_row(path, row)
    assert read_rows(path) == [row]


def test_every_line_is_strict_json(path):
    append_row(path, make_row(density=float("nan"), metrics={"x": float("inf")}))
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values["density"] is None
    assert values["metrics"] == {"x": None}


def test_the_last_row_of_a_job_counts(path):
    append_row(path, make_row("a", status="failed", error="boom"))
    append_row(path, make_row("b"))
    append_row(path, make_row("a"))
    assert [(row.job_id, row.status) for row in read_rows(path)] == [("a", "ok"), ("b", "ok")]


def test_no_file_is_no_rows(path):
    assert read_rows(path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "zero"}, "'seed' has the wrong type"),
        ({"speedup": "fast"}, "'speedup' has the wrong type"),
        ({"steps": True}, "'steps' has the wrong type"),
        ({"status": "maybe"}, "status must be ok or failed"),
        ({"colour": "red"}, "unknown keys: colour"),
    ],
)
def test_a_wrong_value_is_named(changes, message):
    values = make_row().to_dict() | changes
    with pytest.raises(ResultsError, match=message):
        ResultRow.from_dict(values)


def test_missing_keys_are_named():
    values = make_row().to_dict()
    del values["prompt"], values["seed"]
    with pytest.raises(ResultsError, match="missing keys: prompt, seed"):
        ResultRow.from_dict(values)


def test_integers_pass_for_floats():
    assert ResultRow.from_dict(make_row().to_dict() | {"guidance_scale": 6}).guidance_scale == 6


def test_a_line_cut_off_by_a_kill_is_set_aside_and_nothing_is_lost(path):
    append_row(path, make_row("a"))
    append_row(path, make_row("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert [row.job_id for row in read_rows(path)] == ["a"]
    (message,) = recover(path)
    assert "cut off" in message
    append_row(path, make_row("c"))
    assert [row.job_id for row in read_rows(path)] == ["a", "c"]
    torn = path.with_name("results.jsonl.torn").read_bytes()
    assert torn == whole.splitlines(keepends=True)[1][:-40] + b"\n"


def test_a_whole_last_line_without_newline_is_kept(path):
    append_row(path, make_row("a"))
    path.write_bytes(path.read_bytes()[:-1])
    assert recover(path) == []
    assert [row.job_id for row in read_rows(path)] == ["a"]
    assert not path.with_name("results.jsonl.torn").exists()


def test_a_broken_line_is_an_error_with_its_number(path):
    append_row(path, make_row("a"))
    with path.open("a") as file:
        file.write("{]\n")
    append_row(path, make_row("b"))
    before = path.read_bytes()
    assert recover(path) == []
    with pytest.raises(ResultsError, match=r"results.jsonl line 2 is not a result row: not JSON.*--repair"):
        read_rows(path)
    assert path.read_bytes() == before


def test_repair_moves_broken_lines_aside(path):
    append_row(path, make_row("a"))
    with path.open("a") as file:
        file.write('{]\n{"job_id": 1}\n')
    append_row(path, make_row("b"))
    (message,) = recover(path, repair=True)
    assert "2 broken" in message
    assert [row.job_id for row in read_rows(path)] == ["a", "b"]
    assert path.with_name("results.jsonl.torn").read_text() == '{]\n{"job_id": 1}\n'


def test_a_row_that_does_not_fit_on_the_disk_leaves_the_file_whole(path, monkeypatch):
    append_row(path, make_row("a"))
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:10]))
    with pytest.raises(OSError, match="only 10 of"):
        append_row(path, make_row("b"))
    assert path.read_bytes() == before


def test_all_fields_are_described():
    for field in dataclasses.fields(ResultRow):
        assert f"{field.name} (" in ResultRow.__doc__ or f"``{field.name}``" in ResultRow.__doc__


def test_run_json_round_trip(tmp_path):
    write_json(tmp_path / "run.json", {"model": "demo", "x": float("nan")})
    assert read_run(tmp_path) == {"model": "demo", "x": None}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResultsError, match="not valid JSON"):
        read_run(tmp_path)
    with pytest.raises(ResultsError, match="does not exist"):
        read_run(tmp_path / "elsewhere")


def test_a_folder_in_the_place_of_results_is_one_line(tmp_path):
    with pytest.raises(ResultsError, match="cannot read .*: Is a directory"):
        read_rows(tmp_path)
