"""``python -m harness.tune``: find a strategy's setting for every layer and head under an error bound.

Exit codes: 0 the calibration is written, 2 bad input or no way to go on, 130 stopped with Ctrl-C.
"""

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core import AttentionStrategy, create_strategy
from core.calibration import Calibration
from core.registry import installed
from harness.command import make_parser, parse_options, require_at_least, run_command
from harness.environment import provenance
from harness.errors import BenchError
from harness.generate import denoise
from harness.jobs import StrategySpec, parse_spec
from harness.model_options import ModelOptions, add_model_options, read_model_options
from harness.models import LoadedModel
from harness.run_folder import check_writable, locked, utc_now
from harness.tuning import Measurement, ProbeStrategy, choose_values, sampled_steps

SEED = 0
OTHER_RULES = ("calibration", "density")  # what would stand in the place of the searched parameter


@dataclass(frozen=True)
class TuneConfig:
    """Checked settings of one call.

    Args:
        spec (StrategySpec): strategy with its fixed parameters.
        knob (str): parameter to calibrate.
        model (ModelOptions): which model, and how.
        prompts (list[str]): calibration prompts, and the held-out one last.
        max_error (float): bound on the relative L1 error.
        steps_measured (int): denoising steps to measure per prompt.
        output (Path): file to write.
    """

    spec: StrategySpec
    knob: str
    model: ModelOptions
    prompts: list[str]
    max_error: float
    steps_measured: int
    output: Path


def main(argv: list[str] | None = None) -> int:
    """Calibrate.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command("harness.tune", argv, _tune, stopped="finished prompts are kept, start again to go on")


def _tune(arguments: list[str], command: str) -> None:
    config = parse_arguments(arguments)
    with _output_held(config.output):
        calibrate(config, command)


def parse_arguments(arguments: list[str]) -> TuneConfig:
    """Read the command line.

    Raises:
        BenchError: an option is unknown or has a wrong value.
        SparseAttnError: the strategy does not exist or cannot be calibrated.
    """
    parser = make_parser("harness.tune", __doc__)
    parser.add_argument(
        "--strategy", type=str, required=True, help="name, or name:key=value,... to calibrate"
    )
    parser.add_argument("--knob", type=str, help="parameter to calibrate (default: the strategy's first)")
    add_model_options(parser)
    parser.add_argument("--prompts", type=int, default=3, help="calibration prompts; one more is held out")
    parser.add_argument("--max-error", type=float, default=0.06, help="bound on the relative L1 error")
    parser.add_argument("--steps-measured", type=int, default=3, help="denoising steps measured per prompt")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .json")
    options = parse_options(parser, arguments)
    require_at_least(options, 1, "prompts", "steps_measured")
    if not options.max_error > 0:
        raise BenchError(f"--max-error must be above 0, got {options.max_error}")
    if options.output.suffix != ".json":
        raise BenchError(f"--output must end in .json, got {options.output}")
    spec = parse_spec(options.strategy)
    tunable = installed().strategy(spec.name).tunable
    if not tunable:
        raise BenchError(f"strategy '{spec.name}' has no parameter that can be calibrated")
    knob = options.knob or next(iter(tunable))
    if knob not in tunable:
        raise BenchError(
            f"--knob of strategy '{spec.name}' must be one of {', '.join(tunable)}, got '{knob}'"
        )
    if given := sorted({*tunable, *OTHER_RULES} & _set_parameters(spec)):
        raise BenchError(f"--strategy sets {', '.join(given)}, which is what is searched; leave it out")
    model = read_model_options(options)
    return TuneConfig(
        spec=spec,
        knob=knob,
        model=model,
        prompts=model.first_prompts(options.prompts + 1, "--prompts and the held-out one"),
        max_error=options.max_error,
        steps_measured=options.steps_measured,
        output=options.output,
    )


def calibrate(config: TuneConfig, command: str) -> Calibration:
    """Measure, choose, verify on the held-out prompt and write the file."""
    started = time.perf_counter()
    model = config.model.load()
    first = config.spec.create().parameters.dense_timesteps
    steps = sampled_steps(first, model.settings.steps, config.steps_measured)
    values = installed().strategy(config.spec.name).tunable[config.knob]
    *prompts, held_out = config.prompts

    measurements, facts = _measure_all(config, model, values, prompts, steps)
    chosen, errors = choose_values(values, measurements, config.max_error)
    calibration = Calibration(
        strategy=config.spec.name,
        parameters=_fixed_parameters(config),
        values={config.knob: chosen},
        errors=errors,
        max_error=config.max_error,
        held_out={},
        model=model.name,
        denoisers=model.records,
        layout=facts["layout"],
        head_dim=facts["head_dim"],
        prompts=prompts,
        steps=steps,
        num_steps=model.settings.steps,
        made=provenance(model.device, command) | {"dtype": model.dtype, "date": utc_now()},
    )
    calibration.save(config.output)
    verified = _verify(config, model, held_out, steps)
    seconds = round(time.perf_counter() - started, 1)
    calibration = calibration.model_copy(
        update={"held_out": verified, "made": calibration.made | {"seconds": seconds}}
    )
    calibration.save(config.output)
    _progress_file(config).unlink(missing_ok=True)
    _print_summary(config, calibration)
    return calibration


def _set_parameters(spec: StrategySpec) -> set[str]:
    """Parameters that the spec sets, itself or by its preset."""
    preset = installed().preset(spec.name, spec.preset).parameters if spec.preset else {}
    return {*preset, *spec.overrides}


def _output_held(output: Path) -> contextlib.AbstractContextManager[None]:
    """Two calls at once would mix their measurements in one progress file."""
    check_writable(output)
    return locked(output.with_name(f".{output.name}.lock"), f"another calibration is written to {output}")


def _fixed_parameters(config: TuneConfig) -> dict[str, Any]:
    """Parameters that the calibration belongs to; warm-up and guard are the user's to choose."""
    from core.parameters import StrategyParameters

    tunable = installed().strategy(config.spec.name).tunable
    left_out = {*StrategyParameters.model_fields, *tunable, *OTHER_RULES, "backend"}
    return {name: value for name, value in config.spec.parameters.items() if name not in left_out}


def _candidate(config: TuneConfig, **choice: Any) -> AttentionStrategy:
    own = {name: value for name, value in config.spec.parameters.items() if name == "backend"}
    return create_strategy(config.spec.name, **own, **_fixed_parameters(config), **choice)


def _measure_all(
    config: TuneConfig, model: LoadedModel, values: tuple[float, ...], prompts: list[str], steps: list[int]
) -> tuple[list[Measurement], dict[str, Any]]:
    """Measurements of all prompts; those that a stopped call left behind are read and not repeated."""
    candidates = [_candidate(config, **{config.knob: value}) for value in values]
    identity = {
        "strategy": config.spec.name,
        "knob": config.knob,
        "parameters": _fixed_parameters(config),
        "backend": config.spec.parameters.get("backend"),
        "values": list(values),
        "model": model.name,
        "settings": asdict(model.settings),
        "dtype": model.dtype,
        "steps": steps,
    }
    path = _progress_file(config)
    known = _read_progress(path, identity)
    measurements: list[Measurement] = []
    facts: dict[str, Any] = {}
    for number, prompt in enumerate(prompts, start=1):
        if prompt not in known:
            probe = ProbeStrategy(candidates, steps)
            began = time.perf_counter()
            denoise(model, probe, prompt, SEED)
            entry = {
                "prompt": prompt,
                "facts": probe.facts | {"layout": asdict(probe.facts["layout"])},
                "measurements": [list(one) for one in probe.measurements()],
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            known[prompt] = entry
            print(f"prompt {number} of {len(prompts)}: {time.perf_counter() - began:.1f} s  {prompt}")
        else:
            print(f"prompt {number} of {len(prompts)}: measured before  {prompt}")
        facts = known[prompt]["facts"]
        measurements.extend(Measurement(*one) for one in known[prompt]["measurements"])
    return measurements, facts


def _progress_file(config: TuneConfig) -> Path:
    return config.output.with_name(config.output.name + ".progress")


def _read_progress(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Finished prompts of a stopped call with the same settings; a torn last line is dropped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    if entries and entries[0] != json.loads(json.dumps(identity)):
        raise BenchError(
            f"{path} belongs to a call with other settings; remove it or choose another --output"
        )
    entries = entries or [identity]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return {entry["prompt"]: entry for entry in entries[1:]}


def _verify(config: TuneConfig, model: LoadedModel, prompt: str, steps: list[int]) -> dict[str, Any]:
    """Error and density of the finished calibration on a prompt that it has not seen."""
    strategy = _candidate(config, calibration=str(config.output))
    probe = ProbeStrategy([strategy], steps)
    denoise(model, probe, prompt, SEED)
    errors = [error for entry in probe.measurements() for error in entry.errors[0]]
    return {
        "prompt": prompt,
        "density": round(probe.mean_densities()[0], 4),
        "mean_error": round(sum(errors) / len(errors), 5),
        "largest_error": round(max(errors), 5),
        "share_within_bound": round(sum(error <= config.max_error for error in errors) / len(errors), 4),
    }


def _print_summary(config: TuneConfig, calibration: Calibration) -> None:
    held_out, within = calibration.held_out, 100 * calibration.held_out["share_within_bound"]
    for layer, row in enumerate(calibration.values[config.knob]):
        print(f"layer {layer:2d}: {config.knob} " + " ".join(f"{value:.2f}" for value in row))
    print(
        f"held-out prompt: density {held_out['density']:.3f}, relative L1 error {held_out['mean_error']:.3f} "
        f"on average, {held_out['largest_error']:.3f} at most, {within:.0f} % of the calls and "
        f"heads within {config.max_error:g}"
    )
    usual = create_strategy(config.spec.name).parameters.model_dump(mode="json")
    given = {name: value for name, value in _fixed_parameters(config).items() if value != usual[name]}
    options = ",".join(f"{name}={value}" for name, value in (given | {"calibration": config.output}).items())
    print(f"{calibration.made['seconds']} s; use it with {config.spec.name}:{options}")


if __name__ == "__main__":
    sys.exit(main())
