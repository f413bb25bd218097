"""What `harness.spectrum` gathers while a video is generated with dense attention."""

from collections.abc import Collection
from typing import ClassVar, NamedTuple

import torch

from core import AttentionContext, AttentionStrategy
from core.strategy import AttentionResult, Capabilities, dense_result
from harness.low_rank import reduced_attention
from harness.tuning import relative_l1
from kernels_common.score_projection import (
    Projection,
    ScoreMoments,
    ScoreProjection,
    score_moments,
    second_moment,
)


class LayerMoments(NamedTuple):
    """Mean second moments of one layer, ``[1, H, D, D]`` fp64 each.

    Args:
        query (Tensor): of the queries.
        key (Tensor): of the keys, taken from their mean.
        value (Tensor): of the values.
        output (Tensor): of the attention output.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor

    @property
    def scores(self) -> ScoreMoments:
        """Those that projections of scores are made from."""
        return ScoreMoments(self.query, self.key)


class MomentProbe(AttentionStrategy):
    """Dense attention that gathers moments at the chosen steps.

    Args:
        steps (Collection[int]): denoising steps to look at.
    """

    name: ClassVar[str] = "moment-probe"
    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(self, steps: Collection[int]) -> None:
        super().__init__()
        self._steps = steps
        self._found: dict[int, list[torch.Tensor]] = {}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> AttentionResult:
        """The exact output."""
        exact = dense_result(query, key, value)
        if context.step_index in self._steps:
            moments = (*score_moments(query, key), second_moment(value), second_moment(exact.output))
            over_batch = torch.stack([part.mean(0, keepdim=True) for part in moments])
            self._found.setdefault(context.layer_index, []).append(over_batch)
        return exact

    def layers(self) -> list[LayerMoments]:
        """Means over the measured calls of every layer, in their order."""
        return [LayerMoments(*torch.stack(calls).mean(0)) for _, calls in sorted(self._found.items())]


class HeldOutProbe(MomentProbe):
    """A `MomentProbe` that also measures attention with projected queries and keys.

    Args:
        steps (Collection[int]): denoising steps to look at.
        projections (dict): by method and rank, the projections of every layer.
    """

    def __init__(
        self, steps: Collection[int], projections: dict[tuple[Projection, int], list[ScoreProjection]]
    ) -> None:
        super().__init__(steps)
        self._projections = projections
        self.errors: dict[tuple[Projection, int], list[torch.Tensor]] = {choice: [] for choice in projections}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> AttentionResult:
        """The exact output; relative L1 errors ``[H]`` of every projection at the chosen steps."""
        exact = super().attend(query, key, value, context)
        if context.step_index in self._steps:
            for choice, layers in self._projections.items():
                reduced = reduced_attention(query, key, value, layers[context.layer_index])
                self.errors[choice].append(relative_l1(reduced, exact.output))
        return exact
