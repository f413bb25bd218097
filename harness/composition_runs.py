"""The videos behind a composition; what each one says is kept in a journal as soon as it is there."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.apply import find_adapter
from core.assignment import Candidate
from core.registry import create_strategy
from core.strategy import AttentionStrategy
from harness.composing import (
    CandidateProbe,
    Disturbance,
    Tables,
    Trial,
    factors,
    gains,
    projection_weights,
    range_steps,
    summarise,
)
from harness.environment import device_name, git_state, package_versions
from harness.errors import BenchError
from harness.generate import decode, denoise
from harness.jobs import DENSE
from harness.metrics import psnr_db
from harness.models import LoadedModel
from harness.replay import RecordedDenoiser
from harness.tuning import ProbeStrategy

SEED = 0
DISTURBING = 1  # of the candidates: the first that was asked for, after dense


class Journal:
    """Results by key in a file with a line each; what a stopped call left behind is read again.

    Args:
        path (Path): the file.
        identity (dict): settings that all results share.

    Raises:
        BenchError: the file holds results of other settings.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        entries = _whole_lines(path)
        if entries and entries[0] != json.loads(json.dumps(identity)):
            raise BenchError(
                f"{path} holds measurements with other settings; remove it or choose another --output"
            )
        entries = entries or [identity]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        self._known = {tuple(entry["key"]): entry["value"] for entry in entries[1:]}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._known

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return self._known[key]

    def add(self, key: tuple[Any, ...], value: Any) -> None:
        """Keep one result."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
        self._known[key] = value

    def get(self, key: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
        """The result of that key, measured now if it is not known."""
        if key not in self:
            began = time.perf_counter()
            self.add(key, measure())
            print(f"{time.perf_counter() - began:6.1f} s  {', '.join(map(str, key))}", flush=True)
        return self[key]


class CompositionRuns:
    """Measurements of candidates in one model.

    Args:
        model (LoadedModel): the model.
        candidates (Sequence[Candidate]): what heads may be given to.
        starts (Sequence[int]): first step of each range.
        journal (Journal): where results are kept.
    """

    def __init__(
        self, model: LoadedModel, candidates: Sequence[Candidate], starts: Sequence[int], journal: Journal
    ) -> None:
        self._model = model
        self._candidates = candidates
        self._starts = starts
        self._journal = journal
        adapter = find_adapter(model.denoiser)
        self._layers = adapter.attention_layers(model.denoiser)
        self._weights = adapter.output_weights(model.denoiser)
        self._reference: tuple[str, RecordedDenoiser, torch.Tensor] | None = None

    def facts(self, prompt: str) -> dict[str, Any]:
        """Layout and sizes of the calls, once `trials` has run."""
        return self._journal["candidate", self._candidates[0].label, prompt]["facts"]

    def trials(self, prompt: str) -> list[Trial]:
        """Every candidate on the queries, keys and values of a dense video."""
        keys = [("candidate", one.label, prompt) for one in self._candidates]
        self._try(
            [one for one, key in zip(self._candidates, keys, strict=True) if key not in self._journal], prompt
        )
        return [
            Trial(*figures)._replace(candidate=index)
            for index, key in enumerate(keys)
            for figures in self._journal[key]["trials"]
        ]

    def _try(self, candidates: Sequence[Candidate], prompt: str) -> None:
        """Measure candidates in one dense video."""
        if not candidates:
            return
        began = time.perf_counter()
        weights = [
            projection_weights(weight, layer.heads)
            for weight, layer in zip(self._weights, self._layers, strict=True)
        ]
        probe = CandidateProbe([made(one) for one in candidates], weights)
        denoise(self._model, probe, prompt, SEED)
        facts = probe.facts | {"layout": asdict(probe.facts["layout"])}
        for index, one in enumerate(candidates):
            own = [trial for trial in probe.trials() if trial.candidate == index]
            self._journal.add(("candidate", one.label, prompt), {"facts": facts, "trials": own})
        print(f"{time.perf_counter() - began:6.1f} s  {len(candidates)} candidates, {prompt}", flush=True)

    def disturbed(self, prompt: str, candidate: int) -> torch.Tensor:
        """Squared relative errors of the latents when the candidate runs in one range of steps, ``[R]``."""
        parts = range_steps(self._starts, self._model.settings.steps)
        errors = [self._disturbed_in(part, prompt, self._candidates[candidate]) for part in parts]
        return torch.tensor(errors, dtype=torch.float64)

    def _disturbed_in(self, part: range, prompt: str, one: Candidate) -> float:
        def error() -> float:
            denoiser = self._prepared(prompt)[0]
            with denoiser.replayed(part.start / self._model.settings.steps):
                return self._error(prompt, Disturbance(made(one), part))

        steps = f"steps {part.start} to {part.stop - 1}"
        return self._journal.get(("disturbed", one.label, prompt, steps), error)

    def whole(self, prompt: str) -> torch.Tensor:
        """Squared relative errors of the latents of videos that one candidate makes alone, ``[C]``."""
        errors = [self._whole_by(prompt, one) for one in self._candidates]
        return torch.tensor(errors, dtype=torch.float64)

    def _whole_by(self, prompt: str, one: Candidate) -> float:
        key = ("whole video", one.label, prompt)
        return self._journal.get(key, lambda: self._error(prompt, made(one)))

    def _error(self, prompt: str, strategy: AttentionStrategy) -> float:
        exact = self._prepared(prompt)[1]
        return relative_square(denoise(self._model, strategy, prompt, SEED).latents, exact)

    def _prepared(self, prompt: str) -> tuple[RecordedDenoiser, torch.Tensor]:
        """The recording of the prompt's dense video, and its latents; those of one prompt are kept."""
        if self._reference is None or self._reference[0] != prompt:
            denoiser = RecordedDenoiser(self._model.denoiser)
            with denoiser.recorded():
                latents = denoise(self._model, create_strategy(DENSE), prompt, SEED).latents
            self._reference = (prompt, denoiser, latents)
        return self._reference[1:]


class Measured(NamedTuple):
    """All that the choice needs.

    Args:
        tables (Tables): what candidates do to the attention.
        damages (Tensor): predicted squared relative errors of the final latents, ``[R, L, H, C]``.
        whole (Tensor): squared relative errors of videos that one candidate makes alone, ``[C]``.
        facts (dict): layout and sizes of the calls.
    """

    tables: Tables
    damages: torch.Tensor
    whole: torch.Tensor
    facts: dict[str, Any]


def measure(
    model: LoadedModel,
    candidates: Sequence[Candidate],
    prompts: Sequence[str],
    starts: Sequence[int],
    journal: Path,
) -> Measured:
    """Errors, gains and factors; what the journal holds is not measured again.

    Args:
        model (LoadedModel): the model.
        candidates (Sequence[Candidate]): dense first; the second disturbs.
        prompts (Sequence[str]): prompts to measure on.
        starts (Sequence[int]): first step of each range.
        journal (Path): file of the results.
    """
    identity = {
        "model": model.name,
        "settings": asdict(model.settings),
        "dtype": model.dtype,
        "device": device_name(model.device),
        "versions": package_versions(),
        "commit": git_state()[0],
    }
    runs = CompositionRuns(model, candidates, starts, Journal(journal, identity))
    trials: list[Trial] = []
    for prompt in prompts:
        trials.extend(runs.trials(prompt))
    tables = summarise(trials, range_steps(starts, model.settings.steps), len(prompts))
    arrived = [(runs.disturbed(prompt, DISTURBING), runs.whole(prompt)) for prompt in prompts]
    disturbed, whole = (torch.stack(parts).mean(0) for parts in zip(*arrived, strict=True))
    gain = gains(disturbed, tables, DISTURBING)
    weight = gain[:, None, None, None] * factors(whole, tables, gain)
    return Measured(tables, tables.damages * weight, whole, runs.facts(prompts[0]))


def try_out(model: LoadedModel, prompt: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What assignments give on a prompt, each beside the dense video.

    Args:
        model (LoadedModel): the model.
        prompt (str): the prompt.
        paths (Sequence[Path]): files of the assignments.

    Returns:
        list[dict]: density, PSNR, relative L2 error of the latents, and mean relative L1 error of the
        attention output where the inputs are those of the dense video.
    """
    strategies = [create_strategy("combined", assignment=str(path)) for path in paths]
    probe = ProbeStrategy(strategies, range(model.settings.steps))
    exact = denoise(model, probe, prompt, SEED).latents
    frames = decode(model, exact)
    errors = torch.tensor([entry.errors for entry in probe.measurements()]).mean((0, 2))
    results = []
    for strategy, error in zip(strategies, errors.tolist(), strict=True):
        outcome = denoise(model, strategy, prompt, SEED)
        results.append(
            {
                "prompt": prompt,
                "density": round(outcome.report.density, 4),
                "psnr_db": round(psnr_db(decode(model, outcome.latents), frames) or 0.0, 2),
                "error": round(relative_square(outcome.latents, exact) ** 0.5, 5),
                "attention_error": round(error, 5),
            }
        )
        print(f"held out, {strategy.parameters.assignment}, {prompt}", flush=True)
    return results


def made(candidate: Candidate) -> AttentionStrategy:
    """A fresh strategy of a candidate."""
    return create_strategy(candidate.strategy, **candidate.parameters)


def relative_square(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """``sum (latents - exact)^2 / sum exact^2``."""
    difference = latents.double() - exact.double()
    return float(difference.square().sum() / exact.double().square().sum())


def _whole_lines(path: Path) -> list[Any]:
    """The lines of a file up to the first that was torn."""
    entries: list[Any] = []
    if not path.exists():
        return entries
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
