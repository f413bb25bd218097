"""``python -m harness.compose``: give every head of a model to the strategy that serves it best.

Runs candidates on the attention of dense videos, measures how much errors in each range of steps matter to
the finished video, and writes for every budget the cheapest assignment as BUDGET.json, for
``combined:assignment=FILE``. Measurements stay in the folder: a stopped call goes on where it stood, other
budgets or another cost need no new ones, and candidates or prompts can be added.

Exit codes: 0 the assignments are written, 2 bad input or no way to go on, 130 stopped with Ctrl-C.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from core.assignment import Candidate, HeadAssignment, require_heads_alike
from core.parameters import StrategyParameters
from harness.command import make_parser, parse_options, require_at_least, run_command
from harness.composing import cheapest_choice, chosen, range_starts
from harness.composition_runs import Measured, measure, try_out
from harness.environment import provenance
from harness.errors import BenchError
from harness.jobs import DENSE, parse_spec
from harness.model_options import ModelOptions, add_model_options, read_model_options
from harness.models import LoadedModel
from harness.run_folder import locked, utc_now

JOURNAL = "measurements.jsonl"


@dataclass(frozen=True)
class ComposeConfig:
    """Checked settings of one call.

    Args:
        candidates (list[Candidate]): what heads may be given to, dense first.
        model (ModelOptions): which model, and how.
        prompts (list[str]): prompts to measure on.
        held_out (list[str]): prompts to try the assignments on.
        budgets (list[float]): bounds on the predicted relative L2 error of the final latents.
        cost (str): what to make small, ``"time"`` or ``"density"``.
        step_ranges (int): ranges that the schedule is divided into.
        output (Path): folder to write to.
    """

    candidates: list[Candidate]
    model: ModelOptions
    prompts: list[str]
    held_out: list[str]
    budgets: list[float]
    cost: Literal["time", "density"]
    step_ranges: int
    output: Path


def main(argv: list[str] | None = None) -> int:
    """Compose.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command(
        "harness.compose", argv, _compose, stopped="finished measurements are kept, start again to go on"
    )


def _compose(arguments: list[str], command: str) -> None:
    config = parse_arguments(arguments)
    with _folder_held(config.output):
        compose(config, command)


def parse_arguments(arguments: list[str]) -> ComposeConfig:
    """Read the command line.

    Raises:
        BenchError: an option is unknown or has a wrong value.
        SparseAttnError: a candidate does not exist or has a wrong parameter.
    """
    parser = make_parser("harness.compose", __doc__)
    parser.add_argument(
        "--candidates",
        type=str,
        nargs="+",
        metavar="SPEC",
        required=True,
        help="NAME, NAME:preset=PRESET or NAME:key=value,key=value; dense is always one. The first serves "
        "to find out how much errors matter in each range of steps: take a middling one. Dense layers "
        "and steps of a candidate are not used: that is what the assignment decides",
    )
    add_model_options(parser)
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.05, 0.1, 0.2],
        help="bounds on the predicted relative L2 error of the final latents",
    )
    parser.add_argument(
        "--cost",
        type=Literal["time", "density"],
        default="time",
        help="what to make small: time measured on this device, or executed density",
    )
    parser.add_argument("--prompts", type=int, default=1, help="prompts to measure on")
    parser.add_argument("--held-out", type=int, default=2, help="prompts after these to try the result on")
    parser.add_argument("--step-ranges", type=int, default=8, help="ranges of steps with an own choice")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    options = parse_options(parser, arguments)
    require_at_least(options, 1, "prompts", "step_ranges")
    require_at_least(options, 0, "held_out")
    for budget in options.budgets:
        if not budget > 0:
            raise BenchError(f"--budgets must be above 0, got {budget}")
    model = read_model_options(options)
    prompts = model.first_prompts(options.prompts + options.held_out, "--prompts and --held-out")
    return ComposeConfig(
        candidates=_read_candidates(options.candidates),
        model=model,
        prompts=prompts[options.held_out :],
        held_out=prompts[: options.held_out],
        budgets=list(dict.fromkeys(options.budgets)),
        cost=options.cost,
        step_ranges=options.step_ranges,
        output=options.output,
    )


def _read_candidates(texts: Sequence[str]) -> list[Candidate]:
    candidates: dict[str, Candidate] = {}
    for text in (DENSE, *texts):
        spec = parse_spec(text)
        if spec.parameters.get("assignment") is not None:
            raise BenchError(f"--candidates: {spec.label} is an assignment itself; take plain strategies")
        require_heads_alike(spec.create(), f"--candidates: {spec.label}")
        own = {
            key: value for key, value in spec.parameters.items() if key not in StrategyParameters.model_fields
        }
        candidates[spec.label] = Candidate(label=spec.label, strategy=spec.name, parameters=own)
    if len(candidates) == 1:
        raise BenchError("--candidates names dense alone; give one more at least")
    return list(candidates.values())


def _folder_held(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Two calls at once would mix their measurements."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot write to output folder {folder}: {error.strerror}") from None
    return locked(folder / ".lock", f"another composition is running in {folder}")


def compose(config: ComposeConfig, command: str) -> list[HeadAssignment]:
    """Measure, choose, write the files, and try them on the held-out prompts."""
    started = time.perf_counter()
    model = config.model.load()
    starts = range_starts(model.settings.steps, config.step_ranges)
    measured = measure(model, config.candidates, config.prompts, starts, config.output / JOURNAL)
    made = provenance(model.device, command) | {"dtype": model.dtype, "date": utc_now()}
    assignments = [_assign(config, model, starts, measured, budget, made) for budget in config.budgets]
    paths = [config.output / f"{budget:g}.json" for budget in config.budgets]
    for assignment, path in zip(assignments, paths, strict=True):
        assignment.save(path)
    tried: list[list[dict[str, Any]]] = [[] for _ in paths]
    for prompt in config.held_out:
        for results, result in zip(tried, try_out(model, prompt, paths), strict=True):
            results.append(result)
    seconds = round(time.perf_counter() - started, 1)
    finished = []
    for assignment, path, results in zip(assignments, paths, tried, strict=True):
        change = {"held_out": results, "made": assignment.made | {"seconds": seconds}}
        finished.append(assignment.model_copy(update=change))
        finished[-1].save(path)
        _print_summary(finished[-1], path)
    return finished


def _assign(
    config: ComposeConfig,
    model: LoadedModel,
    starts: list[int],
    measured: Measured,
    budget: float,
    made: dict[str, Any],
) -> HeadAssignment:
    """The cheapest assignment of one budget, without the candidates that nobody chose."""
    tables = measured.tables
    times = (tables.times_ms / tables.times_ms[0]).expand_as(tables.densities)
    costs = times if config.cost == "time" else tables.densities
    choices = cheapest_choice(costs, measured.damages, budget)
    used = choices.unique()
    cost, errors = chosen(costs, choices), chosen(tables.errors, choices)
    return HeadAssignment(
        candidates=[
            config.candidates[index].model_copy(
                update={
                    "time_ms": round(float(tables.times_ms[index]), 4),
                    "density": round(float(tables.densities[..., index].mean()), 4),
                    "whole_error": round(float(measured.whole[index]) ** 0.5, 5),
                }
            )
            for index in used.tolist()
        ],
        first_steps=starts,
        num_steps=model.settings.steps,
        choices=torch.searchsorted(used, choices).tolist(),
        model=model.name,
        denoisers=model.records,
        layout=measured.facts["layout"],
        head_dim=measured.facts["head_dim"],
        budget=budget,
        cost=config.cost,
        costs=_rounded(cost),
        errors=_rounded(errors),
        predicted={
            "error": round(float(chosen(measured.damages, choices).sum().sqrt()), 5),
            "cost": round(float(cost.mean()), 4),
            "attention_error": round(float(errors.mean()), 5),
        },
        prompts=config.prompts,
        made=made,
    )


def _rounded(table: torch.Tensor) -> list[list[list[float]]]:
    return [[[round(cell, 4) for cell in row] for row in rows] for rows in table.tolist()]


def _print_summary(assignment: HeadAssignment, path: Path) -> None:
    said = assignment.predicted
    print(
        f"{path}: {assignment.cost} {said['cost']:.3f} of dense; predicted error of the latents "
        f"{said['error']:.3f}, mean error of attention {said['attention_error']:.3f}"
    )
    for one in assignment.held_out:
        print(
            f"  held out: density {one['density']:.3f}, {one['psnr_db']:.2f} dB, error of the latents "
            f"{one['error']:.3f}, of attention {one['attention_error']:.3f}  {one['prompt']}"
        )
    if [one.strategy for one in assignment.candidates] == [DENSE]:
        print("  every head is dense: within this budget no candidate is cheaper")
    print(f"  use it with combined:assignment={path}")


if __name__ == "__main__":
    sys.exit(main())
