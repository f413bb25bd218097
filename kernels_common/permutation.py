"""Reordering of tokens along the sequence dimension."""

import torch


def gather_tokens(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens in the order of ``order``: ``result[..., i, :] = tensor[..., order[i], :]``.

    Args:
        tensor (Tensor): ``[B, H, S, D]``.
        order (Tensor): int64 token indices, ``[N]`` for all heads alike or ``[B or 1, H or 1, N]``; N may
            differ from S.

    Returns:
        Tensor: ``[B, H, N, D]``.
    """
    if order.dim() == 1:
        return tensor.index_select(2, order)
    return tensor.gather(2, _expand(order, tensor))


def scatter_tokens(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What :func:`gather_tokens` undid: ``result[..., order[i], :] = tensor[..., i, :]``.

    Args:
        tensor (Tensor): ``[B, H, S, D]``.
        order (Tensor): permutation of 0 to S - 1, ``[S]`` or ``[B or 1, H or 1, S]`` int64.

    Returns:
        Tensor: ``[B, H, S, D]``.
    """
    if order.dim() == 1:
        return torch.empty_like(tensor).index_copy_(2, order, tensor)
    return torch.empty_like(tensor).scatter_(2, _expand(order, tensor), tensor)


def invert_permutation(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``order``, ``[..., S]`` int64, in linear time."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _expand(order: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    batch, heads, _, dim = tensor.shape
    return order[..., None].expand(batch, heads, -1, dim)
