"""Choosing a strategy for every head: what each one does to the attention, and what that does to the video.

While a video is generated with dense attention, every candidate is run on the same queries, keys and values.
The error that it makes in a head is taken where the model feels it: in the residual stream, behind the
head's slice of the output projection. Then all layers are disturbed in single ranges of steps, and what
arrives in the latents at the end is divided by what was put in: the gain of the range. (Gains of single
layers are not the same for two prompts, least of all in early steps.) Last, every candidate makes a whole
video; where that differs more or less from the dense one than errors and gains foretell (errors of some kinds
cancel, those of others point one way), the candidate gets a factor. Errors of different places are taken to
add up in squares, as independent ones do. So the damage of a candidate in a head is squared error times gain
times factor, and the cheapest choice under a bound on the sum is a matter of one multiplier (Everett,
Operations Research 11, 1963).

Shape legend: R step ranges, L layers, H heads, C candidates.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from core import AttentionContext, AttentionStrategy, InstalledDenoiser
from core.record import CudaSpan, Stopwatch
from core.strategy import AttentionResult, dense_result
from harness.errors import BenchError
from harness.tuning import relative_l1

HALVINGS = 60  # of the interval of the multiplier, in powers of ten: past the precision of a float
MULTIPLIERS = (-12.0, 24.0)


class Trial(NamedTuple):
    """One candidate in one attention call.

    Args:
        step (int): denoising step.
        layer (int): layer.
        candidate (int): its place in the list.
        density (float): executed density.
        time_ms (float): time of the call.
        errors (list[float]): relative L1 error of every head.
        damages (list[float]): squared error of every head in the residual stream.
    """

    step: int
    layer: int
    candidate: int
    density: float
    time_ms: float
    errors: list[float]
    damages: list[float]


class CandidateProbe(AttentionStrategy):
    """Dense attention that tries every candidate on the way.

    Args:
        candidates (Sequence[AttentionStrategy]): the candidates.
        weights (Sequence[Tensor]): of every layer, see `projection_weights`.
    """

    name: ClassVar[str] = "candidate-probe"

    def __init__(self, candidates: Sequence[AttentionStrategy], weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._candidates = candidates
        self._weights = weights
        self._tried: list[tuple[int, int, int, AttentionResult, CudaSpan | float]] = []
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
        """The exact output."""
        exact = dense_result(query, key, value)
        weight = self._weights[context.layer_index]
        for index, candidate in enumerate(self._candidates):
            stopwatch = Stopwatch(query.device)
            result = candidate.attend(query, key, value, context)
            time_s = stopwatch.stop()
            damage = residual_error(result.output, exact.output, weight)
            figures = torch.stack([relative_l1(result.output, exact.output), damage])
            place = (context.step_index, context.layer_index, index)
            self._tried.append((*place, result._replace(output=figures), time_s))
        self.facts = {
            "layout": context.layout,
            "num_layers": context.num_layers,
            "num_heads": query.shape[1],
            "head_dim": query.shape[3],
        }
        return exact

    def trials(self) -> list[Trial]:
        """Everything tried so far; synchronises with the device."""
        return [
            Trial(step, layer, index, float(result.density), 1e3 * _seconds(time_s), *result.output.tolist())
            for step, layer, index, result, time_s in self._tried
        ]


class Disturbance(AttentionStrategy):
    """Dense attention, but for some steps, which a candidate runs.

    Args:
        candidate (AttentionStrategy): what disturbs.
        steps (Collection[int]): the steps.
    """

    name: ClassVar[str] = "disturbance"

    def __init__(self, candidate: AttentionStrategy, steps: Collection[int]) -> None:
        super().__init__()
        self._candidate = candidate
        self._steps = steps

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Let the candidate refuse the model."""
        self._candidate.check_model(denoisers)

    def reset(self) -> None:
        """Forget what the candidate keeps."""
        self._candidate.reset()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> AttentionResult:
        if context.step_index in self._steps:
            return self._candidate.attend(query, key, value, context)
        return dense_result(query, key, value)


def projection_weights(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """``W^T W`` of every head's slice W of an output projection ``[C, H * D]``: ``[H, D, D]`` fp32."""
    slices = weight.detach().float().unflatten(1, (heads, -1)).transpose(0, 1)
    return slices.transpose(1, 2) @ slices


def residual_error(output: torch.Tensor, exact: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Squared L2 error of every head behind its slice of the output projection, over the batch: ``[H]`` fp32.

    Args:
        output (Tensor): ``[B, H, N, D]``.
        exact (Tensor): likewise.
        weight (Tensor): ``[H, D, D]``, of `projection_weights`.
    """
    difference = output.float() - exact.float()
    return ((difference @ weight) * difference).sum((0, 2, 3))


def range_starts(num_steps: int, count: int) -> list[int]:
    """First steps of ``count`` ranges of nearly equal length."""
    return sorted({index * num_steps // count for index in range(count)})


def range_steps(starts: Sequence[int], num_steps: int) -> list[range]:
    """The steps of each range."""
    ends = [*starts[1:], num_steps]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


class Tables(NamedTuple):
    """What the trials of several prompts say, means over prompts.

    Args:
        errors (Tensor): relative L1 error, ``[R, L, H, C]``, mean over the steps of a range.
        damages (Tensor): squared error in the residual stream, ``[R, L, H, C]``, summed over the steps.
        densities (Tensor): executed density, ``[R, L, C]``.
        times_ms (Tensor): median time of one call, ``[C]``.
    """

    errors: torch.Tensor
    damages: torch.Tensor
    densities: torch.Tensor
    times_ms: torch.Tensor


def summarise(trials: Iterable[Trial], ranges: Sequence[range], prompts: int) -> Tables:
    """The tables of all trials, every step and layer of them with every candidate.

    Where the halves of guidance are calls of their own, a step has several trials of one kind per prompt;
    their damages add up, as they do over the batch of a single call.
    """
    trials = sorted(trials)
    last, heads = trials[-1], len(trials[-1].errors)
    # Sorted by step, layer and candidate; the prompts and calls of one place stand together.
    grid = (1 + last.step, 1 + last.layer, 1 + last.candidate, -1)
    errors = torch.tensor([one.errors for one in trials], dtype=torch.float64).view(*grid, heads).mean(3)
    damages = torch.tensor([one.damages for one in trials], dtype=torch.float64).view(*grid, heads).sum(3)
    damages /= prompts
    densities = torch.tensor([one.density for one in trials], dtype=torch.float64).view(grid).mean(3)
    times = torch.tensor([one.time_ms for one in trials], dtype=torch.float64).view(grid)
    return Tables(
        errors=torch.stack([errors[list(part)].mean(0) for part in ranges]).transpose(2, 3),
        damages=torch.stack([damages[list(part)].sum(0) for part in ranges]).transpose(2, 3),
        densities=torch.stack([densities[list(part)].mean(0) for part in ranges]),
        times_ms=times.transpose(0, 2).flatten(1).median(1).values,
    )


def gains(latent_errors: torch.Tensor, tables: Tables, candidate: int) -> torch.Tensor:
    """Squared relative error of the final latents for each unit of squared error in the residual stream.

    Args:
        latent_errors (Tensor): ``[R]``, what arrived when the candidate ran in that range.
        tables (Tables): what it put in.
        candidate (int): its place in the list.

    Returns:
        Tensor: ``[R]``.

    Raises:
        BenchError: it put in nothing somewhere.
    """
    put_in = tables.damages[..., candidate].sum((1, 2))
    if not bool((put_in > 0).all()):
        raise BenchError(
            "the first of --candidates does not differ from dense attention in every range of steps, so it "
            "cannot tell how much errors matter there; begin with a sparser one"
        )
    return latent_errors / put_in


def factors(video_errors: torch.Tensor, tables: Tables, gain: torch.Tensor) -> torch.Tensor:
    """How much more every candidate harms a whole video than errors and gains foretell, ``[C]``.

    Args:
        video_errors (Tensor): squared relative errors of the latents of whole videos, ``[C]``.
        tables (Tables): errors of the candidates.
        gain (Tensor): ``[R]``, of `gains`.
    """
    foretold = (tables.damages.sum((1, 2)) * gain[:, None]).sum(0)
    return torch.where(foretold > 0, video_errors / foretold, 1.0)


def cheapest_choice(costs: torch.Tensor, damages: torch.Tensor, budget: float) -> torch.Tensor:
    """The cheapest candidate of every head under a bound on the error of the whole.

    Args:
        costs (Tensor): ``[R, L, C]``.
        damages (Tensor): squared errors, ``[R, L, H, C]``; one candidate of each head has none.
        budget (float): bound on the root of the sum of the chosen damages.

    Returns:
        Tensor: ``[R, L, H]`` int64. On the lower convex hull of cost over squared error: the choice of one
        multiplier, the smallest that keeps the bound.
    """
    low, high = MULTIPLIERS
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = chosen(damages, _choice(costs, damages, middle)).sum().sqrt() <= budget
        low, high = (low, middle) if fits else (middle, high)
    return _choice(costs, damages, high)


def _choice(costs: torch.Tensor, damages: torch.Tensor, exponent: float) -> torch.Tensor:
    return (costs[:, :, None] + 10.0**exponent * damages).argmin(-1)


def chosen(table: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """The figures of the chosen candidates, ``[R, L, H]``, of a table ``[R, L, H, C]`` or ``[R, L, C]``."""
    if table.dim() == 3:
        table = table[:, :, None].expand(*choices.shape, -1)
    return table.gather(-1, choices[..., None])[..., 0]


def _seconds(time_s: CudaSpan | float) -> float:
    return time_s.seconds() if isinstance(time_s, CudaSpan) else time_s
