"""Thresholds that the authors of SpargeAttn published per model, as a `Calibration`."""

import math
import re
from pathlib import Path
from typing import Any

import torch

from core.calibration import Calibration
from core.errors import ParameterError

PUBLISHED_SUFFIX = ".pt"
# A layer's entries, in our names where they are used.
NAMES = {
    "is_sparse": None,
    "cdfthreshd": "cdf",
    "simthreshd1": "similarity_threshold",
    "simthreshd2": None,
    "pvthreshd": "skip_threshold",
}
# What the file's thresholds were found with; the sink is added where they are used.
PARAMETERS = {"block_size": 128, "key_block_size": 64, "attention_sink": True}
NO_SKIP = 1000.0  # log2 units: no score is that far below another
LAYER = re.compile(r"(?P<stack>(?:.*\.)?[^.0-9][^.]*)\.(?P<place>\d+)\.(?P<rest>.+)\.inner_attention")


def read_published(path: Path) -> Calibration:
    """Read a file of per-head thresholds; nothing in it is executed.

    It maps ``<module>.inner_attention.<name>`` to a tensor with one number per head. Modules are told apart
    by their whole path: ``transformer_blocks.0`` is not ``single_transformer_blocks.0``. Stacks of layers
    follow each other as in the file, which has the order of the model.

    Args:
        path (Path): the file.

    Returns:
        Calibration: ``cdf``, ``similarity_threshold`` and ``skip_threshold`` of every layer and head; heads
        that are marked as not sparse keep everything and skip nothing.

    Raises:
        ParameterError: it cannot be read, or holds anything else.
    """
    layers = _layers(path, _entries(path))
    values = {own: [_numbers(entries, theirs) for entries in layers] for theirs, own in NAMES.items() if own}
    for layer, entries in enumerate(layers):
        dense = [head for head, sparse in enumerate(entries["is_sparse"].tolist()) if not sparse]
        for head in dense:
            values["cdf"][layer][head] = 1.0
            values["skip_threshold"][layer][head] = NO_SKIP
    return Calibration(
        strategy="sparge",
        parameters=PARAMETERS,
        values=values,
        model=path.name,
        made={"source": "published thresholds of SpargeAttn"},
    )


def _entries(path: Path) -> dict[str, torch.Tensor]:
    try:
        entries: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ParameterError(f"cannot read calibration {path}: {error.strerror}") from None
    except Exception as error:  # files that are none fail in dozens of types
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ParameterError(f"{path} is not a file of tensors: {reason}") from None
    if not isinstance(entries, dict) or not entries:
        raise ParameterError(f"{path} holds a {type(entries).__name__}, expected a dict of tensors by name")
    for name, value in entries.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.dim() != 1:
            raise ParameterError(f"{path}: entry {name!r} must be a tensor with one number per head")
        if not math.isfinite(float(value.double().sum())):
            raise ParameterError(f"{path}: entry {name} is not finite")
    return entries


def _layers(path: Path, entries: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The entries of every layer by their last name, stack after stack."""
    stacks: dict[tuple[str, str], dict[int, dict[str, torch.Tensor]]] = {}
    for key, value in entries.items():
        module, _, name = key.rpartition(".")
        found = LAYER.fullmatch(module)
        if found is None or name not in NAMES:
            raise ParameterError(
                f"{path}: expected names <stack>.<number>.<module>.inner_attention.<one of "
                f"{', '.join(NAMES)}>, got '{key}'"
            )
        stack = stacks.setdefault((found["stack"], found["rest"]), {})
        stack.setdefault(int(found["place"]), {})[name] = value
    layers = []
    for (stack_name, _), stack in stacks.items():
        if sorted(stack) != [*range(len(stack))]:
            raise ParameterError(f"{path}: layers of '{stack_name}' are {sorted(stack)}, expected all from 0")
        layers += [stack[place] for place in range(len(stack))]
    heads = {len(value) for value in entries.values()}
    if len(heads) != 1 or any(NAMES.keys() - {"simthreshd2"} - entry.keys() for entry in layers):
        raise ParameterError(
            f"{path}: every layer must have {', '.join(NAMES)}, of one number of heads; got "
            f"{len(entries)} entries of {sorted(heads)} heads for {len(layers)} layers"
        )
    return layers


def _numbers(entries: dict[str, torch.Tensor], name: str) -> list[float]:
    return [float(number) for number in entries[name].float()]
