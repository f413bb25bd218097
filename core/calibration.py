"""Calibration: a strategy's settings for every layer and head, as a file."""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, FiniteFloat, model_validator

from core.model_file import ModelFile


class Calibration(ModelFile):
    """Values of parameters for every layer and head, with what they were measured on.

    Written by ``python -m harness.tune`` as JSON. What is not known of values from elsewhere is None or
    empty.

    Args:
        strategy (str): registered name of the calibrated strategy.
        parameters (dict): the strategy's other parameters during calibration.
        values (dict[str, list[list[float]]]): by parameter, its values, layers x heads.
        model (str): model that was measured.
        denoisers (list[DenoiserRecord], Optional): what its denoisers are.
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

    noun: ClassVar[str] = "a calibration"
    command: ClassVar[str] = "harness.tune"

    format: Literal["sparse-attn-calibration"] = "sparse-attn-calibration"
    version: Literal[1] = 1
    strategy: str
    parameters: dict[str, Any]
    values: dict[str, list[list[FiniteFloat]]] = Field(min_length=1)
    errors: list[list[FiniteFloat]] | None = None
    max_error: float | None = None
    held_out: dict[str, Any] = Field(default_factory=dict)
    steps: list[int] = Field(default_factory=list)
    num_steps: int | None = None

    @model_validator(mode="after")
    def _check_tables(self) -> Self:
        tables = [*self.values.values()] + ([] if self.errors is None else [self.errors])
        heads = {len(row) for table in tables for row in table}
        if len({len(table) for table in tables}) != 1 or len(heads) != 1:
            raise ValueError("values and errors must be tables of the same layers and heads")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Layers and heads."""
        table = next(iter(self.values.values()))
        return len(table), len(table[0])

    def tables(self, device: torch.device) -> dict[str, torch.Tensor]:
        """By parameter, its values on a device, ``[layers, heads]`` fp32."""
        return {
            name: torch.tensor(table, dtype=torch.float32, device=device)
            for name, table in self.values.items()
        }
