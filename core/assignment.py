"""HeadAssignment: which strategy runs which head, by denoising step and layer, as a file."""

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from core.context import AttentionContext
from core.errors import ParameterError
from core.model_file import ModelFile
from core.strategy import AttentionStrategy

IntTable = list[list[list[int]]]
FloatTable = list[list[list[float]]]


class Candidate(BaseModel):
    """One configured strategy that heads may be given to.

    Args:
        label (str): how it was asked for, ``name:key=value,...``; unique within an assignment.
        strategy (str): registered name.
        parameters (dict): the strategy's own parameters.
        time_ms (float, Optional): median time of a call with all heads, in milliseconds.
        density (float, Optional): executed density, mean over calls.
        whole_error (float, Optional): relative L2 error of the final latents of a video that the candidate
            makes alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    strategy: str
    parameters: dict[str, Any]
    time_ms: float | None = None
    density: float | None = None
    whole_error: float | None = None


class HeadAssignment(ModelFile):
    """The candidate of every head at every layer and range of steps, with what it was chosen on.

    Written by ``python -m harness.compose`` as JSON. Tables are step ranges x layers x heads; measured
    figures are means over steps and prompts, and those of the candidate that was chosen.

    Args:
        candidates (list[Candidate]): the strategies that were chosen.
        first_steps (list[int]): first denoising step of each range; the first is 0.
        num_steps (int): steps of the schedule.
        choices (table of int): places in ``candidates``.
        model (str): model that was measured.
        denoisers (list[DenoiserRecord], Optional): what its denoisers are.
        layout (dict): fields of its `TokenLayout`.
        head_dim (int): head dimension.
        budget (float): bound on the predicted relative L2 error of the final latents.
        cost (str): what was made small: measured ``"time"``, or executed ``"density"``.
        costs (table of float): that of every choice, as a share of dense attention's.
        errors (table of float): relative L1 error of the attention output of every choice.
        predicted (dict): error of the final latents, mean cost, and mean error of the attention output.
        held_out (list[dict]): what came out on prompts that the choice was not made on.
        prompts (list[str]): prompts that were measured.
        made (dict): device, dtype, versions, commit, date, seconds and command.
    """

    noun: ClassVar[str] = "an assignment"
    command: ClassVar[str] = "harness.compose"

    format: Literal["sparse-attn-assignment"] = "sparse-attn-assignment"
    version: Literal[1] = 1
    candidates: list[Candidate] = Field(min_length=1)
    first_steps: list[int] = Field(min_length=1)
    num_steps: int = Field(ge=1)
    choices: IntTable
    layout: dict[str, Any]
    head_dim: int
    budget: float
    cost: Literal["time", "density"]
    costs: FloatTable
    errors: FloatTable
    predicted: dict[str, float] = Field(default_factory=dict)
    held_out: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_tables(self) -> Self:
        shapes = {_shape(table) for table in (self.choices, self.costs, self.errors)}
        if len(shapes) != 1 or None in shapes:
            raise ValueError("choices, costs and errors must be full tables of one shape")
        if len(self.choices) != len(self.first_steps):
            raise ValueError(f"{len(self.first_steps)} first_steps, but {len(self.choices)} step ranges")
        starts = self.first_steps
        if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= self.num_steps:
            raise ValueError(f"first_steps must rise from 0 to below num_steps {self.num_steps}")
        named = {index for layers in self.choices for heads in layers for index in heads}
        if not named <= set(range(len(self.candidates))):
            raise ValueError(f"choices must lie in 0 to {len(self.candidates) - 1}, the candidates")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.choices[0]), len(self.choices[0][0])

    def step_range(self, context: AttentionContext) -> int:
        """The range that a call belongs to; schedules of another length are scaled to this one's."""
        step = context.step_index
        if context.num_steps is not None:
            step = step * self.num_steps // context.num_steps
        return sum(first <= step for first in self.first_steps) - 1


def require_heads_alike(strategy: AttentionStrategy, label: str) -> None:
    """Refuse a strategy that cannot run some heads of a layer as it would run all.

    Raises:
        ParameterError: it has parameters that belong to places among the heads.
    """
    if not strategy.heads_alike:
        raise ParameterError(
            f"{label} has settings that belong to places among the heads, so it cannot run only some of "
            "them; take one that treats all heads alike"
        )


def _shape(table: list[list[list[Any]]]) -> tuple[int, int, int] | None:
    """Sizes of a nested list; None where rows differ or are empty."""
    layers, heads = {len(rows) for rows in table}, {len(row) for rows in table for row in rows}
    if len(layers) != 1 or len(heads) != 1 or 0 in layers | heads:
        return None
    return len(table), layers.pop(), heads.pop()
