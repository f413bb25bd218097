"""``python -m harness.kernel_tables FILE``: Markdown tables of a kernel benchmark, from its JSON."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.command import make_parser, parse_options, run_command
from harness.errors import BenchError
from harness.kernel_cases import POOLED as POOLED_PATTERN
from harness.kernel_operators import (
    BACKWARD,
    BLOCK_SPARSE,
    DENSE,
    DENSE_BACKWARD,
    POOLED,
    PREPARATION,
    QUANTIZED,
)

Row = dict[str, Any]
MASKED = (BLOCK_SPARSE, QUANTIZED, POOLED, BACKWARD)


def read_benchmark(path: Path) -> dict[str, Any]:
    """The JSON file of ``python -m harness.bench_kernels --output``.

    Raises:
        BenchError: no such file, or not such a file.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not (run["rows"] and run["shapes"] and run["device"]):
            raise ValueError("nothing was measured")
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BenchError(f"{path} is not a file of python -m harness.bench_kernels --output") from None
    return run


def tables(run: dict[str, Any]) -> str:
    """Markdown: tables per shape, what was unavailable, and where it was measured."""
    parts = [_shape_tables(name, facts, run["rows"]) for name, facts in run["shapes"].items()]
    return "\n\n".join([*parts, *_absences(run["rows"]), _provenance(run)]) + "\n"


def _shape_tables(name: str, facts: dict[str, Any], all_rows: Sequence[Row]) -> str:
    rows = [row for row in all_rows if row["shape"] == name and row["status"] in ("right", "wrong")]
    batch, heads, tokens, head_dim = facts["size"]
    clocks = ""
    if facts.get("clock_mhz") and all(facts["clock_mhz"]):
        clocks = ", SM clock {} MHz before and {} MHz after".format(*facts["clock_mhz"])
    title = f"**{name}**: batch {batch}, {heads} heads, {tokens:,} tokens, head dimension {head_dim}{clocks}"
    plain = [row for row in rows if row["block_size"] is None]
    sections = [
        _table(("dense", "median", "TFLOP/s", "error"), _of(plain, DENSE, QUANTIZED), _plain_cells),
        _table(("gradients, dense", "median", "TFLOP/s", "error"), _of(plain, DENSE_BACKWARD), _plain_cells),
        _table(
            ("before a kernel", "median", "share of dense", "error"), _of(plain, PREPARATION), _share_cells
        ),
        _sparse_table([row for row in rows if row["block_size"] and row["pattern"] != POOLED_PATTERN]),
        _table(
            ("pooled", "blocks", "density", "median", "TFLOP/s", "against dense"),
            _of(rows, POOLED),
            _pooled_cells,
        ),
    ]
    return "\n\n".join([title, *(section for section in sections if section)])


def _of(rows: Sequence[Row], *families: str) -> list[Row]:
    chosen = [row for row in rows if row["family"] in families]
    return sorted(chosen, key=lambda row: row["time_ms"] or float("inf"))


def _table(header: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain_cells(row: Row) -> list[str]:
    return [f"`{row['operator']}`", _time(row), _rate(row), _error(row)]


def _share_cells(row: Row) -> list[str]:
    share = f"{1 / row['speedup']:.1%}" if row["speedup"] else "-"
    return [row["operator"], _time(row), share, _error(row)]


def _pooled_cells(row: Row) -> list[str]:
    ratio = f"{row['speedup']:.2f}x" if row["speedup"] else "-"
    return [f"`{row['operator']}`", _block(row), f"{row['density']:.3f}", _time(row), _rate(row), ratio]


def _sparse_table(rows: Sequence[Row]) -> str:
    """One line per operator and block size, one column per sparsity: median, TFLOP/s, ratio to dense."""
    patterns = sorted({row["pattern"] for row in rows})
    lines: dict[tuple[str, str, str], dict[float, Row]] = {}
    for row in rows:
        lines.setdefault((row["family"], row["operator"], _block(row)), {})[row["pattern"]] = row
    header = ("family", "operator", "blocks", *(f"sparsity {pattern:g}" for pattern in patterns))
    body = [
        (family, f"`{operator}`", block, *(_sparse_cell(found.get(pattern)) for pattern in patterns))
        for (family, operator, block), found in lines.items()
    ]
    if not body:
        return ""
    table = [header, ("---", "---", "---", *["---:"] * len(patterns)), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _sparse_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["status"] == "wrong":
        return _time(row)
    ratio = f", {row['speedup']:.2f}x" if row["speedup"] else ""
    return f"{_time(row)}, {_rate(row)}{ratio}"


def _block(row: Row) -> str:
    return "x".join(map(str, row["block_size"]))


def _time(row: Row) -> str:
    return f"{row['time_ms']:.2f} ms" if row["status"] == "right" else "wrong"


def _rate(row: Row) -> str:
    return f"{row['tflops']:.0f}" if row["tflops"] else "-"


def _error(row: Row) -> str:
    return "-" if row["error"] is None else f"{row['error']:.1e}"


def _absences(rows: Sequence[Row]) -> list[str]:
    """One line per reason; of what was skipped also where, since its operator may stand in the tables."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] == "skipped":
            line = f"- {row['shape']}: skipped, {row['reason']}"
            reasons.setdefault(line, {})[_place(row)] = None
        elif row["status"] != "right":
            reasons[f"- {row['family']} `{row['operator']}`: {row['status']}, {row['reason']}"] = {}
    lines = [f"{line}: {', '.join(places)}" if places else line for line, places in reasons.items()]
    return ["Not in the tables, or wrong:\n\n" + "\n".join(lines)] if lines else []


def _place(row: Row) -> str:
    if row["block_size"] is None:
        return f"{row['family']} `{row['operator']}`"
    pattern = row["pattern"] if isinstance(row["pattern"], str) else f"{row['pattern']:g}"
    return f"{row['family']} `{row['operator']}` {_block(row)} at {pattern}"


def _provenance(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    return (
        f"Measured on {run['device']}, {run['created_at'][:10]}, {run['dtype']}; {versions}; commit "
        f"{run['commit'] or 'unknown'}{' with uncommitted changes' if run['dirty'] else ''}; "
        f"`{run['command']}`. Medians of one process, random inputs, random blocks of equal number per row. "
        "TFLOP/s count the executed pairs (4 operations per pair and head dimension, gradients 10). Cells of "
        "a sparsity: median, TFLOP/s, ratio to the fastest exact dense kernel of this run (gradients: to the "
        "fastest dense gradients). 8-bit times include quantisation. Every result was first compared with "
        "attention by its definition in one head; the error is relative."
    )


def main(argv: list[str] | None = None) -> int:
    """Print the tables of one file; exit code 2 if it cannot be read."""
    return run_command("harness.kernel_tables", argv, _print_tables)


def _print_tables(arguments: list[str], command: str) -> None:
    parser = make_parser("harness.kernel_tables", __doc__)
    parser.add_argument("file", type=Path, help="what python -m harness.bench_kernels --output wrote")
    path = parse_options(parser, arguments).file
    run = read_benchmark(path)
    try:
        text = tables(run)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BenchError(f"{path} is not a file of python -m harness.bench_kernels --output") from None
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
