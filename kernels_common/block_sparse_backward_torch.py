"""Gradients of block-sparse attention in plain PyTorch: as the forward pass, a few rows at a time.

The softmax of each chunk is computed anew, so neither output nor log-sum-exp are needed, and gradients of
fp64 inputs are exact to fp64. Gradients of keys and values are summed over the rows in fp32 (fp64 for fp64
inputs); on CUDA the order of that sum varies unless ``torch.use_deterministic_algorithms`` is on.

Extra memory: what the forward pass in ``block_sparse_torch.py`` takes, a copy of ``grad_output``, one of
key and value each in the precision of the sums, and a few times the scores of one chunk. Nothing grows
with Nq x Nk.

Shape letters as there: R rows, r rows of one chunk, M and N tokens of a query and a key block, C blocks of
keys, K gathered keys (kept blocks x N), D head dimension.
"""

import torch

from core.block_mask import block_count
from kernels_common.row_chunks import (
    SCORES_PER_CHUNK_CPU,
    SCORES_PER_CHUNK_OTHER,
    causal_bias,
    gather_keys,
    key_blocks,
    row_chunks,
    to_blocks,
)


def block_sparse_attention_backward_torch(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients on any device; reads the counts back to the host once.

    Args:
        grad_output (Tensor): ``[B, Hq, Nq, D]`` in the dtype of ``query``.
        grad_lse (Tensor, Optional): ``[B, Hq, Nq]`` fp32; ignored where a query sees no key.

    The other arguments are as in :func:`kernels_common.block_sparse_attention`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: gradients of query, key and value in their dtype and memory order.
    """
    batch, heads, queries, head_dim = query.shape
    rows = (batch, heads, block_count(queries, block_size[0]))
    precise = torch.promote_types(query.dtype, torch.float32)
    sorted_counts, order = counts.expand(rows).flatten().sort(stable=True)
    listed = indices.expand(*rows, -1).flatten(0, 2).index_select(0, order)
    scores_per_chunk = SCORES_PER_CHUNK_CPU if query.device.type == "cpu" else SCORES_PER_CHUNK_OTHER
    blocks_per_chunk = max(scores_per_chunk // (block_size[0] * block_size[1]), listed.shape[1])
    keys = key_blocks(key, value, key_lengths, bias, block_size[1], rows, order, blocks_per_chunk)
    grad_lse = query.new_zeros(1, dtype=precise).expand(query.shape[:3]) if grad_lse is None else grad_lse
    query_RMD, grad_output_RMD, grad_lse_RM1 = (
        to_blocks(part, block_size[0]).index_select(0, order)
        for part in (query, grad_output, grad_lse[..., None])
    )

    grad_query_RMD = torch.zeros_like(query_RMD)
    grad_key, grad_value = (torch.zeros_like(part, dtype=precise) for part in (keys.key, keys.value))
    for chunk, count in row_chunks(sorted_counts, blocks_per_chunk):
        kept = listed[chunk, :count].long()  # entries past the count are undefined
        key_rKD, value_rKD, bias_rMK = gather_keys(keys, chunk, kept, head_dim)
        if causal:
            first = order[chunk] % rows[2] * block_size[0] + key.shape[2] - queries
            bias_rMK = causal_bias(bias_rMK, first, kept, block_size, query.dtype)
        inputs = (query_RMD[chunk], key_rKD, value_rKD, grad_output_RMD[chunk], grad_lse_RM1[chunk])
        grad_query_rMD, grad_key_rKD, grad_value_rKD = _differentiate(
            *(part.to(precise) for part in inputs), bias_rMK=bias_rMK, scale=scale
        )
        grad_query_RMD[chunk] = grad_query_rMD
        blocks = (kept + keys.first[chunk, None]).flatten()
        grad_key.index_add_(0, blocks, grad_key_rKD.view(len(blocks), -1))
        grad_value.index_add_(0, blocks, grad_value_rKD.view(len(blocks), -1))

    ordered = torch.empty_like(grad_query_RMD).index_copy_(0, order, grad_query_RMD)
    return _from_blocks(ordered, query), _from_blocks(grad_key, key), _from_blocks(grad_value, value)


def _from_blocks(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[B * H * C, ...]`` as ``[B, H, S, D]`` in the dtype and memory order of ``like``."""
    batch, heads, length, head_dim = like.shape
    return torch.empty_like(like).copy_(blocks.view(batch, heads, -1, head_dim)[:, :, :length])


def _differentiate(
    query_rMD: torch.Tensor,
    key_rKD: torch.Tensor,
    value_rKD: torch.Tensor,
    grad_output_rMD: torch.Tensor,
    grad_lse_rM1: torch.Tensor,
    *,
    bias_rMK: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one chunk's queries, keys and values; a row of -inf adds nothing."""
    scores = torch.bmm(query_rMD * scale, key_rKD.mT)
    if bias_rMK is not None:
        scores += bias_rMK
    # The finite floor keeps -inf - peak from being NaN where a whole row is -inf.
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    weights /= total.masked_fill_(empty, 1)
    grad_value = torch.bmm(weights.mT, grad_output_rMD)
    grad_weights = torch.bmm(grad_output_rMD, value_rKD.mT)
    delta = torch.linalg.vecdot(weights, grad_weights).unsqueeze(-1)
    # d lse / d scores are the weights too.
    grad_scores = grad_weights.sub_(delta - grad_lse_rM1.masked_fill(empty, 0)).mul_(weights).mul_(scale)
    return torch.bmm(grad_scores, key_rKD), torch.bmm(grad_scores.mT, query_rMD), grad_value
