"""Block-sparse attention in plain PyTorch: gather the kept key blocks of a few rows, attend, repeat.

A row is one (batch, query head, query block). Rows are sorted by their number of kept blocks, and rows
with equally many are computed in chunks small enough that gathered keys and scores stay in cache: that
is what makes this form faster than dense attention on a CPU.

Extra memory: two copies each of query and output, one each of key and value (none where they are
contiguous and of whole blocks), the lists of all rows, and a workspace for the keys, values and scores of
one chunk, which holds ``SCORES_PER_CHUNK`` scores or one row, whichever is more. Nothing grows with
Nq x Nk.

Shape letters: R rows, r rows of one chunk, M and N tokens of a query and a key block, C blocks of keys,
K gathered keys (kept blocks x N), D head dimension.
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


def block_sparse_attention_torch(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the kept blocks on any device; reads the counts back to the host once.

    Arguments as in :func:`kernels_common.block_sparse_attention`, with the mask as its two tensors. On a
    CPU each chunk goes through torch's fused kernel, elsewhere through matrix products in fp32 (fp64 for
    fp64 inputs).

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32.
    """
    batch, heads, queries, head_dim = query.shape
    rows = (batch, heads, block_count(queries, block_size[0]))
    on_cpu = query.device.type == "cpu"
    attend = _attend_fused if on_cpu else _attend_scores
    scores_per_chunk = SCORES_PER_CHUNK_CPU if on_cpu else SCORES_PER_CHUNK_OTHER

    sorted_counts, order = counts.expand(rows).flatten().sort(stable=True)
    query_RMD = to_blocks(query, block_size[0]).index_select(0, order)
    listed = indices.expand(*rows, -1).flatten(0, 2).index_select(0, order)
    blocks_per_chunk = max(scores_per_chunk // (block_size[0] * block_size[1]), listed.shape[1])
    keys = key_blocks(key, value, key_lengths, bias, block_size[1], rows, order, blocks_per_chunk)
    output_RMD = torch.zeros_like(query_RMD)
    lse_RM = torch.full(query_RMD.shape[:2], float("-inf"), dtype=torch.float32, device=query.device)
    for chunk, count in row_chunks(sorted_counts, blocks_per_chunk):
        kept = listed[chunk, :count].long()  # entries past the count are undefined
        key_rKD, value_rKD, bias_rMK = gather_keys(keys, chunk, kept, head_dim)
        if causal:
            first = order[chunk] % rows[2] * block_size[0] + key.shape[2] - queries
            bias_rMK = causal_bias(bias_rMK, first, kept, block_size, query.dtype)
        output_RMD[chunk], lse_RM[chunk] = attend(query_RMD[chunk], key_rKD, value_rKD, bias_rMK, scale)

    lse = torch.empty_like(lse_RM).index_copy_(0, order, lse_RM).view(batch, heads, -1)[:, :, :queries]
    blocked = torch.empty_like(output_RMD).index_copy_(0, order, output_RMD).view(batch, heads, -1, head_dim)
    return torch.empty_like(query).copy_(blocked[:, :, :queries]), lse.contiguous()


def _attend_fused(
    query_rMD: torch.Tensor,
    key_rKD: torch.Tensor,
    value_rKD: torch.Tensor,
    bias_rMK: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk by torch's CPU flash kernel, each row as a batch entry; a row of -inf gives 0 and -inf."""
    mask = None
    if bias_rMK is not None:
        mask = bias_rMK[:, None].expand(-1, 1, query_rMD.shape[1], -1)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_rMD[:, None], key_rKD[:, None], value_rKD[:, None], attn_mask=mask, scale=scale
    )
    output_rMD, lse_rM = output[:, 0], lse[:, 0]
    if bias_rMK is None:
        return output_rMD, lse_rM
    empty_rM = bias_rMK.isneginf().all(-1)
    return output_rMD.masked_fill(empty_rM[..., None], 0), lse_rM.masked_fill(empty_rM, float("-inf"))


def _attend_scores(
    query_rMD: torch.Tensor,
    key_rKD: torch.Tensor,
    value_rKD: torch.Tensor,
    bias_rMK: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk with its scores in memory; a row of -inf gives 0 and -inf."""
    precise = torch.float64 if query_rMD.dtype == torch.float64 else torch.float32
    scores = torch.bmm(query_rMD.to(precise) * scale, key_rKD.to(precise).transpose(1, 2))
    if bias_rMK is not None:
        scores += bias_rMK
    # The finite floor keeps -inf - peak from being NaN where a whole row is -inf.
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(precise).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    output = torch.bmm(weights, value_rKD.to(precise)) / total.masked_fill(total == 0, 1)
    return output.to(query_rMD.dtype), (peak + total.log()).squeeze(-1).to(torch.float32)
