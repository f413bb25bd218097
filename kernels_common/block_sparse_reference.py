"""Block-sparse attention by its definition: dense scores, dense mask, softmax. Slow and obvious.

Shape letters: B batch, H query heads, N tokens, D head dimension.
"""

import torch

from core.block_mask import BlockSparseMask


def block_sparse_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept blocks in fp32 (fp64 for fp64 inputs), with quadratic memory.

    Arguments as in :func:`kernels_common.block_sparse_attention`.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype of ``query``, and the natural
        log-sum-exp ``[B, Hq, Nq]`` fp32.
    """
    heads, keys = query.shape[1], key.shape[2]
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    query_BHND, key_BHND, value_BHND = (
        tensor.to(precise).repeat_interleave(heads // tensor.shape[1], dim=1)
        for tensor in (query, key, value)
    )
    scores = query_BHND @ key_BHND.transpose(-1, -2) * scale  # [B, H, Nq, Nk]
    if bias is not None:
        scores = scores + bias.to(precise).repeat_interleave(heads // bias.shape[1], dim=1)[:, :, None]
    kept = block_mask.to_dense()
    if key_lengths is not None:
        inside = torch.arange(keys, device=key.device) < key_lengths[:, None]  # [B, Nk]
        kept = kept & inside[:, None, None]
    if causal:
        last_seen = torch.arange(query.shape[2], device=query.device) + keys - query.shape[2]
        kept = kept & (torch.arange(keys, device=key.device) <= last_seen[:, None])
    scores = scores.masked_fill(~kept, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)  # -inf where nothing is kept
    shift = lse.masked_fill(lse.isneginf(), 0.0)[..., None]
    output = torch.exp(scores - shift) @ value_BHND
    return output.to(query.dtype), lse.to(torch.float32)
