"""Calibration of a strategy on the inputs that a model really gives it.

While a video is generated with dense attention, every candidate value of one parameter is run on the same
queries, keys and values at a few denoising steps, and its error is measured per head. The cheapest value
that stays within the bound on all of them is chosen for each layer and head.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from core import AttentionContext, AttentionStrategy, InstalledDenoiser
from core.strategy import AttentionResult, Capabilities, dense_result

# Heads whose exact output is all zero have no relative error; this keeps 0 / 0 from being one.
SMALLEST_NORM = 1e-20


class Measurement(NamedTuple):
    """Errors of every candidate in one attention call.

    Args:
        layer (int): layer of the call.
        step (int): denoising step of the call.
        errors (list[list[float]]): relative L1 error, candidates x heads; over a batch, the largest.
    """

    layer: int
    step: int
    errors: list[list[float]]


class ProbeStrategy(AttentionStrategy):
    """Dense attention that measures candidates on the way."""

    name: ClassVar[str] = "probe"
    capabilities: ClassVar[Capabilities] = Capabilities(gqa=True)

    def __init__(self, candidates: Sequence[AttentionStrategy], steps: Collection[int]) -> None:
        super().__init__()
        self._candidates = candidates
        self._steps = steps
        self._measured: list[tuple[int, int, torch.Tensor]] = []
        self._densities: list[list[float | torch.Tensor]] = [[] for _ in candidates]
        self.facts: dict[str, Any] = {}

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Let the candidates refuse the model."""
        for candidate in self._candidates:
            candidate.check_model(denoisers)

    def reset(self) -> None:
        """Forget what the candidates keep."""
        for candidate in self._candidates:
            candidate.reset()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> AttentionResult:
        """The exact output; candidates are measured at the chosen steps."""
        exact = dense_result(query, key, value)
        if context.step_index in self._steps:
            errors = []
            for candidate, densities in zip(self._candidates, self._densities, strict=True):
                result = candidate.attend(query, key, value, context)
                errors.append(relative_l1(result.output, exact.output))
                densities.append(result.density)
            self._measured.append((context.layer_index, context.step_index, torch.stack(errors)))
        self.facts = {
            "layout": context.layout,
            "num_layers": context.num_layers,
            "num_heads": query.shape[1],
            "head_dim": query.shape[3],
        }
        return exact

    def measurements(self) -> list[Measurement]:
        """Everything measured so far; synchronises with the device."""
        return [Measurement(layer, step, errors.tolist()) for layer, step, errors in self._measured]

    def mean_densities(self) -> list[float]:
        """Executed density of every candidate, mean over the measured calls."""
        return [sum(map(float, densities)) / len(densities) for densities in self._densities]


def relative_l1(output: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """``sum |output - exact| / sum |exact|`` per head, the largest over the batch: ``[H]`` fp32."""
    difference = (output.float() - exact.float()).abs().sum((-1, -2))
    norm = exact.float().abs().sum((-1, -2)).clamp(min=SMALLEST_NORM)
    return (difference / norm).amax(0)


def sampled_steps(first: int, num_steps: int, count: int) -> list[int]:
    """Denoising steps to measure, spread evenly from ``first`` to the last one."""
    last = num_steps - 1
    if count == 1 or first >= last:
        return [min(first, last)]
    return sorted({round(first + index * (last - first) / (count - 1)) for index in range(count)})


def choose_values(
    values: Sequence[float], measurements: Sequence[Measurement], max_error: float
) -> tuple[list[list[float]], list[list[float]]]:
    """The cheapest value of each layer and head whose largest error keeps the bound.

    Args:
        values (Sequence[float]): candidates in rising cost; the last is taken where none keeps the bound.
        measurements (Sequence[Measurement]): of every layer.
        max_error (float): bound on the relative L1 error.

    Returns:
        tuple[list[list[float]], list[list[float]]]: chosen values and their largest errors, layers x heads.
    """
    chosen, errors = [], []
    for layer in range(1 + max(entry.layer for entry in measurements)):
        own = torch.tensor([entry.errors for entry in measurements if entry.layer == layer])
        worst = own.amax(0)  # [candidates, heads]
        fits = worst <= max_error
        fits[-1] = True
        picks = fits.to(torch.int8).argmax(0)
        chosen.append([values[int(pick)] for pick in picks])
        errors.append([round(float(worst[pick, head]), 6) for head, pick in enumerate(picks)])
    return chosen, errors
