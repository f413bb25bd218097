"""What the attention processors of all families share."""

from typing import Any

from core.adapter import AttendFunction
from core.errors import InstallError


class StrategyProcessor:
    """Attention processor of one layer with a strategy in place of dense attention.

    A family's own says in its ``__call__`` how tokens are projected and what becomes of the output.

    Args:
        original (Any): the processor this one stands in for.
        attend (AttendFunction): attention over ``[B, H, S, D]`` tensors.
    """

    # diffusers looks for these two on processors that take part in its dispatcher and parallelism.
    _attention_backend = None
    _parallel_config = None

    def __init__(self, original: Any, attend: AttendFunction) -> None:
        self.original = original
        self.attend = attend


def check_original(original: Any, *expected: type, family: str, hint: str = "") -> None:
    """Refuse a processor whose projections a family's own does not follow.

    Args:
        original (Any): the processor that stands in the model.
        *expected (type): diffusers' own; subclasses are others.
        family (str): the family, for the message.
        hint (str): how else such a processor gets there, in brackets. Default: nothing

    Raises:
        InstallError: it is none of them.
    """
    if type(original) not in expected:
        raise InstallError(
            f"expected diffusers' own {family} attention processor, found {type(original).__name__}; "
            f"restore the model's processors{hint} before installing a strategy"
        )
