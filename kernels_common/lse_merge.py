"""Merging of attention results over disjoint sets of keys."""

import torch

from core.argument_checks import check_tensors_given, shapes_of
from core.errors import LayoutError


def merge_by_lse(
    output: torch.Tensor, lse: torch.Tensor, other_output: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint key sets from the attention over each.

    Each part is weighted by its share of the softmax denominator. A part with log-sum-exp -inf adds
    nothing, whatever its output holds; where both are -inf the result is 0 with -inf.

    Args:
        output (Tensor): ``[..., Nq, D]``.
        lse (Tensor): natural log-sum-exp of its scores, ``[..., Nq]`` fp32.
        other_output (Tensor): as ``output``.
        other_lse (Tensor): as ``lse``.

    Returns:
        tuple[Tensor, Tensor]: output ``[..., Nq, D]`` in the dtype of ``output``, log-sum-exp
        ``[..., Nq]`` fp32.

    Raises:
        LayoutError: shapes do not fit together.
    """
    check_tensors_given(output=output, lse=lse, other_output=other_output, other_lse=other_lse)
    shape, rows = output.shape, lse.shape
    if (other_output.shape, other_lse.shape) != (shape, rows) or shape[:-1] != rows:
        raise LayoutError(
            "two attention results [..., Nq, D] with log-sum-exp [..., Nq] must be alike; got "
            + shapes_of(output=output, lse=lse, other_output=other_output, other_lse=other_lse)
        )
    # The finite floor keeps -inf - peak from being NaN where both parts are empty.
    peak = torch.maximum(lse, other_lse).clamp(min=torch.finfo(lse.dtype).min)
    weight, other_weight = torch.exp(lse - peak), torch.exp(other_lse - peak)
    total = weight + other_weight
    merged = _weighted(output, weight) + _weighted(other_output, other_weight)
    merged /= total.masked_fill(total == 0, 1)[..., None]
    return merged.to(output.dtype), peak + total.log()


def _weighted(output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return output.masked_fill((weight == 0)[..., None], 0) * weight[..., None]
