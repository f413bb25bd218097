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

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from core.block_mask import block_count

# On CPU measured: half or double is 5 % slower, a quarter 10 %. Elsewhere launches must be amortised.
SCORES_PER_CHUNK_CPU = 1 << 21
SCORES_PER_CHUNK_OTHER = 1 << 26


class _KeyBlocks(NamedTuple):
    """Key-side tensors cut into blocks, and where in them the blocks of each row's head start."""

    key: torch.Tensor  # [B * Hkv * C, N * D]
    value: torch.Tensor  # [B * Hkv * C, N * D]
    first: torch.Tensor  # [R] int64
    bias: torch.Tensor | None  # [(B or 1) * (1 or Hkv or Hq) * C, N], -inf for keys that are left out
    bias_first: torch.Tensor | None  # [R] int64
    workspace: torch.Tensor  # [2, blocks of the largest chunk, N * D], reused because fresh pages are slow


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
    query_RMD = _to_blocks(query, block_size[0]).index_select(0, order)
    listed = indices.expand(*rows, -1).flatten(0, 2).index_select(0, order)
    blocks_per_chunk = max(scores_per_chunk // (block_size[0] * block_size[1]), listed.shape[1])
    keys = _key_blocks(key, value, key_lengths, bias, block_size[1], rows, order, blocks_per_chunk)
    output_RMD = torch.zeros_like(query_RMD)
    lse_RM = torch.full(query_RMD.shape[:2], float("-inf"), dtype=torch.float32, device=query.device)
    for chunk, count in _chunks(sorted_counts, blocks_per_chunk):
        kept = listed[chunk, :count].long()  # entries past the count are undefined
        key_rKD, value_rKD, bias_rMK = _gather(keys, chunk, kept, head_dim)
        if causal:
            first = order[chunk] % rows[2] * block_size[0] + key.shape[2] - queries
            bias_rMK = _causal_bias(bias_rMK, first, kept, block_size, query.dtype)
        output_RMD[chunk], lse_RM[chunk] = attend(query_RMD[chunk], key_rKD, value_rKD, bias_rMK, scale)

    lse = torch.empty_like(lse_RM).index_copy_(0, order, lse_RM).view(batch, heads, -1)[:, :, :queries]
    blocked = torch.empty_like(output_RMD).index_copy_(0, order, output_RMD).view(batch, heads, -1, head_dim)
    return torch.empty_like(query).copy_(blocked[:, :, :queries]), lse.contiguous()


def _to_blocks(tensor: torch.Tensor, block: int, fill: float = 0.0) -> torch.Tensor:
    """``[B, H, S, D]`` as ``[B * H * ceil(S / block), block, D]``; a copy only where needed."""
    tail = -tensor.shape[2] % block
    padded = F.pad(tensor, (0, 0, 0, tail), value=fill) if tail else tensor
    return padded.contiguous().unflatten(2, (-1, block)).flatten(0, 2)


def _first_blocks(
    rows: tuple[int, int, int], batch: int, heads: int, blocks: int, order: torch.Tensor
) -> torch.Tensor:
    """Of each row, the place of its first block in a ``[batch, heads, blocks]`` tensor, ``[R]`` int64."""
    batch_index = torch.arange(rows[0], device=order.device)[:, None, None] * (batch > 1)
    head_index = torch.arange(rows[1], device=order.device)[None, :, None] // (rows[1] // heads)
    return ((batch_index * heads + head_index) * blocks).expand(rows).flatten()[order]


def _key_blocks(
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    block: int,
    rows: tuple[int, int, int],
    order: torch.Tensor,
    blocks_per_chunk: int,
) -> _KeyBlocks:
    batch, kv_heads, length, _ = key.shape
    blocks = block_count(length, block)
    key_rows, value_rows = (_to_blocks(part, block).flatten(1) for part in (key, value))
    first = _first_blocks(rows, batch, kv_heads, blocks, order)
    workspace = key.new_empty(2, blocks_per_chunk, key_rows.shape[1])
    if bias is None and key_lengths is None and length % block == 0:
        return _KeyBlocks(key_rows, value_rows, first, None, None, workspace)
    precise = torch.promote_types(key.dtype, torch.float32)  # the fused kernel misreads other dtypes
    key_bias = key.new_zeros(1, 1, length, dtype=precise) if bias is None else bias.to(precise)
    if key_lengths is not None:
        outside = torch.arange(length, device=key.device) >= key_lengths[:, None]  # [B, Nk]
        key_bias = torch.where(outside[:, None], float("-inf"), key_bias)
    bias_rows = _to_blocks(key_bias[..., None], block, fill=float("-inf")).flatten(1)
    bias_first = _first_blocks(rows, key_bias.shape[0], key_bias.shape[1], blocks, order)
    return _KeyBlocks(key_rows, value_rows, first, bias_rows, bias_first, workspace)


def _chunks(sorted_counts: torch.Tensor, blocks_per_chunk: int) -> Iterator[tuple[slice, int]]:
    """Rows with equally many kept blocks, a few at a time; rows without any are left out."""
    values, sizes = torch.unique_consecutive(sorted_counts, return_counts=True)
    end = 0
    for count, size in zip(values.tolist(), sizes.tolist(), strict=True):
        begin, end = end, end + size
        if count > 0:
            step = max(1, blocks_per_chunk // count)
            yield from ((slice(start, min(start + step, end)), count) for start in range(begin, end, step))


def _gather(
    keys: _KeyBlocks, chunk: slice, kept: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys and values ``[r, K, D]`` and bias ``[r, 1, K]`` of the kept blocks ``[r, count]`` of a chunk."""
    blocks = (kept + keys.first[chunk, None]).flatten()
    key_rKD, value_rKD = (
        torch.index_select(source, 0, blocks, out=buffer[: len(blocks)]).view(kept.shape[0], -1, head_dim)
        for source, buffer in zip((keys.key, keys.value), keys.workspace, strict=True)
    )
    if keys.bias is None or keys.bias_first is None:
        return key_rKD, value_rKD, None
    bias_blocks = (kept + keys.bias_first[chunk, None]).flatten()
    return key_rKD, value_rKD, keys.bias.index_select(0, bias_blocks).view(kept.shape[0], 1, -1)


def _causal_bias(
    bias: torch.Tensor | None,
    first: torch.Tensor,
    kept: torch.Tensor,
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Bias ``[r, M, K]`` that is -inf at keys behind a query.

    Args:
        bias (Tensor, Optional): ``[r, 1, K]``.
        first (Tensor): last key that each row's first query sees, ``[r]`` int64.
        kept (Tensor): kept blocks, ``[r, count]`` int64.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        dtype (torch.dtype): of the queries.
    """
    query_tokens, key_tokens = (torch.arange(size, device=kept.device) for size in block_size)
    last_seen = first[:, None] + query_tokens  # [r, M]
    keys = (kept[..., None] * block_size[1] + key_tokens).flatten(1)  # [r, K]
    hidden = keys[:, None] > last_seen[..., None]
    if bias is None:
        bias = kept.new_zeros(1, dtype=torch.promote_types(dtype, torch.float32))
    return torch.where(hidden, float("-inf"), bias)


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
