"""Reordering of tokens along the sequence dimension."""

from typing import TypeVar

import torch

from core.argument_checks import check_tensors_given
from core.errors import LayoutError
from kernels_common.triton_choice import runs_triton

ORDER_DTYPES = (torch.int32, torch.int64)

Tokens = TypeVar("Tokens", torch.Tensor, tuple[torch.Tensor, ...])


def gather_tokens(tokens: Tokens, order: torch.Tensor) -> Tokens:
    """Tokens in the order of ``order``: ``result[..., i, :] = tensor[..., order[i], :]``.

    Several tensors, such as query, key and value, are moved together: that is one launch on a GPU.

    Args:
        tokens (Tensor or tuple[Tensor, ...]): ``[B, H, S, D]`` each; tensors of a tuple may differ in H and
            strides only.
        order (Tensor): int32 or int64 token indices, ``[N]`` for all heads alike or ``[B or 1, H or 1, N]``;
            N may differ from S. The indices are trusted.

    Returns:
        Tensor or tuple[Tensor, ...]: ``[B, H, N, D]`` each, contiguous.

    Raises:
        LayoutError: shapes, dtypes or devices do not fit together.
    """
    sources = _check(tokens, order)
    if _moves_by_triton(sources):
        count = order.shape[-1]
        results = tuple(part.new_empty(*part.shape[:2], count, part.shape[3]) for part in sources)
        _move(sources, results, order, scatter=False)
    elif order.dim() == 1:
        results = tuple(part.index_select(2, order) for part in sources)
    else:
        results = tuple(part.gather(2, _expand(order, part)) for part in sources)
    return results if isinstance(tokens, tuple) else results[0]


def scatter_tokens(tokens: Tokens, order: torch.Tensor, *, like: torch.Tensor | None = None) -> Tokens:
    """What :func:`gather_tokens` undid: ``result[..., order[i], :] = tensor[..., i, :]``.

    Args:
        tokens (Tensor or tuple[Tensor, ...]): ``[B, H, S, D]`` each; tensors of a tuple may differ in H and
            strides only.
        order (Tensor): permutation of 0 to S - 1, ``[S]`` or ``[B or 1, H or 1, S]`` int32 or int64. It is
            trusted.
        like (Tensor, Optional): tensor of the results' shape whose memory order they get. Default: each that
            of its source

    Returns:
        Tensor or tuple[Tensor, ...]: ``[B, H, S, D]`` each.

    Raises:
        LayoutError: shapes, dtypes or devices do not fit together.
    """
    sources = _check(tokens, order)
    if order.shape[-1] != sources[0].shape[2]:
        raise LayoutError(
            f"a permutation of {sources[0].shape[2]} tokens must list each once, "
            f"got {order.shape[-1]} indices"
        )
    results = tuple(torch.empty_like(part if like is None else like, dtype=part.dtype) for part in sources)
    if _moves_by_triton(sources):
        _move(sources, results, order, scatter=True)
    elif order.dim() == 1:
        results = tuple(
            target.index_copy_(2, order.long(), part) for part, target in zip(sources, results, strict=True)
        )
    else:
        results = tuple(
            target.scatter_(2, _expand(order, part), part)
            for part, target in zip(sources, results, strict=True)
        )
    return results if isinstance(tokens, tuple) else results[0]


def invert_permutation(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``order``, ``[..., S]`` in its dtype, in linear time.

    Raises:
        LayoutError: it is no int32 or int64 tensor.
    """
    check_tensors_given(order=order)
    if order.dtype not in ORDER_DTYPES:
        raise LayoutError(f"an order must be int32 or int64, got {order.dtype}")
    places = torch.arange(order.shape[-1], dtype=order.dtype, device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order.long(), places)


def _check(tokens: torch.Tensor | tuple[torch.Tensor, ...], order: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as a tuple."""
    sources = tokens if isinstance(tokens, tuple) else (tokens,)
    check_tensors_given(order=order, **{f"tokens[{i}]": part for i, part in enumerate(sources)})
    if not sources:
        raise LayoutError("tokens must be a tensor or a tuple of at least one tensor, got ()")
    first = sources[0]
    for part in sources:
        alike = (part.dtype, part.device, part.shape[0], part.shape[2:]) == (
            first.dtype, first.device, first.shape[0], first.shape[2:]
        )  # fmt: skip
        if part.dim() != 4 or not alike:
            raise LayoutError(
                "tokens must be [B, H, S, D], alike but for H; got "
                + ", ".join(f"{other.dtype} {tuple(other.shape)} on {other.device}" for other in sources)
            )
        per_head = (
            order.dim() == 3 and order.shape[0] in (1, part.shape[0]) and order.shape[1] in (1, part.shape[1])
        )
        if (
            order.dtype not in ORDER_DTYPES
            or order.device != part.device
            or not (order.dim() == 1 or per_head)
        ):
            raise LayoutError(
                f"an order for tokens {tuple(part.shape)} on {part.device} must be int32 or int64 [N] or "
                f"[B or 1, H or 1, N] there, got {order.dtype} {tuple(order.shape)} on {order.device}"
            )
    return sources


def _moves_by_triton(sources: tuple[torch.Tensor, ...]) -> bool:
    """Not where torch's own functions do more: they have gradients and can be part of a compiled graph."""
    if torch.compiler.is_compiling():
        return False
    needs_grad = torch.is_grad_enabled() and any(part.requires_grad for part in sources)
    return not needs_grad and runs_triton(sources[0])


def _move(
    sources: tuple[torch.Tensor, ...],
    targets: tuple[torch.Tensor, ...],
    order: torch.Tensor,
    *,
    scatter: bool,
) -> None:
    from kernels_common.permutation_triton import move_tokens_triton

    move_tokens_triton(sources, targets, order, scatter=scatter)


def _expand(order: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    batch, heads, _, dim = tensor.shape
    return order.long()[..., None].expand(batch, heads, -1, dim)
