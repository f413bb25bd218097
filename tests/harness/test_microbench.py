import json
from pathlib import Path

import pytest

from harness.microbench import main, read_benchmarks, tables

COMMITTED = Path(__file__).parents[2] / "docs" / "benchmarks" / "radial_nvidia_h200_2026-11-20.json"


def test_ratios_are_to_the_dense_median_of_the_same_shape():
    run = read_benchmarks(COMMITTED)
    medians = {entry["param"]: entry["stats"]["median"] for entry in run["benchmarks"]}
    shape = "2x48x226x11x48x85x64"
    ratio = medians[f"{shape}-dense"] / medians[f"{shape}-radial:preset=none"]
    text = tables(run)
    second = text[text.index("45,106 tokens") :]
    (line,) = [line for line in second.splitlines() if "radial:preset=none" in line]
    assert f"| {ratio:.2f}x |" in line and "| 0.502 | triton |" in line
    assert "Measured on NVIDIA H200" in text


FOLDER, README = COMMITTED.parent, COMMITTED.parents[2] / "README.md"
FILES = [COMMITTED, *sorted(FOLDER.glob("strategies_*.json")), *sorted(FOLDER.glob("operators_*.json"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_documentation_shows_what_the_command_prints(path, capsys):
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (FOLDER / "strategies.md").read_text()


def test_the_readme_shows_what_the_command_prints():
    path = FOLDER / "strategies_17k_structured_nvidia_h200_2026-11-29.json"
    assert tables(read_benchmarks(path)) in README.read_text()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read"),
        ("no json", "not pytest-benchmark"),
        ('{"benchmarks": []}', "not pytest-benchmark"),
    ],
)
def test_bad_files_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_benchmarks_without_a_group_are_left_out():
    run = json.loads(COMMITTED.read_text())
    text = tables(run)
    run["benchmarks"].insert(0, {"group": None, "name": "test_block_sparse_attention"})
    assert tables(run) == text


def same(seconds):
    return dict.fromkeys(("q1", "median", "q3"), seconds)


def test_predictions_are_shares_of_one_dense_call():
    run = json.loads(COMMITTED.read_text())
    (dense, *_) = [entry for entry in run["benchmarks"] if entry["param"].endswith("-dense")]
    shape = dense["extra_info"]["shape"]
    entry = {
        "group": f"prediction {shape}",
        "name": f"test_matching_of_tome[{shape}]",
        "param": shape,
        "stats": same(0.025 * dense["stats"]["median"]),
        "extra_info": dense["extra_info"],
    }
    text = tables(run)
    run["benchmarks"].append(entry)
    (line,) = set(tables(run).splitlines()) & {
        "| matching of tome | {0:.2f} ms | {0:.2f} to {0:.2f} | 2.5% |".format(25 * dense["stats"]["median"])
    }
    assert line and set(text.splitlines()) < set(tables(run).splitlines())


def test_operators_alone_are_shares_of_their_own_dense_call():
    run = json.loads(COMMITTED.read_text())
    dense, matching = run["benchmarks"][:2]
    facts = dense["extra_info"] | {"calls": 5}
    shape = facts["shape"]
    dense |= {"group": f"attention {shape}", "name": f"test_dense[{shape}]", "stats": same(0.01)}
    dense["extra_info"] = facts | {"calls": 1}
    matching |= {"group": f"prediction {shape}", "name": f"test_matching_of_tome[{shape}]"}
    matching |= {"stats": same(0.002), "extra_info": facts}
    run["benchmarks"] = [dense, matching]
    text = tables(run)
    assert "| matching of tome | 0.40 ms | 0.40 to 0.40 | 4.0% |" in text.splitlines()
    assert "5 calls in a row" in text and "float64" not in text


def test_dense_calls_within_predictions_are_subtracted(tmp_path, capsys):
    run = json.loads(COMMITTED.read_text())
    dense, matching = run["benchmarks"][:2]
    facts = dense["extra_info"] | {"calls": 5}
    shape = facts["shape"]
    dense |= {
        "group": f"attention {shape}",
        "name": f"test_dense[{shape}]",
        "stats": {"q1": 0.045, "median": 0.05, "q3": 0.055},
    }
    dense["extra_info"] = facts
    matching |= {"group": f"prediction {shape}", "name": f"test_matching_of_tome[{shape}]"}
    stats = {"q1": 0.018, "median": 0.018, "q3": 0.019}
    matching |= {"stats": stats, "extra_info": facts | {"calls": 20, "with_dense": 0.05}}
    run["benchmarks"] = [dense, matching]
    text = tables(run)
    assert "| matching of tome | 0.40 ms | 0.35 to 0.50 | 4.0% |" in text.splitlines()
    assert "20 calls in a row with 1 of dense attention, subtracted, on random inputs" in text
    path = tmp_path / "file.json"
    path.write_text(json.dumps(run | {"benchmarks": [matching]}))
    assert main([str(path)]) == 2 and "run test_dense into the same file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry", [{"group": "strategies a"}, {"group": "strategies a", "extra_info": {}}, None]
)
def test_a_file_of_something_else(tmp_path, capsys, entry):
    run = json.loads(COMMITTED.read_text())
    path = tmp_path / "file.json"
    path.write_text(json.dumps(run | {"benchmarks": [entry]}))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert "nox -s microbench writes one" in error and error.count("\n") == 1


def test_a_file_without_strategies(tmp_path, capsys):
    run = json.loads(COMMITTED.read_text())
    run["benchmarks"] = []
    path = tmp_path / "file.json"
    path.write_text(json.dumps(run))
    assert main([str(path)]) == 2 and "no strategies" in capsys.readouterr().err
    assert main([]) == 2
