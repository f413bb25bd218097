"""Errors of single calls: what is counted, and what the committed table says."""

import json
from pathlib import Path

import pytest

from harness import call_errors

COMMITTED = Path(__file__).parents[2] / "docs" / "benchmarks"
TINY = ["--model", "tiny-random", "--steps", "2", "--steps-measured", "2"]
SPECS = ["sparge:block_size=64,topk=0.4", "sparge:block_size=64,topk=1.0", "dense"]


def test_a_row_for_every_strategy_and_files_that_say_the_same(tmp_path, capsys):
    files = [tmp_path / "deep" / "errors.json", tmp_path / "errors.md"]
    given = [*TINY, "--output", str(files[0]), "--markdown", str(files[1])]
    assert call_errors.main(["--strategies", *SPECS, *given]) == 0
    text = capsys.readouterr().out
    assert files[1].read_text() == text
    run = json.loads(files[0].read_text())
    assert call_errors.table(run) == text
    sparse, full, dense = run["rows"]
    assert [row["strategy"] for row in run["rows"]] == SPECS and run["steps"] == [0, 1]
    assert 0.3 < sparse["density"] < 0.9 and sparse["inexact"] == 1
    assert 0 < sparse["mean"] <= sparse["worst"]
    assert full["density"] == dense["density"] == 1 and dense["inexact"] == dense["worst"] == 0
    assert full["inexact"] == full["mean"] == 0 and full["worst"] < call_errors.EXACT
    assert "`sparge:block_size=64,topk=0.4` | 0." in text and "python -m harness.call_errors" in text


def test_heads_that_run_dense_are_not_part_of_the_mean(capsys):
    """The two frame patterns are the same; one leaves the heads of the other class dense."""
    options = "places=8,similarity=0.3,anchors=1"
    specs = [f"combined:{options},sparse=dense", f"combined:{options},classes=pattern"]
    assert call_errors.main(["--strategies", *specs, *TINY]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| `comb")]
    shares = [float(row[3].strip(" %")) for row in rows]
    assert shares[0] <= shares[1] == 100


@pytest.mark.parametrize(
    "given, message",
    [
        (["--strategies", "sparg"], "Did you mean 'sparge'"),
        (["--strategies", "sparge", "--prompts", "0"], "--prompts must be at least 1"),
        (["--strategies", "sparge", "--prompts", "1000"], "--prompts need 1000 prompts"),
        (["--strategies", "sparge", "--output", "/proc/nothing/x.json"], "cannot write to"),
        (["--strategies", "sparge", "--model", "nothing"], "there is no model 'nothing'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(given, message, capsys):
    assert call_errors.main(given) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_the_committed_table_is_printed_from_the_committed_data():
    (path,) = COMMITTED.glob("call_errors_demo_*.json")
    run = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text().endswith(call_errors.table(run))
    assert run["model"] == "demo" and run["commit"] and not run["dirty"]
