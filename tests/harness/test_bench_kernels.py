"""The kernel benchmark on a CPU, its refusals, and the tables that it prints."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import bench_kernels, kernel_tables
from harness.kernel_cases import SHAPES, Shape, make_tensors, with_blocks
from harness.kernel_operators import dense_operators

COMMITTED = Path(__file__).parents[2] / "docs" / "benchmarks"
TINY = Shape(1, 2, 300, 32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench_kernels, "BUDGET_S", 0.001)


def run(tmp_path, *arguments):
    files = [tmp_path / "run.json", tmp_path / "run.md"]
    options = ["--device", "cpu", "--output", str(files[0]), "--markdown", str(files[1])]
    code = bench_kernels.main([*options, *arguments])
    return code, json.loads(files[0].read_text()), files[1].read_text()


def test_a_run_on_the_cpu(tmp_path, capsys):
    names = "sdpa,torch,gluon,block_sparse_attention"
    code, found, text = run(
        tmp_path, "--backends", names, "--sparsity", "0,0.75", "--blocks", "64x64,128x64", "--commit", "abc"
    )
    assert code == 0 and "say nothing about a GPU" in capsys.readouterr().out
    rows = {
        (r["family"], r["operator"], tuple(r["block_size"] or ()), r["pattern"]): r for r in found["rows"]
    }
    dense, sparse = rows["dense", "sdpa", (), None], rows["block-sparse", "torch", (64, 64), 0.75]
    assert dense["speedup"] == 1.0
    assert sparse["speedup"] == pytest.approx(dense["time_ms"] / sparse["time_ms"])
    assert rows["block-sparse", "gluon", (128, 64), 0.75]["status"] == "unavailable"
    assert ("backward", "block_sparse_attention", (64, 64), 0.0) not in rows
    backward = rows["backward", "block_sparse_attention", (64, 64), 0.75]
    gradients = rows["dense backward", "sdpa", (), None]
    assert backward["speedup"] == pytest.approx(gradients["time_ms"] / backward["time_ms"])
    assert found["commit"] == "abc" and not found["dirty"]
    assert found["shapes"] == {"tiny": {"size": list(TINY), "clock_mhz": [None, None]}}
    assert "| block-sparse | `torch` | 64x64 |" in text and "sparsity 0.75" in text
    assert "block-sparse `gluon`: unavailable" in text and "commit abc;" in text


def test_the_command_prints_the_same_tables_again(tmp_path, capsys):
    _, _, text = run(tmp_path, "--quick", "--backends", "sdpa,torch")
    capsys.readouterr()
    assert kernel_tables.main([str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == text


def test_a_wrong_operator_is_never_timed_and_is_no_baseline(tmp_path, monkeypatch):
    sdpa = dense_operators()[0]
    halved = replace(
        sdpa, name="halved", prepare=lambda case: lambda: (sdpa.prepare(case)()[0] / 2,),
        is_default=lambda case: False,
    )  # fmt: skip
    monkeypatch.setattr(bench_kernels, "all_operators", lambda: [sdpa, halved])
    code, found, text = run(tmp_path)
    right, wrong = found["rows"]
    assert code == 0 and wrong["status"] == "wrong"
    assert wrong["time_ms"] is wrong["speedup"] is wrong["tflops"] is None
    assert right["speedup"] == 1.0
    assert "| `halved` | wrong | - | 5.0e-01 |" in text
    monkeypatch.setattr(bench_kernels, "all_operators", lambda: [replace(halved, is_default=sdpa.is_default)])
    assert run(tmp_path)[0] == 1


def test_nothing_starts_after_the_time_limit_and_what_did_not_is_named(tmp_path):
    options = ("--backends", "sdpa,torch", "--blocks", "64x64,128x64", "--sparsity", "0,0.5")
    _, found, text = run(tmp_path, "--minutes", "1e-9", *options)
    assert {row["status"] for row in found["rows"]} == {"skipped"}
    cells = [
        f"block-sparse `torch` {block} at {sparsity}"
        for block in ("64x64", "128x64")
        for sparsity in (0, 0.5)
    ]
    places = ["dense `sdpa`", "dense backward `sdpa`", *cells]
    assert f"- tiny: skipped, the time limit was reached: {', '.join(places)}" in text.splitlines()


def test_names_may_be_spaced_and_repeated(tmp_path):
    _, found, _ = run(tmp_path, "--backends", " sdpa , torch,torch", "--quick", "--sparsity", "0.5,0.5")
    kinds = [(row["family"], row["operator"]) for row in found["rows"]]
    assert kinds == [("dense", "sdpa"), ("dense backward", "sdpa"), ("block-sparse", "torch")]


def test_rates_count_executed_pairs():
    case = with_blocks(make_tensors(TINY, torch.float32, torch.device("cpu")), (64, 64), 0.5, False)
    row = bench_kernels.measure(
        next(o for o in bench_kernels.all_operators() if (o.name, o.family) == ("torch", "block-sparse")),
        case,
        bench_kernels.make_plan(bench_kernels._parser().parse_args(["--device", "cpu"])),
    )
    kept = float(case.mask.to_dense().float().mean()) * 2 * 300 * 300
    assert row["tflops"] == pytest.approx(4 * 32 * kept / (row["time_ms"] / 1e3) / 1e12)
    assert math.isfinite(row["error"]) and row["error"] < 2.0**-18


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shapes", "tiny,huge"], "--shapes: 'huge'"),
        (["--shapes", ""], "--shapes: '' is not among"),
        (["--backends", "fastest"], "--backends: 'fastest'"),
        (["--sparsity", "0,1"], "--sparsity takes"),
        (["--sparsity", "none"], "--sparsity takes"),
        (["--blocks", "100x64"], "--blocks takes"),
        (["--blocks", "64"], "--blocks takes"),
        (["--blocks", "0x64"], "--blocks takes"),
        (["--minutes", "-1"], "--minutes must be above 0"),
        (["--output", ""], "name a file"),
        (["--output", "a.json", "--markdown", "a.json"], "are one file: a.json"),
        (["--quick", "--backends", "sdpa", "--output", "/dev/full"], "cannot write to /dev/full: No space"),
        (["--device", "tpu"], "--device must be"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert bench_kernels.main(["--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no json",
        '{"rows": []}',
        '{"rows": [], "shapes": {}, "device": "x"}',
        '{"rows": [{"status": "right"}], "shapes": {"a": {"size": [1, 1, 1, 1]}}, "device": "x"}',
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, content):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert kernel_tables.main([str(path)]) == 2
    assert kernel_tables.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("kernels_*.json")), ids=lambda path: path.stem)
def test_the_documentation_shows_what_the_command_prints(path, capsys):
    assert kernel_tables.main([str(path)]) == 0
    assert capsys.readouterr().out.strip() in (COMMITTED / "kernels.md").read_text()


def test_shapes_are_those_of_the_models():
    assert SHAPES["cogvideox-2b"].tokens == 226 + 13 * 30 * 45
    assert SHAPES["cogvideox-1.5-5b"].tokens == 226 + 11 * 48 * 85
    assert SHAPES["wan-14b-720p"].tokens == 21 * 45 * 80
    assert SHAPES["hunyuan-video"].tokens == 256 + 33 * 45 * 80
