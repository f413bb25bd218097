"""Token orders of an attention call, whose mask may be about a permutation of the tensors' own sequence.

Either the tokens are copied into the mask's sequence and the outputs back, or a kernel reads the orders in
its loads.
"""

from typing import NamedTuple

import torch

from core.argument_checks import check_tensors_given
from core.errors import LayoutError, UnsupportedCallError
from kernels_common.permutation import ORDER_DTYPES, gather_tokens, scatter_tokens


class TokenOrders(NamedTuple):
    """Token at every place of the mask's sequence; None where places are tokens.

    Args:
        query (Tensor, Optional): permutation ``[Nq]`` or ``[B or 1, Hq or 1, Nq]``, int32 or int64.
        key (Tensor, Optional): permutation ``[Nk]`` or ``[B or 1, Hkv or 1, Nk]``, int32 or int64.
    """

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self.query is not None or self.key is not None


def check_orders(
    query: torch.Tensor,
    key: torch.Tensor,
    orders: TokenOrders,
    key_lengths: torch.Tensor | None,
    causal: bool,
) -> None:
    """Refuse orders that do not fit the tensors, and what is about the tensors' own sequence."""
    named = ((name, order) for name, order in zip(orders._fields, orders, strict=True) if order is not None)
    for name, order in named:
        check_tensors_given(**{f"{name}_order": order})
        tensor = query if name == "query" else key
        batch, heads, length, _ = tensor.shape
        per_head = order.dim() == 3 and order.shape[0] in (1, batch) and order.shape[1] in (1, heads)
        fits = order.shape[-1:] == (length,) and (order.dim() == 1 or per_head)
        if not fits or order.dtype not in ORDER_DTYPES or order.device != tensor.device:
            raise LayoutError(
                f"{name}_order must be int32 or int64 [{length}] or [1 or {batch}, 1 or {heads}, {length}] "
                f"on {tensor.device}; got {order.dtype} {tuple(order.shape)} on {order.device}"
            )
    if orders.given and (causal or key_lengths is not None):
        what = "causal" if causal else "key_lengths"
        raise UnsupportedCallError(
            f"{what} is about the tensors' own sequence and is not supported with query_order or key_order; "
            "leave out either"
        )


def gather_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, orders: TokenOrders
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value in the mask's sequence; where all have one order, in one launch on a GPU."""
    if orders.query is not None and orders.query is orders.key:
        query, key, value = gather_tokens((query, key, value), orders.query)
        return query, key, value
    if orders.key is not None:
        key, value = gather_tokens((key, value), orders.key)
    return (query if orders.query is None else gather_tokens(query, orders.query)), key, value


def gather_bias(bias: torch.Tensor | None, orders: TokenOrders) -> torch.Tensor | None:
    """A bias ``[B or 1, 1 or Hkv or Hq, Nk]`` in the mask's sequence.

    Raises:
        LayoutError: the order is one of heads that the bias does not have.
    """
    if bias is None or orders.key is None:
        return bias
    order = orders.key.long()
    if order.dim() == 1:
        return bias.index_select(2, order)
    shape = torch.broadcast_shapes(bias.shape[:2], order.shape[:2]) if _alike(bias, order) else None
    if shape is None:
        raise LayoutError(
            f"bias {tuple(bias.shape)} and key_order {tuple(order.shape)} must have as many heads, or 1"
        )
    return bias.expand(*shape, -1).gather(2, order.expand(*shape, -1))


def scatter_output(output: torch.Tensor, order: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Output ``[B, Hq, Nq, D]`` of the mask's sequence at its tokens, in the memory order of the query."""
    return output if order is None else scatter_tokens(output, order, like=query)


def scatter_lse(lse: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Log-sum-exp ``[B, Hq, Nq]`` of the mask's sequence at its tokens."""
    return lse if order is None else scatter_tokens(lse[..., None], order)[..., 0]


def _alike(bias: torch.Tensor, order: torch.Tensor) -> bool:
    pairs = zip(bias.shape[:2], order.shape[:2], strict=True)
    return all(one == other or 1 in (one, other) for one, other in pairs)
