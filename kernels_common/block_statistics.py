"""Mean and self-similarity of every block of tokens, and the mean token of every head.

Shape letters: B batch, H heads, S tokens, M blocks, D head dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from core.argument_checks import check_tensors_given
from core.block_mask import block_lengths
from core.errors import LayoutError, ParameterError
from kernels_common.permutation import ORDER_DTYPES
from kernels_common.triton_choice import runs_triton


class BlockStatistics(NamedTuple):
    """Result of :func:`block_means`, fp32 (fp64 for fp64 input).

    Args:
        mean (Tensor): mean token of every block, ``[B, H, M, D]``.
        similarity (Tensor): mean cosine of all pairs of tokens of the block, ``[B, H, M]``, in [0, 1].
    """

    mean: torch.Tensor
    similarity: torch.Tensor


def block_means(
    tensor: torch.Tensor,
    block: int,
    *,
    subtract: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> BlockStatistics:
    """Mean token and self-similarity of every block (SpargeAttn, arXiv 2502.18137), in one read.

    Self-similarity is the mean of ``cos(x_i, x_j)`` over all i and j of the block, which equals
    ``|mean_i x_i / |x_i||^2``. A zero token has no direction: its cosines count as 0. A ragged last block
    has the statistics of its own tokens only.

    Args:
        tensor (Tensor): ``[B, H, S, D]``, any strides.
        block (int): tokens of a block, >= 1.
        subtract (Tensor, Optional): ``[B, H, 1, D]`` taken from every token first, such as the keys' mean
            (:func:`token_mean`). Default: none
        order (Tensor, Optional): ``[N]`` int32 or int64: blocks are of the tokens in this order, which are
            read where they stand. The indices are trusted. Default: ``[0, ..., S - 1]``

    Returns:
        BlockStatistics: mean ``[B, H, M, D]`` and similarity ``[B, H, M]``.

    Raises:
        LayoutError: shapes or devices do not fit together.
        ParameterError: ``block`` is no positive whole number.
    """
    _check_tokens(tensor)
    if not isinstance(block, int) or block < 1:
        raise ParameterError(f"a block must have a whole number of tokens, at least 1; got {block!r}")
    if subtract is not None:
        check_tensors_given(subtract=subtract)
        expected = (*tensor.shape[:2], 1, tensor.shape[3])
        if tuple(subtract.shape) != expected or subtract.device != tensor.device:
            raise LayoutError(
                f"subtract must be {expected} on {tensor.device}, got {tuple(subtract.shape)} "
                f"on {subtract.device}"
            )
        subtract = subtract.detach()
    if order is not None:
        check_tensors_given(order=order)
    if order is not None and (
        order.dim() != 1 or order.dtype not in ORDER_DTYPES or order.device != tensor.device
    ):
        raise LayoutError(
            f"order must be int32 or int64 [N] on {tensor.device}, got {order.dtype} {tuple(order.shape)} "
            f"on {order.device}"
        )
    if not runs_triton(tensor):
        tokens = tensor.detach() if order is None else tensor.detach().index_select(2, order)
        return block_means_torch(tokens, block, subtract)
    from kernels_common.block_statistics_triton import block_means_triton

    return BlockStatistics(*block_means_triton(tensor.detach(), block, subtract, order))


def token_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of every head, in one read.

    Args:
        tensor (Tensor): ``[B, H, S, D]``, any strides.

    Returns:
        Tensor: ``[B, H, 1, D]`` fp32 (fp64 for fp64 input).

    Raises:
        LayoutError: not ``[B, H, S, D]`` with at least one token.
    """
    _check_tokens(tensor)
    return tensor.detach().mean(2, keepdim=True, dtype=_precise(tensor))


def block_means_torch(tensor: torch.Tensor, block: int, subtract: torch.Tensor | None) -> BlockStatistics:
    """Plain form of :func:`block_means`."""
    tokens = tensor.to(_precise(tensor))
    if subtract is not None:
        tokens = tokens - subtract.to(tokens.dtype)
    lengths = block_lengths(tensor.shape[2], block, tensor.device).to(tokens.dtype)[:, None]  # [M, 1]
    units = F.normalize(tokens, dim=-1)
    mean, direction = (_block_sums(part, block) / lengths for part in (tokens, units))
    return BlockStatistics(mean, direction.square().sum(-1))


def _check_tokens(tensor: torch.Tensor) -> None:
    check_tensors_given(tokens=tensor)
    if tensor.dim() != 4 or not tensor.is_floating_point() or tensor.shape[2] == 0:
        raise LayoutError(
            f"expected floating [B, H, S, D] with S >= 1, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _precise(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _block_sums(tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Sum over every block, ``[B, H, M, D]``."""
    return F.pad(tokens, (0, 0, 0, -tokens.shape[2] % block)).unflatten(2, (-1, block)).sum(3)
