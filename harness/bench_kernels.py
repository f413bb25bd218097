"""``python -m harness.bench_kernels``: every attention kernel at the shapes of video models, in one process.

Nothing is timed before it was compared with attention by its definition. On a CPU a tiny shape shows that
everything runs; its times say nothing about a GPU.

Exit codes: 0 no default backend is wrong, 1 one is, 2 bad input, 130 stopped with Ctrl-C.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from harness.command import DONE, FAILED, make_parser, parse_options, run_command
from harness.environment import provenance, resolve_device
from harness.errors import BenchError
from harness.kernel_cases import POOLED as POOLED_PATTERN
from harness.kernel_cases import SHAPES, Case, make_tensors, with_blocks
from harness.kernel_checks import RIGHT, WRONG, judge, median_seconds
from harness.kernel_operators import (
    BACKWARD,
    BLOCK_SPARSE,
    DENSE,
    DENSE_BACKWARD,
    POOLED,
    Operator,
    all_operators,
)
from harness.kernel_tables import Row, tables
from harness.run_folder import check_writable, utc_now, write_text

SPARSITIES = (0.0, 0.5, 0.75, 0.9)
BACKWARD_SPARSITY = 0.75
BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128))
SLOW = {"cpu": ("reference",), "cuda": ("reference", "torch")}  # left out unless named
BUDGET_S = 0.3
MAX_MINUTES = 30.0
PEERS = ("flash-attn-4", "flash-attn-3", "flash-attn", "spas_sage_attn")


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Args:
        shapes (tuple[str, ...]): keys of ``SHAPES``.
        patterns (tuple[float | str, ...]): sparsities, and ``POOLED``.
        blocks (tuple[tuple[int, int], ...]): mask blocks.
        operators (tuple[Operator, ...]): what to run.
        device (device): where.
        budget_s (float): about how long to time each row.
        deadline (float): value of ``time.monotonic`` after which nothing new starts.
    """

    shapes: tuple[str, ...]
    patterns: tuple[float | str, ...]
    blocks: tuple[tuple[int, int], ...]
    operators: tuple[Operator, ...]
    device: torch.device
    budget_s: float
    deadline: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def measure_shape(name: str, plan: Plan) -> list[Row]:
    """All rows of one shape, with their ratios to the fastest exact dense kernel."""
    rows = []
    for operator, case, pattern, block_size in _calls(name, plan):
        row = measure(operator, case, plan)
        row |= {"shape": name, "block_size": block_size, "pattern": pattern}
        rows.append(row)
        print(_progress(row), flush=True)
    for row in rows:
        gradients = row["family"] in (BACKWARD, DENSE_BACKWARD)
        dense = _fastest(rows, DENSE_BACKWARD if gradients else DENSE)
        row["speedup"] = dense / row["time_ms"] if dense and row["time_ms"] else None
    return rows


def _calls(
    name: str, plan: Plan
) -> Iterator[tuple[Operator, Case, float | str | None, tuple[int, int] | None]]:
    """Operators with their cases, patterns and mask blocks, None for those without a mask.

    After the deadline no more blocks are drawn: the case is the dense one, and nothing will run.
    """
    dense = make_tensors(SHAPES[name], plan.dtype, plan.device)
    yield from ((operator, dense, None, None) for operator in plan.operators if not operator.is_masked)
    for block_size, pattern in product(plan.blocks, plan.patterns):
        operators = [o for o in plan.operators if o.is_masked and _takes(o, pattern)]
        in_time = operators and time.monotonic() < plan.deadline
        case = with_blocks(dense, block_size, pattern, empty_row=False) if in_time else dense
        yield from ((operator, case, pattern, block_size) for operator in operators)


def _takes(operator: Operator, pattern: float | str) -> bool:
    if operator.family == BACKWARD:
        return pattern == BACKWARD_SPARSITY
    return (operator.family == POOLED) == (pattern == POOLED_PATTERN)


def measure(operator: Operator, case: Case, plan: Plan) -> Row:
    """Check an operator in the last head, then time it if it is right."""
    row: Row = {"operator": operator.name, "family": operator.family, "density": case.density}
    row |= {"error": None, "time_ms": None, "tflops": None, "calls": 0, "is_default": False}
    if time.monotonic() >= plan.deadline:
        return row | {"status": "skipped", "reason": "the time limit was reached"}
    batch, heads = case.query.shape[:2]
    verdict = judge(operator, case, [(batch - 1, heads - 1)])
    row |= {"status": verdict.status, "error": verdict.error, "reason": verdict.reason}
    if verdict.status not in (RIGHT, WRONG):
        return row
    row["is_default"] = operator.is_default(case)
    if verdict.status == RIGHT:
        seconds, row["calls"] = median_seconds(operator.prepare(case), plan.device, plan.budget_s)
        row["time_ms"] = 1e3 * seconds
        row["tflops"] = operator.work * case.pairs() * case.query.shape[3] / seconds / 1e12
    return row


def _fastest(rows: Sequence[Row], family: str) -> float | None:
    return min((row["time_ms"] for row in rows if row["family"] == family and row["time_ms"]), default=None)


def _progress(row: Row) -> str:
    block = "x".join(map(str, row["block_size"])) if row["block_size"] else ""
    pattern = "" if row["pattern"] is None else str(row["pattern"])
    found = f"{row['time_ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s" if row["time_ms"] else row["reason"]
    return (
        f"{row['status']:11} {row['shape']} {row['family']:14} {row['operator']:24.24} {block:7} {pattern:6} "
        + found
    )


def _clock_mhz(device: torch.device) -> int | None:
    """Present SM clock, or None where it cannot be read."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.clock_rate(device)
    except (ModuleNotFoundError, RuntimeError):  # needs nvidia-ml-py and the driver's leave
        return None


def _peer_versions() -> dict[str, str]:
    """Versions of those packages of other attention kernels that are installed."""
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()} & set(PEERS)
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def run_benchmark(plan: Plan, commit: str | None, command: str) -> dict[str, Any]:
    """Measure everything; the result is what ``--output`` keeps."""
    run = provenance(plan.device, command) | {
        "created_at": utc_now(),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "shapes": {},
        "rows": [],
    }
    run["versions"] |= _peer_versions()
    if commit:
        run |= {"commit": commit, "dirty": False}
    for name in plan.shapes:
        before = _clock_mhz(plan.device)
        run["rows"] += measure_shape(name, plan)
        run["shapes"][name] = {"size": list(SHAPES[name]), "clock_mhz": [before, _clock_mhz(plan.device)]}
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, see the module."""
    return run_command("harness.bench_kernels", argv, _bench)


def _bench(arguments: list[str], command: str) -> int:
    options = parse_options(_parser(), arguments)
    plan = make_plan(options)
    if options.minutes <= 0:
        raise BenchError(f"--minutes must be above 0, got {options.minutes:g}")
    if options.output and options.output == options.markdown:
        raise BenchError(f"--output and --markdown are one file: {options.output}")
    check_writable(options.output, options.markdown)
    if plan.device.type == "cpu":
        print("note: on a CPU these times show that everything runs, and say nothing about a GPU")
    run = run_benchmark(plan, options.commit, command)
    text = tables(run)
    print("\n" + text)
    if options.output:
        write_text(options.output, json.dumps(run, indent=1) + "\n")
    if options.markdown:
        write_text(options.markdown, text)
    return FAILED if any(row["status"] == WRONG and row["is_default"] for row in run["rows"]) else DONE


def make_plan(options: Namespace) -> Plan:
    """The plan that a command line asks for.

    Raises:
        BenchError: a shape, backend, block size, sparsity or device is not known.
    """
    device = resolve_device(options.device)
    default = ["tiny"] if device.type == "cpu" else [name for name in SHAPES if name != "tiny"]
    shapes = _names(options.shapes, default[:1] if options.quick else default, list(SHAPES), "--shapes")
    operators = all_operators()
    usual = [o.name for o in operators if o.family != BLOCK_SPARSE or o.name not in SLOW[device.type]]
    names = _names(options.backends, usual, [o.name for o in operators], "--backends")
    sparsities: tuple[float, ...] = (BACKWARD_SPARSITY,) if options.quick else SPARSITIES
    if options.sparsity:
        sparsities = tuple(dict.fromkeys(_number(text) for text in options.sparsity.split(",")))
    blocks: tuple[tuple[int, int], ...] = BLOCKS[-1:] if options.quick else BLOCKS
    if options.blocks:
        blocks = tuple(dict.fromkeys(_block_size(text) for text in options.blocks.split(",")))
    return Plan(
        tuple(shapes),
        (*sparsities, POOLED_PATTERN),
        blocks,
        tuple(operator for operator in operators if operator.name in names),
        device,
        BUDGET_S / 6 if options.quick else BUDGET_S,
        time.monotonic() + 60 * options.minutes,
    )


def _names(text: str | None, default: list[str], known: list[str], option: str) -> list[str]:
    chosen = default if text is None else list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [f"'{name}'" for name in sorted(set(chosen) - set(known))]
    if unknown:
        raise BenchError(f"{option}: {', '.join(unknown)} is not among {', '.join(dict.fromkeys(known))}")
    return chosen


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise BenchError(f"--sparsity takes numbers from 0 to below 1, got '{text}'")
    return number


def _block_size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    sides = [int(side) if side.isdigit() else 0 for side in (rows, columns)]
    if any(side == 0 or side % 16 for side in sides):
        raise BenchError(f"--blocks takes sizes such as 128x64, multiples of 16, got '{text}'")
    return sides[0], sides[1]


def _parser() -> ArgumentParser:
    parser = make_parser("harness.bench_kernels", __doc__)
    shapes = f"of {', '.join(SHAPES)}, separated by commas (default: all on a GPU, tiny on a CPU)"
    parser.add_argument("--shapes", type=str, help=shapes)
    sparsities = ",".join(map(str, SPARSITIES))
    parser.add_argument("--sparsity", type=str, help=f"shares of dropped key blocks (default: {sparsities})")
    blocks = ",".join(f"{rows}x{columns}" for rows, columns in BLOCKS)
    parser.add_argument("--blocks", type=str, help=f"mask blocks (default: {blocks})")
    operators = "names of operators, separated by commas (default: all but the slow references)"
    parser.add_argument("--backends", type=str, help=operators)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda[:INDEX]")
    parser.add_argument("--quick", action="store_true", help="one shape, one sparsity, one block size")
    parser.add_argument("--minutes", type=float, default=MAX_MINUTES, help="start nothing new after these")
    parser.add_argument("--commit", type=str, help="commit to record where there is no git history")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
