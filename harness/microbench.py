"""``python -m harness.microbench FILE``: table of a microbenchmark run, from pytest-benchmark's JSON."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness.errors import BenchError

HEADER = (
    "| strategy | density | backend | median | against dense | largest error |\n"
    "| --- | ---: | --- | ---: | ---: | ---: |"
)


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
    """Markdown: one table per shape with every strategy against dense, and where it was measured."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in run["benchmarks"]:
        if entry["group"].startswith("strategies "):
            groups[entry["extra_info"]["shape"]].append(entry)
    if not groups:
        raise BenchError("this file has no strategies: run tests/benchmark/test_strategies.py")
    return "\n\n".join([*(_table(shape, entries) for shape, entries in groups.items()), _provenance(run)])


def _table(shape: str, entries: list[dict[str, Any]]) -> str:
    batch, heads, text, frames, rows, columns, head_dim = shape.split("x")
    first = entries[0]["extra_info"]
    title = (
        f"{first['tokens']:,} tokens ({text} text + {frames}x{rows}x{columns}), "
        f"batch {batch}, {heads} heads of {head_dim}, {first['dtype']}"
    )
    dense = next((entry["stats"]["median"] for entry in entries if _label(entry) == "dense"), None)
    lines = [_line(entry, dense) for entry in sorted(entries, key=lambda entry: -entry["stats"]["median"])]
    return "\n".join([title, "", HEADER, *lines])


def _line(entry: dict[str, Any], dense_s: float | None) -> str:
    facts, median_s = entry["extra_info"], entry["stats"]["median"]
    ratio = f"{dense_s / median_s:.2f}x" if dense_s else "-"
    cells = (
        f"`{_label(entry)}`",
        f"{facts['density']:.3f}",
        facts["backend"],
        f"{median_s * 1e3:.2f} ms",
        ratio,
        f"{facts['max_error']:.1e}" if "max_error" in facts else "-",
    )
    return "| " + " | ".join(cells) + " |"


def _label(entry: dict[str, Any]) -> str:
    return entry["param"].removeprefix(entry["extra_info"]["shape"] + "-")


def _provenance(run: dict[str, Any]) -> str:
    facts = run["benchmarks"][0]["extra_info"]
    commit = run.get("commit_info", {}).get("id", "unknown")
    versions = f"python {run['machine_info']['python_version']}, torch {facts['torch']}"
    return (
        f"Measured on {facts['device']}, {versions}, {run['datetime'][:10]}, commit {commit}. One call each "
        "on random inputs, prediction and reordering included; what depends on the shape alone (masks) "
        "is planned before. The largest error is against float64 attention over the same mask, checked first."
    )


def main(argv: list[str] | None = None) -> int:
    """Print the tables of one file; exit code 2 if it cannot be read."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if len(arguments) != 1:
            raise BenchError("expected one file: python -m harness.microbench runs/microbenchmarks.json")
        print(tables(read_benchmarks(Path(arguments[0]))))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
