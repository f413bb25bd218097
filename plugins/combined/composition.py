"""Composition: the heads of a call by the candidates that an assignment gave them to."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from core.assignment import HeadAssignment, require_heads_alike
from core.context import AttentionContext
from core.denoiser_record import InstalledDenoiser
from core.errors import ParameterError, UnsupportedCallError
from core.registry import create_strategy
from core.strategy import AttentionResult, AttentionStrategy

FOLDER = Path(__file__).parent / "assignments"


class HeadGroup(NamedTuple):
    """Heads of one layer that one candidate runs.

    Args:
        candidate (int): its place in the assignment.
        heads (list[int]): the heads.
        places (Tensor): the same, int64 on the device of the calls.
    """

    candidate: int
    heads: list[int]
    places: torch.Tensor


class Composition:
    """Strategies made by their registered names, each for its heads.

    A candidate is a fresh instance for every range of steps: within a range a layer gives it the same heads
    at every step, so state that it keeps per layer stays true.

    Args:
        assignment (HeadAssignment): who runs what.

    Raises:
        StrategyNotFoundError: a candidate's strategy is not registered here.
        ParameterError: a candidate does not take its parameters, or its heads are not alike.
    """

    def __init__(self, assignment: HeadAssignment) -> None:
        self.assignment = assignment
        self._strategies = [
            [create_strategy(one.strategy, **one.parameters) for one in assignment.candidates]
            for _ in assignment.first_steps
        ]
        for one, strategy in zip(assignment.candidates, self._strategies[0], strict=True):
            require_heads_alike(strategy, f"candidate {one.label}")
        self._groups: dict[Hashable, list[HeadGroup]] = {}

    @property
    def strategies(self) -> list[AttentionStrategy]:
        """Every instance of every candidate."""
        return [strategy for strategies in self._strategies for strategy in strategies]

    def reset(self) -> None:
        """Forget the per-layer state of all candidates."""
        for strategy in self.strategies:
            strategy.reset()

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Refuse another model, and one that a candidate is not for.

        Raises:
            ParameterError: see `ModelFile.check_model`, or a candidate's own.
        """
        self.assignment.check_model(denoisers)
        for strategy in self._strategies[0]:
            strategy.check_model(denoisers)

    def check_supported(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> None:
        """Refuse another model or shape, and what a candidate of this call's steps does not support.

        Raises:
            ParameterError: the call is of another model or shape than the assignment.
            UnsupportedCallError: the message names the candidate's strategy.
        """
        self.assignment.check_call(query, context)
        if key.shape[1] != query.shape[1]:
            raise UnsupportedCallError("an assignment needs as many key heads as query heads (no GQA)")
        for strategy in self._strategies[self.assignment.step_range(context)]:
            strategy.check_supported(query, key, context)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> AttentionResult:
        """Attention of one layer; its density is the mean over heads."""
        place = self.assignment.step_range(context)
        strategies, groups = self._strategies[place], self._heads_of(place, query, context)
        if len(groups) == 1:
            only = groups[0]
            result = strategies[only.candidate].attend(query, key, value, context)
            return result._replace(shares=self._shares(groups))
        output = torch.empty_like(query)
        densities, backends = [], []
        for group in groups:
            own = [tensor.index_select(1, group.places) for tensor in (query, key, value)]
            result = strategies[group.candidate].attend(own[0], own[1], own[2], context)
            output.index_copy_(1, group.places, result.output)
            densities.append(result.density * len(group.heads))
            backends.append(result.backend)
        density = sum(densities[1:], densities[0]) / query.shape[1]
        return AttentionResult(output, density, " + ".join(dict.fromkeys(backends)), self._shares(groups))

    def _heads_of(self, place: int, query: torch.Tensor, context: AttentionContext) -> list[HeadGroup]:
        known = (place, context.layer_index, query.device)
        if known not in self._groups:
            choices = self.assignment.choices[place][context.layer_index]
            self._groups[known] = [
                HeadGroup(candidate, heads, torch.tensor(heads, device=query.device))
                for candidate in sorted(set(choices))
                for heads in [[head for head, choice in enumerate(choices) if choice == candidate]]
            ]
        return self._groups[known]

    def _shares(self, groups: list[HeadGroup]) -> dict[str, float]:
        """Share of the heads that each candidate runs."""
        heads = self.assignment.size[1]
        shares = dict.fromkeys((one.label for one in self.assignment.candidates), 0.0)
        return shares | {
            self.assignment.candidates[group.candidate].label: len(group.heads) / heads for group in groups
        }


def load_composition(named: str) -> Composition:
    """The composition of an assignment.

    Args:
        named (str): name of one that comes with this plugin, or a file.

    Raises:
        ParameterError: it does not exist, is no assignment, or contains one in turn.
    """
    own = FOLDER / f"{named}.json"
    assignment = HeadAssignment.load(own if own.is_file() else Path(named))
    for candidate in assignment.candidates:
        if candidate.parameters.get("assignment") is not None:
            raise ParameterError(
                f"assignment {named} gives heads to {candidate.label}, an assignment itself; compose from "
                "plain strategies"
            )
    return Composition(assignment)
