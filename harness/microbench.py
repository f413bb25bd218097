"""``python -m harness.microbench FILE``: table of a microbenchmark run, from pytest-benchmark's JSON."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness.command import make_parser, parse_options, run_command
from harness.errors import BenchError

COLUMNS = ("strategy", "density", "backend", "median", "against dense", "largest error")
KINDS = {"strategies": "", "gradients": ", forward and backward pass"}
LIKENESS = "relative L1 to dense"  # missing in older files
PREDICTION, DENSE_OPERATOR = "prediction", "attention"


def read_benchmarks(path: Path) -> dict[str, Any]:
    """The JSON file that ``nox -s microbench`` keeps.

    Raises:
        BenchError: no such file, or not a file of pytest-benchmark.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        run["benchmarks"], run["machine_info"]["python_version"]
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}; nox -s microbench writes one") from None
    except (ValueError, KeyError, TypeError):
        raise BenchError(f"{path} is not pytest-benchmark's JSON; nox -s microbench writes one") from None
    return run


def tables(run: dict[str, Any]) -> str:
    """Markdown: per shape every strategy against dense, then what predictions take alone; where measured."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for entry in run["benchmarks"]:
        kind = (entry["group"] or "").partition(" ")[0]
        if kind in (*KINDS, PREDICTION, DENSE_OPERATOR):
            groups[kind, entry["extra_info"]["shape"]].append(entry)
    strategies = {group: entries for group, entries in groups.items() if group[0] in KINDS}
    predictions = {shape: entries for (kind, shape), entries in groups.items() if kind == PREDICTION}
    if not strategies and not predictions:
        raise BenchError("this file has no strategies: run tests/benchmark/test_strategies.py")
    parts = [_table(*group, entries) for group, entries in strategies.items()]
    for shape, entries in predictions.items():
        dense = _dense(groups["strategies", shape]) or _dense_operator(groups[DENSE_OPERATOR, shape])
        parts.append(_prediction_table(shape, entries, dense))
    described = next(iter((strategies or predictions).values()))
    return "\n\n".join([*parts, _provenance(run, described[0]["extra_info"], bool(strategies))])


def _table(kind: str, shape: str, entries: list[dict[str, Any]]) -> str:
    title = _title(shape, entries[0]["extra_info"]) + KINDS[kind]
    dense = _dense(entries)
    compared = any("relative_l1" in entry["extra_info"] for entry in entries)
    names = [*COLUMNS, LIKENESS] if compared else [*COLUMNS]
    rule = ["---", "---:", "---", *["---:"] * (len(names) - 3)]
    ordered = sorted(entries, key=lambda entry: -_median_s(entry))
    lines = [names, rule, *(_cells(entry, dense)[: len(names)] for entry in ordered)]
    return "\n".join([title, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _title(shape: str, facts: dict[str, Any]) -> str:
    batch, heads, text, frames, rows, columns, head_dim = shape.split("x")
    return (
        f"{facts['tokens']:,} tokens ({text} text + {frames}x{rows}x{columns}), "
        f"batch {batch}, {heads} heads of {head_dim}, {facts['dtype']}"
    )


def _dense(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((entry for entry in entries if _label(entry) == "dense"), None)


def _dense_operator(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((entry for entry in entries if entry["name"].startswith("test_dense[")), None)


def _prediction_table(shape: str, entries: list[dict[str, Any]], dense: dict[str, Any] | None) -> str:
    """Predictions alone, each once, beside the entry of a dense call.

    ``with_dense`` of an entry says how many dense calls were timed with each prediction; they are subtracted.
    """
    lines = [("prediction", "median", "quartiles", "share of a dense call"), ("---", "---:", "---:", "---:")]
    times = []
    for entry in entries:
        name = entry["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
        low, middle, high = _quartiles_s(entry)
        if with_dense := entry["extra_info"].get("with_dense"):
            if dense is None:
                raise BenchError(f"{name} was timed with dense calls: run test_dense into the same file")
            shortest, usual, longest = _quartiles_s(dense)
            low, middle, high = (
                low - with_dense * longest, middle - with_dense * usual, high - with_dense * shortest
            )  # fmt: skip
        times.append((middle, low, high, name))
    for middle, low, high, name in sorted(times):
        share = f"{middle / _median_s(dense):.1%}" if dense else "-"
        lines.append((name, f"{middle * 1e3:.2f} ms", f"{low * 1e3:.2f} to {high * 1e3:.2f}", share))
    title = _title(shape, entries[0]["extra_info"]) + ", what strategies do before their kernel"
    return "\n".join([title, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _cells(entry: dict[str, Any], dense: dict[str, Any] | None) -> list[str]:
    facts, median_s = entry["extra_info"], _median_s(entry)
    ratio = f"{_median_s(dense) / median_s:.2f}x" if dense else "-"
    return [
        f"`{_label(entry)}`",
        f"{facts['density']:.3f}",
        facts["backend"],
        f"{median_s * 1e3:.2f} ms",
        ratio,
        f"{facts['max_error']:.1e}" if "max_error" in facts else "-",
        f"{facts['relative_l1']:.3f}" if "relative_l1" in facts else "-",
    ]


def _median_s(entry: dict[str, Any]) -> float:
    """Of one call, in seconds."""
    return _quartiles_s(entry)[1]


def _quartiles_s(entry: dict[str, Any]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of one call, in seconds."""
    stats, calls = entry["stats"], entry["extra_info"].get("calls", 1)
    return stats["q1"] / calls, stats["median"] / calls, stats["q3"] / calls


def _label(entry: dict[str, Any]) -> str:
    return entry["param"].removeprefix(entry["extra_info"]["shape"] + "-")


def _provenance(run: dict[str, Any], facts: dict[str, Any], of_strategies: bool) -> str:
    commit = facts.get("commit") or run.get("commit_info", {}).get("id", "unknown")
    in_a_row = "steps of one layer in a row" if of_strategies else "calls in a row"
    if with_dense := facts.get("with_dense"):
        in_a_row += f" with {round(with_dense * facts['calls'])} of dense attention, subtracted,"
    calls = f"{facts['calls']} {in_a_row}" if facts.get("calls", 1) > 1 else "One call each"
    versions = f"python {run['machine_info']['python_version']}, torch {facts['torch']}"
    where = f"Measured on {facts['device']}, {versions}, {run['datetime'][:10]}, commit {commit}. {calls} "
    where += f"on {facts.get('inputs', 'random')} inputs"
    if not of_strategies:
        return f"{where}."
    return (
        f"{where}, prediction and reordering included; what depends on the "
        "shape alone (masks) is planned before. The largest error is against float64 attention over the "
        "same mask, checked first; strategies without one mask for the call have none."
    )


def main(argv: list[str] | None = None) -> int:
    """Print the tables of one file; exit code 2 if it cannot be read."""
    return run_command("harness.microbench", argv, _print_tables)


def _print_tables(arguments: list[str], command: str) -> None:
    parser = make_parser("harness.microbench", __doc__)
    parser.add_argument("file", type=Path, help="what nox -s microbench wrote: runs/microbenchmarks.json")
    path = parse_options(parser, arguments).file
    run = read_benchmarks(path)
    try:
        text = tables(run)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BenchError(f"{path} is not of tests/benchmark; nox -s microbench writes one") from None
    print(text)


if __name__ == "__main__":
    sys.exit(main())
