"""``python -m harness.call_errors``: error of strategies in single calls, on what a model gives them.

    python -m harness.call_errors --strategies sparge:density=0.3 combined:sparse=dense,similarity=0.9

While videos are generated with dense attention, every strategy is run on the same queries, keys and values at
a few denoising steps, its dense warm-up left out. A head whose output is exact is counted, but is not part of
the mean error: so the error of one class of heads shows where the others run dense.

Exit codes: 0 done, 2 bad input, 130 stopped with Ctrl-C.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import AttentionStrategy
from harness.command import make_parser, parse_options, require_at_least, run_command
from harness.environment import provenance
from harness.generate import denoise
from harness.jobs import parse_spec
from harness.model_options import ModelOptions, add_model_options, read_model_options
from harness.run_folder import check_writable, utc_now, write_text
from harness.tuning import ProbeStrategy, sampled_steps

SEED = 0
EXACT = 1e-5  # relative L1 error that rounding alone explains in fp32; 16 bits round by more


@dataclass(frozen=True)
class CallErrorsConfig:
    """Checked settings of one call.

    Args:
        labels (list[str]): specs as given.
        strategies (list[AttentionStrategy]): what they name.
        model (ModelOptions): which model, and how.
        prompts (list[str]): prompts to generate.
        steps_measured (int): denoising steps to look at per prompt.
        output (Path, Optional): JSON file to write.
        markdown (Path, Optional): Markdown file to write.
    """

    labels: list[str]
    strategies: list[AttentionStrategy]
    model: ModelOptions
    prompts: list[str]
    steps_measured: int
    output: Path | None
    markdown: Path | None


def parse_arguments(arguments: list[str]) -> CallErrorsConfig:
    """Read the command line.

    Raises:
        BenchError: an option has a wrong value.
        SparseAttnError: a strategy does not exist or a parameter is wrong.
    """
    parser = make_parser("harness.call_errors", __doc__)
    parser.add_argument("--strategies", type=str, nargs="+", required=True, help="NAME or NAME:key=value,...")
    add_model_options(parser)
    parser.add_argument("--prompts", type=int, default=1, help="the first so many of the prompts file")
    parser.add_argument("--steps-measured", type=int, default=3, help="denoising steps to look at per prompt")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write")
    options = parse_options(parser, arguments)
    require_at_least(options, 1, "prompts", "steps_measured")
    model = read_model_options(options)
    return CallErrorsConfig(
        labels=options.strategies,
        strategies=[parse_spec(text).create() for text in options.strategies],
        model=model,
        prompts=model.first_prompts(options.prompts, "--prompts"),
        steps_measured=options.steps_measured,
        output=options.output,
        markdown=options.markdown,
    )


def measure(config: CallErrorsConfig, command: str) -> dict[str, Any]:
    """Errors of every strategy over all measured calls; the result is what ``--output`` keeps.

    Raises:
        BenchError: the model cannot be loaded.
    """
    model = config.model.load()
    steps = sampled_steps(0, model.settings.steps, config.steps_measured)
    probe = ProbeStrategy(config.strategies, steps)
    for prompt in config.prompts:
        denoise(model, probe, prompt, SEED)
    return provenance(model.device, command) | {
        "created_at": utc_now(),
        "model": model.name,
        "dtype": model.dtype,
        "prompts": config.prompts,
        "steps": steps,
        "num_steps": model.settings.steps,
        "rows": _rows(config.labels, probe),
    }


def _rows(labels: Sequence[str], probe: ProbeStrategy) -> list[dict[str, Any]]:
    errors = torch.tensor([entry.errors for entry in probe.measurements()])  # calls x strategies x heads
    rows = []
    for label, own, density in zip(labels, errors.unbind(1), probe.mean_densities(), strict=True):
        inexact = own[own > EXACT]
        rows.append(
            {
                "strategy": label,
                "density": round(density, 5),
                "inexact": round(len(inexact) / own.numel(), 5),
                "mean": round(float(inexact.mean()), 5) if len(inexact) else 0.0,
                "worst": round(float(own.max()), 5),
            }
        )
    return rows


def table(run: dict[str, Any]) -> str:
    """Markdown table, and where it was measured."""
    lines = [
        "| strategy | density | heads that are not exact | their relative L1 error, mean | largest |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in run["rows"]:
        figures = f"{row['density']:.3f} | {row['inexact']:.1%} | {row['mean']:.3f} | {row['worst']:.3f}"
        lines.append(f"| `{row['strategy']}` | {figures} |")
    return "\n".join(lines) + (
        f"\n\nModel {run['model']}, {run['dtype']}, steps {run['steps']} of {run['num_steps']}, all layers; "
        f"prompts: {'; '.join(run['prompts'])}. {run['device']}, torch {run['versions']['torch']}, "
        f"{run['created_at'][:10]}, commit {(run['commit'] or 'unknown')[:12]}; `{run['command']}`\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command("harness.call_errors", argv, _call_errors)


def _call_errors(arguments: list[str], command: str) -> None:
    config = parse_arguments(arguments)
    check_writable(config.output, config.markdown)
    run = measure(config, command)
    text = table(run)
    print(text, end="")
    if config.output:
        write_text(config.output, json.dumps(run, indent=1) + "\n")
    if config.markdown:
        write_text(config.markdown, text)


if __name__ == "__main__":
    sys.exit(main())
