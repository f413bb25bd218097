"""Calibration: a strategy's settings for every layer and head, as a file."""

import json
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core.context import AttentionContext
from core.errors import ParameterError
from core.layout import TokenLayout


class Calibration(BaseModel):
    """Values of parameters for every layer and head, with what they were measured on.

    Written by ``python -m harness.tune`` as JSON. What is not known of values from elsewhere is None or
    empty.

    Args:
        strategy (str): registered name of the calibrated strategy.
        parameters (dict): the strategy's other parameters during calibration.
        values (dict[str, list[list[float]]]): by parameter, its values, layers x heads.
        model (str): model that was measured.
        layout (dict, Optional): fields of its `TokenLayout`.
        head_dim (int, Optional): head dimension.
        errors (list[list[float]], Optional): largest relative L1 error of the attention output on the
            calibration inputs at those values, layers x heads.
        max_error (float, Optional): bound that the values were chosen under.
        held_out (dict): executed density, and mean and largest relative L1 error, on a prompt that the
            values were not chosen on.
        prompts (list[str]): calibration prompts.
        steps (list[int]): denoising steps that were measured.
        num_steps (int, Optional): steps of the schedule.
        made (dict): device, dtype, versions, commit, date, seconds and command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["sparse-attn-calibration"] = "sparse-attn-calibration"
    version: Literal[1] = 1
    strategy: str
    parameters: dict[str, Any]
    values: dict[str, list[list[float]]] = Field(min_length=1)
    model: str
    layout: dict[str, Any] | None = None
    head_dim: int | None = None
    errors: list[list[float]] | None = None
    max_error: float | None = None
    held_out: dict[str, Any] = Field(default_factory=dict)
    prompts: list[str] = Field(default_factory=list)
    steps: list[int] = Field(default_factory=list)
    num_steps: int | None = None
    made: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_tables(self) -> Self:
        tables = [*self.values.values()] + ([] if self.errors is None else [self.errors])
        heads = {len(row) for table in tables for row in table}
        if len({len(table) for table in tables}) != 1 or len(heads) != 1:
            raise ValueError("values and errors must be tables of the same layers and heads")
        return self

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read and check a file.

        Raises:
            ParameterError: it cannot be read, or is not a calibration.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ParameterError(f"cannot read calibration {path}: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ParameterError(f"{path} is not a calibration: not JSON") from None
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"])
            raise ParameterError(f"{path} is not a calibration: {place or 'file'}: {fault['msg']}") from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        partial = path.with_name(path.name + ".new")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @property
    def size(self) -> tuple[int, int]:
        """Layers and heads."""
        table = next(iter(self.values.values()))
        return len(table), len(table[0])

    def check_size(self, num_layers: int, num_heads: int | None) -> None:
        """Refuse a model of other layers or heads; ``num_heads`` is None where it is not known.

        Raises:
            ParameterError: the calibration is of another model.
        """
        layers, heads = self.size
        if (num_layers, heads if num_heads is None else num_heads) != (layers, heads):
            given = f"{num_layers} layers" + ("" if num_heads is None else f" of {num_heads} heads")
            raise ParameterError(
                f"the calibration is of {self.model}, {layers} layers of {heads} heads; this model has "
                f"{given}; run python -m harness.tune for it, or leave calibration out"
            )

    def check_call(self, query: torch.Tensor, context: AttentionContext) -> None:
        """Refuse a call of another model or shape.

        Raises:
            ParameterError: layers or heads, or layout or head dimension where they are known, are not those
                of the calibration.
        """
        own_layout = context.layout if self.layout is None else TokenLayout(**self.layout)
        head_dim = self.head_dim or query.shape[3]
        asked = (context.layout, context.num_layers, query.shape[1], query.shape[3])
        if asked != (own_layout, *self.size, head_dim):
            raise ParameterError(
                f"the calibration is of {self.model}: {own_layout.describe()}, {self.size[0]} layers of "
                f"{self.size[1]} heads of {head_dim}; this call has {context.layout.describe()}, "
                f"{context.num_layers} layers of {query.shape[1]} heads of {query.shape[3]}; run "
                "python -m harness.tune for this model and size, or leave calibration out"
            )

    def tables(self, device: torch.device) -> dict[str, torch.Tensor]:
        """By parameter, its values on a device, ``[layers, heads]`` fp32."""
        return {
            name: torch.tensor(table, dtype=torch.float32, device=device)
            for name, table in self.values.items()
        }
