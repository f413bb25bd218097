"""StrategyParameters: typed, validated parameters of a strategy."""

import difflib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import ParameterError


class StrategyParameters(BaseModel):
    """Parameters that every strategy has; a strategy's own parameters are fields of a subclass.

    Declare a field with ``pydantic.Field``: default, range (``ge``, ``le``, ``gt``, ``lt``) and a
    description that names the unit. Text such as ``"0.5"`` or ``"true"`` is converted, so that the
    command line and Python take the same values.

    Args:
        dense_layers (int): the first layers of the model that stay dense. Default: 0
        dense_timesteps (int): the first denoising steps (highest noise) that stay dense. Default: 0
        nan_guard (str): what a non-finite output does. ``"raise"`` raises NonFiniteOutputError;
            ``"dense"`` repeats that call with dense attention and reports it (one device
            synchronisation per call); ``"off"`` does not look. Default: ``"raise"``
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True
    )

    dense_layers: int = Field(0, ge=0, description="first layers that stay dense")
    dense_timesteps: int = Field(0, ge=0, description="first denoising steps that stay dense")
    nan_guard: Literal["raise", "dense", "off"] = Field("raise", description="what a non-finite output does")

    @classmethod
    def build(cls, owner: str, values: dict[str, Any]) -> Self:
        """Validate ``values`` for the strategy called ``owner``.

        Raises:
            ParameterError: an unknown name, a wrong type or a value out of range; the message lists
                every fault in one line.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            faults = "; ".join(cls._describe_fault(fault) for fault in error.errors())
            raise ParameterError(f"strategy '{owner}': {faults}") from None

    @classmethod
    def _describe_fault(cls, fault: Any) -> str:
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(path, cls.model_fields, n=1)
            hint = f", did you mean '{close[0]}'?" if close else ""
            return f"unknown parameter '{path}'{hint} (known: {', '.join(cls.model_fields)})"
        message = fault["msg"].removeprefix("Value error, ")
        return f"{path or 'parameters'}: {message}, got {fault['input']!r}"
