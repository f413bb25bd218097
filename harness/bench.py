"""``python -m harness.bench``: every strategy over the same prompts and seeds, side by side.

Exit codes: 0 all jobs finished, 1 a job failed (its row says why), 2 bad input or no way to go on,
130 stopped with Ctrl-C.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import available_strategies
from harness import metrics
from harness.command import DONE, FAILED, run_command
from harness.config import BenchConfig, parse_arguments
from harness.environment import PACKAGE, provenance, resolve_device
from harness.jobs import Job, StrategySpec, make_jobs, presets_of, resolve_specs
from harness.models import DEMO, LoadedModel, check_request, load_model, preset_names
from harness.notices import run_notices
from harness.results import read_rows, read_run
from harness.run_folder import FIXED, RunFolder, utc_now
from harness.runner import Runner
from harness.tables import provenance_line, summarise, to_markdown


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command(
        "harness.bench", argv, _bench, stopped="every finished job is kept, start again to go on"
    )


def _bench(arguments: list[str], command: str) -> int:
    config = parse_arguments(arguments)
    if config.list_strategies:
        list_strategies()
        return DONE
    return run_benchmark(config, command)


def list_strategies() -> None:
    """Print every strategy with its state, summary and presets."""
    for entry in available_strategies():
        print(f"{entry.name:16} {entry.status if not entry.available else 'available: ' + entry.summary}")
        for preset in presets_of(entry.name):
            print(f"{'':16}   preset={preset.name}: {preset.description or preset.parameters}")


def run_benchmark(config: BenchConfig, command: str) -> int:
    """Run all unfinished jobs, print the table and build the page.

    Raises:
        BenchError: bad input, or the run cannot go on.
    """
    device = resolve_device(config.device)
    check_request(config.model, config.requested)
    specs, notes = resolve_specs(config.strategies, preset_names(config.model), device.type)
    folder = RunFolder(config.output)
    with folder.locked():
        for note in notes + _prompt_warnings(config):
            print(f"note: {note}")
        model = load_model(config.model, config.requested, device, config.dtype, config.low_memory)
        run = _run_record(config, model, specs, command)
        for remark in folder.open(run, config.repair):
            print(f"note: {remark}")
        jobs = _all_jobs(config, specs, run)
        environment = {name: run[name] for name in ("device", "versions", "commit")}
        runner = Runner(model, folder, jobs, environment)
        if runner.finished_before:
            print(
                f"note: {runner.finished_before} of {len(jobs)} jobs are finished already and do not run "
                "again; to measure anew choose another --output"
            )
        failed = runner.run()
        _finish(config, folder.path, failed)
    return FAILED if failed else DONE


def _run_record(
    config: BenchConfig, model: LoadedModel, specs: Sequence[StrategySpec], command: str
) -> dict[str, Any]:
    lpips_problem = metrics.lpips_problem()
    return provenance(model.device, command) | {
        "model": model.name,
        "size": model.settings.size,
        "steps": model.settings.steps,
        "guidance_scale": model.settings.guidance_scale,
        "fps": model.settings.fps,
        "dtype": model.dtype,
        "strategies": [spec.label for spec in specs],
        "providers": {spec.label: spec.provider for spec in specs},
        "prompts": config.prompts,
        "seeds": config.seeds,
        "unavailable_metrics": {"lpips": lpips_problem} if lpips_problem else {},
        "config": config.dump,
        "created_at": utc_now(),
    }


def _all_jobs(config: BenchConfig, specs: Sequence[StrategySpec], run: dict[str, Any]) -> list[Job]:
    identity = {name: run[name] for name in FIXED if name != "versions"}
    identity["version"] = run["versions"][PACKAGE]
    return make_jobs(specs, config.prompts, config.seeds, identity)


def _prompt_warnings(config: BenchConfig) -> list[str]:
    if config.model != DEMO:
        return []
    from harness.demo_model import unknown_words

    strange = {prompt: unknown_words(prompt) for prompt in config.prompts}
    return [
        f"the demo model does not know {', '.join(words)} in '{prompt}'; expect something else"
        for prompt, words in strange.items()
        if words
    ]


def _finish(config: BenchConfig, run_dir: Path, failed: int) -> None:
    rows = read_rows(run_dir / "results.jsonl")
    print()
    run = read_run(run_dir)
    print(to_markdown(summarise(rows), provenance_line(run, rows)))
    for notice in run_notices(run, rows):
        print(f"note: {notice}")
    if failed:
        print(f"{failed} job(s) failed; their rows and {run_dir / 'errors.log'} say why")
    if config.gallery and any(row.ok for row in rows):
        from harness.gallery import build

        print(f"page: {build(run_dir, run_dir / 'gallery')}")


if __name__ == "__main__":
    sys.exit(main())
