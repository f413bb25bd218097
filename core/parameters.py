"""StrategyParameters: typed, validated parameters of a strategy."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from core.errors import ParameterError


class StrategyParameters(BaseModel):
    """Parameters that every strategy has; a strategy's own parameters are fields of a subclass.

    Declare a field with ``pydantic.Field``: default, range (``ge``, ``le``, ``gt``, ``lt``) and a
    description that names the unit. Text such as ``"0.5"`` or ``"true"`` is converted, so that the
    command line and Python take the same values; True and False are no numbers.

    Where one parameter chooses a variant, ``read_by`` says which others each of its values reads, as
    ``{"variant": {"a": ("width",), "b": ()}}``: a parameter named there must keep its default under the
    values that do not read it, so that none is silently ignored.

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

    read_by: ClassVar[Mapping[str, Mapping[str, Collection[str]]]] = {}

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

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bools_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        types = _types_within(cls.model_fields[str(info.field_name)].annotation)
        if types & {int, float} and not types & {bool, Any} and _holds_bool(value):
            raise ValueError("expected a number, not true or false")
        return value

    @model_validator(mode="after")
    def _refuse_unread(self) -> Self:
        faults = [
            fault
            for chooser, readers in self.read_by.items()
            for name in sorted(set().union(*readers.values()))
            if (fault := self._unread(name, chooser, readers))
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _unread(self, name: str, chooser: str, readers: Mapping[str, Collection[str]]) -> str | None:
        """What to do about a parameter that the present variant does not read; None if all is well."""
        chosen, default = getattr(self, chooser), type(self).model_fields[name].default
        if name in readers[chosen] or getattr(self, name) == default:
            return None
        able = " or ".join(f"'{value}'" for value, read in readers.items() if name in read)
        written = "None (null on a command line)" if default is None else f"{default!r}"
        return (
            f"{name} is read by {chooser} {able}, not by '{chosen}'; take such a {chooser}, or leave {name} "
            f"at its default {written} (where a preset sets it, give that value beside the preset)"
        )

    @classmethod
    def _describe_fault(cls, fault: Any) -> str:
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(path, cls.model_fields, n=1)
            hint = f", did you mean '{close[0]}'?" if close else ""
            return f"unknown parameter '{path}'{hint} (known: {', '.join(cls.model_fields)})"
        message = fault["msg"].removeprefix("Value error, ")
        return f"{path or 'parameters'}: {message}, got {fault['input']!r}"


def _types_within(annotation: Any) -> set[Any]:
    """The annotation and everything in its brackets, at any depth; the values of a Literal are none."""
    inner = () if get_origin(annotation) is Literal else get_args(annotation)
    return {annotation}.union(*map(_types_within, inner))


def _holds_bool(value: Any) -> bool:
    """Whether a value is a bool or a sequence, at any depth, that has one."""
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_bool, value)))
