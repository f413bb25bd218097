"""Checks of arguments that public functions share: types and numbers only, no work on a device."""

from typing import Any

import torch

from core.errors import LayoutError, ParameterError


def check_tensors_given(**arguments: object) -> None:
    """Refuse arguments that are no tensors.

    Raises:
        LayoutError: one of them is not; the message names it.
    """
    for name, argument in arguments.items():
        if not isinstance(argument, torch.Tensor):
            raise LayoutError(f"{name} must be a tensor, got {type(argument).__name__}")


def check_alike(**tensors: torch.Tensor) -> None:
    """Refuse tensors of several dtypes or devices, or of whole numbers.

    Raises:
        LayoutError: the message has the dtype and device of each.
    """
    first = next(iter(tensors.values()))
    alike = all(part.dtype == first.dtype and part.device == first.device for part in tensors.values())
    if not alike or not first.is_floating_point():
        found = ", ".join(f"{name} {part.dtype} on {part.device}" for name, part in tensors.items())
        raise LayoutError(f"expected tensors of one floating dtype on one device; got {found}")


def check_causal(causal: bool) -> None:
    """Refuse what is no bool, which torch's operators would answer with their schema.

    Raises:
        ParameterError: it is none.
    """
    if not isinstance(causal, bool):
        raise ParameterError(f"causal must be True or False, got {causal!r}")


def shapes_of(**tensors: torch.Tensor) -> str:
    """One phrase for messages: ``query (1, 2, 64, 16), key (1, 2, 32, 16)``."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def check_block_shape(block_size: Any, *lengths: Any) -> None:
    """Refuse a block size that is not two positive whole numbers, and lengths that are no whole numbers.

    Raises:
        LayoutError: one of them is neither.
    """
    sizes = block_size if isinstance(block_size, tuple | list) else ()
    whole = all(isinstance(number, int | torch.SymInt) for number in (*sizes, *lengths))
    if len(sizes) != 2 or not whole or any(size < 1 for size in sizes) or any(size < 0 for size in lengths):
        numbers = ", ".join(map(repr, lengths))
        raise LayoutError(
            "expected the tokens of a (query block, key block), such as (128, 128), and whole numbers of "
            f"query and key tokens; got {block_size!r} and {numbers}"
        )
