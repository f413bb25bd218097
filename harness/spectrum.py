"""``python -m harness.spectrum``: how many dimensions the scores and values of each head of a model need.

    python -m harness.spectrum --prompts 2 --output spectrum.json --markdown spectrum.md

While videos are generated with dense attention, the second moments of queries, keys and values are gathered
at a few denoising steps. Projections found from them are judged on one more prompt, which they have not
seen. Exit codes: 0 done, 2 bad input, 130 stopped with Ctrl-C.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from core.apply import find_adapter
from harness.command import make_parser, parse_options, require_at_least, run_command
from harness.environment import provenance
from harness.errors import BenchError
from harness.generate import denoise
from harness.low_rank import value_moments
from harness.model_options import ModelOptions, add_model_options, read_model_options
from harness.models import LoadedModel
from harness.run_folder import check_writable, utc_now, write_text
from harness.spectrum_probes import HeldOutProbe, LayerMoments, MomentProbe
from harness.spectrum_tables import tables
from harness.tuning import sampled_steps
from kernels_common.score_projection import (
    Projection,
    ScoreMoments,
    ScoreProjection,
    score_error,
    score_projection,
    score_spectrum,
)

SEED = 0
RANKS = (16, 32, 48)
METHODS: tuple[Projection, ...] = tuple(name for name in get_args(Projection) if name != "none")


@dataclass(frozen=True)
class SpectrumConfig:
    """Checked settings of one call.

    Args:
        model (ModelOptions): which model, and how.
        prompts (list[str]): calibration prompts, and the held-out one last.
        steps_measured (int): denoising steps to look at per prompt.
        output (Path, Optional): JSON file to write.
        markdown (Path, Optional): Markdown file to write.
    """

    model: ModelOptions
    prompts: list[str]
    steps_measured: int
    output: Path | None
    markdown: Path | None


def parse_arguments(arguments: list[str]) -> SpectrumConfig:
    """Read the command line.

    Raises:
        BenchError: an option is unknown or has a wrong value.
    """
    parser = make_parser("harness.spectrum", __doc__)
    add_model_options(parser)
    parser.add_argument("--prompts", type=int, default=1, help="calibration prompts; one more is held out")
    parser.add_argument("--steps-measured", type=int, default=3, help="denoising steps to look at per prompt")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write")
    options = parse_options(parser, arguments)
    require_at_least(options, 1, "prompts", "steps_measured")
    model = read_model_options(options)
    return SpectrumConfig(
        model=model,
        prompts=model.first_prompts(options.prompts + 1, "--prompts and the held-out one"),
        steps_measured=options.steps_measured,
        output=options.output,
        markdown=options.markdown,
    )


def measure(config: SpectrumConfig, command: str) -> dict[str, Any]:
    """Spectra and errors of all layers and heads; the result is what ``--output`` keeps.

    Raises:
        BenchError: the model cannot be loaded, or its heads have too few dimensions.
    """
    model = config.model.load()
    weights = _output_weights(model)
    steps = sampled_steps(0, model.settings.steps, config.steps_measured)
    *prompts, held_out = config.prompts
    known = MomentProbe(steps)
    for prompt in prompts:
        denoise(model, known, prompt, SEED)
    layers = known.layers()
    dim = layers[0].query.shape[-1]
    if dim <= max(RANKS):
        raise BenchError(f"ranks {RANKS} need heads of more dimensions, got {dim} in model {model.name}")
    projections = {
        (method, rank): [score_projection(layer.scores, method, rank) for layer in layers]
        for method in METHODS
        for rank in RANKS
    }
    fresh = HeldOutProbe(steps, projections)
    denoise(model, fresh, held_out, SEED)
    return provenance(model.device, command) | {
        "created_at": utc_now(),
        "dtype": model.dtype,
        "model": model.name,
        "prompts": prompts,
        "held_out": held_out,
        "steps": steps,
        "ranks": list(RANKS),
        "scores": _score_facts(layers, fresh, projections),
        "values": _value_facts(layers, fresh.layers(), weights),
    }


def _score_facts(
    layers: Sequence[LayerMoments],
    fresh: HeldOutProbe,
    projections: dict[tuple[Projection, int], list[ScoreProjection]],
) -> dict[str, Any]:
    """Shares of the energy per direction on the calibration prompts, and errors on the held-out one."""
    errors, seen = [], fresh.layers()
    for (method, rank), own in projections.items():
        shares = [
            score_error(layer.scores, projection) / score_spectrum(layer.scores).sum(-1)
            for layer, projection in zip(seen, own, strict=True)
        ]
        attention = torch.stack(fresh.errors[method, rank])  # [calls, H]
        errors.append(
            {
                "method": method,
                "rank": rank,
                "lost": _rounded(torch.cat(shares)),
                "attention_error": round(float(attention.mean()), 5),
                "attention_error_worst": round(float(attention.max()), 5),
            }
        )
    return {"spectrum": [_shares(layer.scores) for layer in layers], "errors": errors}


def _value_facts(
    layers: Sequence[LayerMoments], seen: Sequence[LayerMoments], weights: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """The same for values folded into the output projection; the error is that of the layer's output."""
    moments = [value_moments(layer.value, weight) for layer, weight in zip(layers, weights, strict=True)]
    outputs = [value_moments(layer.output, weight) for layer, weight in zip(seen, weights, strict=True)]
    errors = []
    for rank in RANKS:
        lost = [
            score_error(output, score_projection(own, "optimal", rank)) / score_spectrum(output).sum(-1)
            for output, own in zip(outputs, moments, strict=True)
        ]
        errors.append({"rank": rank, "lost": _rounded(torch.cat(lost))})
    return {"spectrum": [_shares(own) for own in moments], "errors": errors}


def _shares(moments: ScoreMoments) -> list[list[float]]:
    spectrum = score_spectrum(moments)[0]
    return _rounded(spectrum / spectrum.sum(-1, keepdim=True))


def _rounded(table: torch.Tensor) -> list[list[float]]:
    return [[float(f"{number:.4g}") for number in row] for row in table.tolist()]


def _output_weights(model: LoadedModel) -> list[torch.Tensor]:
    return find_adapter(model.denoiser).output_weights(model.denoiser)


def main(argv: list[str] | None = None) -> int:
    """Measure and print.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command("harness.spectrum", argv, _spectrum)


def _spectrum(arguments: list[str], command: str) -> None:
    config = parse_arguments(arguments)
    check_writable(config.output, config.markdown)
    run = measure(config, command)
    text = tables(run)
    print(text, end="")
    if config.output:
        write_text(config.output, json.dumps(run) + "\n")
    if config.markdown:
        write_text(config.markdown, text)


if __name__ == "__main__":
    sys.exit(main())
