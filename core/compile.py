"""The one custom operator behind which a strategy hides from torch.compile.

A compiled block must not read Python state such as the layer or the step: each value would be a
guard, and torch recompiles until it gives up. The operator takes them as a tensor instead, so that
all blocks share one graph. Operators accept tensors only, so live sessions are found by a number in
a table of weak references; it is the only module-level state of the project.
"""

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from core.errors import UnsupportedCallError

if TYPE_CHECKING:
    from core.session import DenoiserSession

_sessions: "weakref.WeakValueDictionary[int, DenoiserSession]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_session(session: "DenoiserSession") -> int:
    """Number under which compiled code finds ``session`` as long as it lives."""
    number = next(_numbers)
    _sessions[number] = session
    return number


@torch.library.custom_op("sparse_attn::attend", mutates_args=())
def attend_compiled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """`DenoiserSession.attend` for compiled code.

    Args:
        query (Tensor): ``[B, H, S, D]``; key and value likewise.
        place (Tensor): ``[2]`` int64 on the CPU: session number and layer index.

    Returns:
        Tensor: ``[B, H, S, D]``, contiguous.
    """
    number, layer_index = place.tolist()
    output = _sessions[number].attend(layer_index, query, key, value)
    return output.clone(memory_format=torch.contiguous_format)


def _refuse_gradients(ctx: Any, gradient: torch.Tensor) -> None:
    raise UnsupportedCallError(
        "compiled blocks with a strategy have no gradients; train without torch.compile, or call under "
        "torch.no_grad()"
    )


attend_compiled.register_autograd(_refuse_gradients)


@attend_compiled.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)
