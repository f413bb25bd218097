"""HeadAssignment: which strategy runs which head, by denoising step and layer, as a file."""

import json
import re
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.context import AttentionContext
from core.errors import ParameterError
from core.layout import TokenLayout

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


class HeadAssignment(BaseModel):
    """The candidate of every head at every layer and range of steps, with what it was chosen on.

    Written by ``python -m harness.compose`` as JSON. Tables are step ranges x layers x heads; measured
    figures are means over steps and prompts, and those of the candidate that was chosen.

    Args:
        candidates (list[Candidate]): the strategies that were chosen.
        first_steps (list[int]): first denoising step of each range; the first is 0.
        num_steps (int): steps of the schedule.
        choices (table of int): places in ``candidates``.
        model (str): model that was measured.
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

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["sparse-attn-assignment"] = "sparse-attn-assignment"
    version: Literal[1] = 1
    candidates: list[Candidate] = Field(min_length=1)
    first_steps: list[int] = Field(min_length=1)
    num_steps: int = Field(ge=1)
    choices: IntTable
    model: str
    layout: dict[str, Any]
    head_dim: int
    budget: float
    cost: Literal["time", "density"]
    costs: FloatTable
    errors: FloatTable
    predicted: dict[str, float] = Field(default_factory=dict)
    held_out: list[dict[str, Any]] = Field(default_factory=list)
    prompts: list[str] = Field(default_factory=list)
    made: dict[str, Any] = Field(default_factory=dict)

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

    @classmethod
    def load(cls, path: Path) -> "HeadAssignment":
        """Read and check a file.

        Raises:
            ParameterError: it cannot be read, or is not an assignment.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ParameterError(f"cannot read assignment {path}: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ParameterError(f"{path} is not an assignment: not JSON") from None
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"])
            raise ParameterError(f"{path} is not an assignment: {place or 'file'}: {fault['msg']}") from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; each row of numbers on one line."""
        text = re.sub(r"\[[^][{}]*]", _join_lines, self.model_dump_json(indent=1))
        partial = path.with_name(path.name + ".new")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

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

    def check_size(self, num_layers: int, num_heads: int | None) -> None:
        """Refuse a model of other layers or heads; ``num_heads`` is None where it is not known.

        Raises:
            ParameterError: the assignment is of another model.
        """
        layers, heads = self.size
        if (num_layers, heads if num_heads is None else num_heads) != (layers, heads):
            given = f"{num_layers} layers" + ("" if num_heads is None else f" of {num_heads} heads")
            raise ParameterError(
                f"the assignment is of {self.model}, {layers} layers of {heads} heads; this model has "
                f"{given}; run python -m harness.compose for it, or leave assignment out"
            )

    def check_call(self, query: torch.Tensor, context: AttentionContext) -> None:
        """Refuse a call of another model or shape.

        Raises:
            ParameterError: layout, layers, heads or head dimension are not those of the assignment.
        """
        asked = (context.layout, context.num_layers, query.shape[1], query.shape[3])
        if asked != (TokenLayout(**self.layout), *self.size, self.head_dim):
            raise ParameterError(
                f"the assignment is of {self.model}: {TokenLayout(**self.layout).describe()}, "
                f"{self.size[0]} layers of {self.size[1]} heads of {self.head_dim}; this call has "
                f"{context.layout.describe()}, {context.num_layers} layers of {query.shape[1]} heads of "
                f"{query.shape[3]}; run python -m harness.compose for this model and size, or leave "
                "assignment out"
            )


def _shape(table: list[list[list[Any]]]) -> tuple[int, int, int] | None:
    """Sizes of a nested list; None where rows differ or are empty."""
    layers, heads = {len(rows) for rows in table}, {len(row) for rows in table for row in rows}
    if len(layers) != 1 or len(heads) != 1 or 0 in layers | heads:
        return None
    return len(table), layers.pop(), heads.pop()


def _join_lines(match: re.Match[str]) -> str:
    return re.sub(r"\n\s*", " ", match[0])
