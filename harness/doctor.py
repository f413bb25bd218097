"""``python -m harness.doctor``: is every attention kernel right on this machine?

Each backend gets small random tensors of a ragged length, with an empty row where it takes a block mask, and
is compared with attention by its definition. On a GPU the checks run in a process of their own, so that a
kernel that hangs or crashes is a line of the report. Of what is unavailable for one reason only the first is
printed. Times are of these small tensors and mostly launches: they say that a kernel runs, not how fast it is
(python -m harness.bench_kernels does).

Exit codes: 0 every default backend is right or unavailable, 1 one is wrong or any kernel hangs or crashes its
process, 2 bad input, 130 stopped with Ctrl-C.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from harness.command import (
    DONE,
    FAILED,
    make_parser,
    parse_options,
    run_command,
    unswallowed_interrupts,
)
from harness.environment import device_name, package_versions, resolve_device
from harness.errors import BenchError
from harness.isolation import run_isolated
from harness.kernel_cases import POOLED as POOLED_PATTERN
from harness.kernel_cases import Case, Shape, make_tensors, with_blocks
from harness.kernel_checks import RIGHT, UNAVAILABLE, WRONG, judge, median_seconds
from harness.kernel_operators import POOLED, Operator, all_operators
from harness.run_folder import check_writable, write_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128))
SIZES = {"cpu": Shape(1, 2, 200, 64), "cuda": Shape(1, 8, 3_900, 64)}  # ragged for every block and tile
COMPILED = "flex"  # by torch.compile, seconds for every setting: one block size is checked
SPARSITY = 0.5
TIMING_S = 0.02


@dataclass(frozen=True)
class Check:
    """One operator with one setting.

    Args:
        operator (str): name of the operator.
        family (str): its family.
        dtype (str): a key of ``DTYPES``.
        head_dim (int): head dimension.
        block_size (tuple[int, int], Optional): mask block; None for operators without a mask.
    """

    operator: str
    family: str
    dtype: str
    head_dim: int
    block_size: tuple[int, int] | None

    def __str__(self) -> str:
        block = "x".join(map(str, self.block_size)) if self.block_size else ""
        operator = textwrap.shorten(self.operator, 24, placeholder="...")
        return f"{self.family:14} {operator:24} {self.dtype} D{self.head_dim:<3} {block:7}"


@dataclass(frozen=True)
class Finding:
    """Result of one check; times are of small tensors and say that it runs, not how fast it is."""

    check: Check
    status: str
    is_default: bool = False
    error: float | None = None
    tolerance: float | None = None
    time_ms: float | None = None
    tflops: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        line = f"{self.status:11} {self.check}"
        if self.error is not None:
            line += f" error {self.error:.1e} of {self.tolerance:.1e}"
        if self.time_ms is not None:
            line += f"  {self.time_ms:8.3f} ms" + (f" {self.tflops:6.1f} TFLOP/s" if self.tflops else "")
        return line + ("  (default)" if self.is_default else "") + (f"  {self.reason}" if self.reason else "")


def make_checks(quick: bool, names: str | None = None) -> list[Check]:
    """The checks of a run.

    Args:
        quick (bool): one dtype, head dimension and block size each.
        names (str, Optional): operators to check, separated by commas. Default: all

    Raises:
        BenchError: there is no operator of such a name.
    """
    known = dict.fromkeys(operator.name for operator in all_operators())
    chosen = known if names is None else dict.fromkeys(name.strip() for name in names.split(","))
    if unknown := [f"'{name}'" for name in sorted(chosen.keys() - known.keys())]:
        raise BenchError(f"--backends: {', '.join(unknown)} is not among {', '.join(known)}")
    dtypes = ("bf16",) if quick else tuple(DTYPES)
    head_dims = (64,) if quick else (64, 128)
    blocks = (BLOCKS[-1],) if quick else BLOCKS
    return [
        Check(operator.name, operator.family, dtype, head_dim, block)
        for operator in all_operators()
        if operator.name in chosen
        for dtype, head_dim in product(dtypes, head_dims)
        for block in _blocks_of(operator, blocks)
    ]


def _blocks_of(operator: Operator, blocks: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int] | None, ...]:
    if not operator.is_masked:
        return (None,)
    return blocks[-1:] if operator.name == COMPILED else blocks


def run_check(check: Check, device: str) -> Finding:
    """Make the case of a check, judge its operator and time it if it is right."""
    operator = next(o for o in all_operators() if (o.name, o.family) == (check.operator, check.family))
    where = torch.device(device)
    case = _make_case(check, where)
    batch, heads = case.query.shape[:2]
    verdict = judge(operator, case, [(b, h) for b in range(batch) for h in range(heads)])
    if where.type == "cuda":
        torch.cuda.synchronize(where)  # raises if the check broke this process's GPU context
    facts: dict[str, Any] = {
        "is_default": verdict.status != UNAVAILABLE and operator.is_default(case),
        "error": verdict.error,
        "tolerance": operator.tolerance[case.query.dtype],
        "reason": verdict.reason,
    }
    if verdict.status == RIGHT:
        facts |= _times(operator, case, where)
    return Finding(check, verdict.status, **facts)


def _make_case(check: Check, device: torch.device) -> Case:
    case = make_tensors(SIZES[device.type]._replace(head_dim=check.head_dim), DTYPES[check.dtype], device)
    if check.block_size is None:
        return case
    pattern = POOLED_PATTERN if check.family == POOLED else SPARSITY
    return with_blocks(case, check.block_size, pattern, empty_row=True)


def _times(operator: Operator, case: Case, device: torch.device) -> dict[str, float]:
    seconds, _ = median_seconds(operator.prepare(case), device, TIMING_S, most=5)
    operations = operator.work * case.pairs() * case.query.shape[3]
    return {"time_ms": 1e3 * seconds, "tflops": operations / seconds / 1e12}


def examine(checks: Sequence[Check], device: torch.device, timeout_s: float) -> Iterator[Finding]:
    """Findings in the order of the checks; on a GPU from a process that is replaced when it hangs."""
    if device.type == "cpu":
        yield from (run_check(check, "cpu") for check in checks)
        return
    for check, result in run_isolated(run_check, checks, str(device), timeout_s):
        yield result if isinstance(result, Finding) else Finding(check, WRONG, True, reason=result)


def report(findings: Iterator[Finding], go_on: Callable[[], None]) -> list[Finding]:
    """Print one line per finding; of those that are unavailable for one reason only the first."""
    kept, told = [], set()
    for finding in findings:
        go_on()
        kept.append(finding)
        cause = (finding.check.operator, finding.check.family, finding.reason)
        if finding.status != UNAVAILABLE or cause not in told:
            print(finding, flush=True)
        if finding.status == UNAVAILABLE:
            told.add(cause)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, see the module."""
    return run_command("harness.doctor", argv, _examine_machine)


def _examine_machine(arguments: list[str], command: str) -> int:
    parser = make_parser("harness.doctor", __doc__)
    parser.add_argument("--quick", action="store_true", help="one dtype, head dimension and block size each")
    parser.add_argument("--backends", type=str, help="names of operators, separated by commas (default: all)")
    parser.add_argument("--json", type=Path, help="file for all findings")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per check on a GPU")
    parser.add_argument("--device", type=str, help="cpu or cuda[:INDEX] (default: the CPU and every GPU)")
    options = parse_options(parser, arguments)
    devices = [resolve_device(options.device)] if options.device else _all_devices()
    checks = make_checks(options.quick, options.backends)
    if options.timeout <= 0:
        raise BenchError(f"--timeout must be above 0, got {options.timeout:g}")
    check_writable(options.json)
    record: dict[str, Any] = {"versions": package_versions(), "devices": {}}
    broken = []
    for device in devices:
        print(f"{device}: {device_name(device)}")
        with unswallowed_interrupts() as go_on:
            findings = report(examine(checks, device, options.timeout), go_on)
        record["devices"][str(device)] = {
            "name": device_name(device),
            "findings": [asdict(finding) for finding in findings],
        }
        broken += [finding for finding in findings if finding.status == WRONG and finding.is_default]
        print(_summary(findings))
    if options.json:
        write_text(options.json, json.dumps(record, indent=1) + "\n")
    return FAILED if broken else DONE


def _all_devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _summary(findings: Sequence[Finding]) -> str:
    counts = {status: sum(f.status == status for f in findings) for status in (RIGHT, WRONG, UNAVAILABLE)}
    broken = sum(f.status == WRONG and f.is_default for f in findings)
    text = ", ".join(f"{count} {status}" for status, count in counts.items())
    if broken:
        return f"{text}; {broken} default backend checks are WRONG"
    checked = any(f.is_default for f in findings)
    return f"{text}; " + ("every default is right" if checked else "no default was among them")


if __name__ == "__main__":
    sys.exit(main())
