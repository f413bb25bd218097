"""Dense attention by its definition, in fp64. Slow and obvious; memory is quadratic in the tokens."""

import torch


def dense_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """``softmax(scale query key^T) value``.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        scale (float, Optional): factor on the scores. Default: ``1 / sqrt(D)``

    Returns:
        Tensor: ``[B, Hq, Nq, D]`` fp64.
    """
    groups = query.shape[1] // key.shape[1]
    query = query.double()
    key, value = (part.double().repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ value
