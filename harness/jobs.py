"""What is to be run: strategy specs, the list of jobs and their identity."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from core import AttentionStrategy, Preset, available_strategies, create_strategy
from core.registry import installed
from harness.errors import BenchError

DENSE = "dense"
NO_PRESET = "none"
SPEC_FORM = "expected name, name:preset=NAME or name:key=value,key=value"


@dataclass(frozen=True)
class StrategySpec:
    """One configured strategy of a run.

    Args:
        label (str): text of the spec, unique within the run.
        name (str): registered name.
        preset (str, Optional): preset the parameters start from.
        overrides (dict): parameters on top of it.
        parameters (dict): all parameters after validation, as JSON values.
        provider (str): distribution with version and entry point that the strategy comes from.
    """

    label: str
    name: str
    preset: str | None
    overrides: dict[str, Any]
    parameters: dict[str, Any]
    provider: str = ""

    def create(self) -> AttentionStrategy:
        """A fresh strategy with these parameters."""
        return create_strategy(self.name, preset=self.preset, **self.overrides)

    @property
    def is_baseline(self) -> bool:
        """True for dense attention with its default parameters: what the others are compared with."""
        return self.label == DENSE


@dataclass(frozen=True)
class Job:
    """One video to generate.

    Args:
        job_id (str): hash of everything that identifies the job.
        spec (StrategySpec): strategy with parameters.
        prompt (str): the prompt.
        prompt_index (int): its place in the prompts file.
        seed (int): seed of the initial noise.
    """

    job_id: str
    spec: StrategySpec
    prompt: str
    prompt_index: int
    seed: int

    def shares_noise(self, other: "Job") -> bool:
        """True if both jobs start from the same prompt and noise."""
        return (self.prompt, self.seed) == (other.prompt, other.seed)


def parse_spec(text: str, model_presets: Sequence[str] = ()) -> StrategySpec:
    """Read and validate one spec.

    Args:
        text (str): ``name``, ``name:preset=demo`` or ``name:key=value,key=value``; ``preset=none``
            asks for the strategy's own defaults.
        model_presets (Sequence[str]): a bare name takes the first of these presets that its strategy has.

    Raises:
        BenchError: the text is not of this form.
        SparseAttnError: no such strategy or preset, or a parameter is wrong.
    """
    name, pairs = split_label(text)
    label = name + (":" if pairs else "") + ",".join(f"{key}={value}" for key, value in pairs.items())
    preset = pairs.pop("preset", None)
    fitting = next((known for known in model_presets if _has_preset(name, known)), None)
    if preset is None and not pairs and fitting:
        preset, label = fitting, f"{name}:preset={fitting}"
    if preset == NO_PRESET:
        preset = None
    overrides = {key: _read_value(value) for key, value in pairs.items()}
    strategy = create_strategy(name, preset=preset, **overrides)
    parameters = json.loads(json.dumps(strategy.parameters.model_dump(), default=str))
    provider = next(entry.owner for entry in available_strategies() if entry.name == name)
    return StrategySpec(label, name, preset, overrides, parameters, provider)


def resolve_specs(
    texts: Sequence[str] | None, model_presets: Sequence[str], device_type: str
) -> tuple[list[StrategySpec], list[str]]:
    """The strategies of a run, dense first.

    Args:
        texts (Sequence[str], Optional): specs; None takes every available strategy of the device.
        model_presets (Sequence[str]): see `parse_spec`.
        device_type (str): ``"cpu"`` or ``"cuda"``.

    Returns:
        tuple[list[StrategySpec], list[str]]: the specs, and remarks on what was left out.
    """
    notes: list[str] = []
    if texts is None:
        texts, notes = _default_names(device_type)
    specs: list[StrategySpec] = [parse_spec(DENSE)]
    for text in texts:
        spec = parse_spec(text, model_presets)
        twin = next((other for other in specs if _same(spec, other)), None)
        if twin is None:
            specs.append(spec)
        elif spec.label != twin.label:
            notes.append(f"{spec.label} and {twin.label} are the same configuration; it runs once")
    return specs, notes


def make_jobs(
    specs: Iterable[StrategySpec], prompts: Sequence[str], seeds: Sequence[int], identity: dict[str, Any]
) -> list[Job]:
    """All jobs, prompt by prompt and seed by seed, dense first in each group.

    Args:
        specs (Iterable[StrategySpec]): strategies, dense first.
        prompts (Sequence[str]): prompts in file order.
        seeds (Sequence[int]): seeds.
        identity (dict): what else identifies a job (model, size, device, versions, ...).
    """
    specs = list(specs)
    jobs = []
    for prompt_index, prompt in enumerate(prompts):
        for seed in seeds:
            for spec in specs:
                parts: dict[str, Any] = {
                    "strategy": spec.name,
                    "provider": spec.provider,
                    "parameters": spec.parameters,
                }
                parts |= {"prompt": prompt, "seed": seed}
                jobs.append(Job(job_hash(identity | parts), spec, prompt, prompt_index, seed))
    return jobs


def job_hash(parts: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that depend on the values and not on their order."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def presets_of(name: str) -> list[Preset]:
    """Registered presets of one strategy."""
    return [preset for preset in installed().presets() if preset.strategy == name]


def _has_preset(name: str, preset: str) -> bool:
    return any(known.name == preset for known in presets_of(name))


def _default_names(device_type: str) -> tuple[list[str], list[str]]:
    names, notes = [], []
    for entry in available_strategies():
        if not entry.available:
            notes.append(f"strategy '{entry.name}' is {entry.status}")
        elif device_type not in installed().strategy(entry.name).capabilities.devices:
            notes.append(f"strategy '{entry.name}' does not run on {device_type}; left out")
        else:
            names.append(entry.name)
    return names, notes


def _same(one: StrategySpec, other: StrategySpec) -> bool:
    return (one.name, one.parameters) == (other.name, other.parameters)


def split_label(text: str) -> tuple[str, dict[str, str]]:
    """Name and ``key=value`` pairs of a spec as they are written.

    Raises:
        BenchError: the text is not of this form, or has a key twice.
    """
    name, colon, rest = text.strip().partition(":")
    pairs: dict[str, str] = {}
    if not colon:
        return name, pairs
    for item in _split_outside_brackets(rest):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in pairs:
            raise BenchError(f"strategy '{text}': {key} is given twice; give it once")
        if not (key and equals and value):
            raise BenchError(f"strategy '{text}': cannot read '{item.strip()}'; {SPEC_FORM}")
        pairs[key] = value
    return name, pairs


def _split_outside_brackets(text: str) -> list[str]:
    """Parts between commas; those within brackets of any depth do not count."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _read_value(text: str) -> Any:
    """``true``, ``0.5``, ``[1, 2]`` as their YAML values; anything else stays text, ``off`` too."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, bool) and text.lower() not in ("true", "false") else value
