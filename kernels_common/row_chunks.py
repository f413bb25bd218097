"""What the plain PyTorch forms of block-sparse operators share: rows in chunks, and their gathered keys.

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


class KeyBlocks(NamedTuple):
    """Key-side tensors cut into blocks, and where in them the blocks of each row's head start."""

    key: torch.Tensor  # [B * Hkv * C, N * D]
    value: torch.Tensor  # [B * Hkv * C, N * D]
    first: torch.Tensor  # [R] int64
    bias: torch.Tensor | None  # [(B or 1) * (1 or Hkv or Hq) * C, N], -inf for keys that are left out
    bias_first: torch.Tensor | None  # [R] int64
    workspace: torch.Tensor  # [2, blocks of the largest chunk, N * D], reused because fresh pages are slow


def to_blocks(tensor: torch.Tensor, block: int, fill: float = 0.0) -> torch.Tensor:
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


def key_blocks(
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    block: int,
    rows: tuple[int, int, int],
    order: torch.Tensor,
    blocks_per_chunk: int,
) -> KeyBlocks:
    """Keys, values and bias of every head in blocks; rows past the length are zero and have bias -inf.

    Args:
        key (Tensor): ``[B, Hkv, Nk, D]``.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        key_lengths (Tensor, Optional): ``[B]``, valid keys.
        bias (Tensor, Optional): ``[B or 1, 1 or Hkv or Hq, Nk]``.
        block (int): tokens of a key block.
        rows (tuple[int, int, int]): batch, query heads and query blocks.
        order (Tensor): ``[R]`` int64, the order in which rows are computed.
        blocks_per_chunk (int): key blocks of the largest chunk.
    """
    batch, kv_heads, length, _ = key.shape
    blocks = block_count(length, block)
    key_rows, value_rows = (to_blocks(part, block).flatten(1) for part in (key, value))
    first = _first_blocks(rows, batch, kv_heads, blocks, order)
    workspace = key.new_empty(2, blocks_per_chunk, key_rows.shape[1])
    if bias is None and key_lengths is None and length % block == 0:
        return KeyBlocks(key_rows, value_rows, first, None, None, workspace)
    precise = torch.promote_types(key.dtype, torch.float32)  # the fused kernel misreads other dtypes
    key_bias = key.new_zeros(1, 1, length, dtype=precise) if bias is None else bias.to(precise)
    if key_lengths is not None:
        outside = torch.arange(length, device=key.device) >= key_lengths[:, None]  # [B, Nk]
        key_bias = torch.where(outside[:, None], float("-inf"), key_bias)
    bias_rows = to_blocks(key_bias[..., None], block, fill=float("-inf")).flatten(1)
    bias_first = _first_blocks(rows, key_bias.shape[0], key_bias.shape[1], blocks, order)
    return KeyBlocks(key_rows, value_rows, first, bias_rows, bias_first, workspace)


def row_chunks(sorted_counts: torch.Tensor, blocks_per_chunk: int) -> Iterator[tuple[slice, int]]:
    """Rows with equally many kept blocks, a few at a time; rows without any are left out."""
    values, sizes = torch.unique_consecutive(sorted_counts, return_counts=True)
    end = 0
    for count, size in zip(values.tolist(), sizes.tolist(), strict=True):
        begin, end = end, end + size
        if count > 0:
            step = max(1, blocks_per_chunk // count)
            yield from ((slice(start, min(start + step, end)), count) for start in range(begin, end, step))


def gather_keys(
    keys: KeyBlocks, chunk: slice, kept: torch.Tensor, head_dim: int
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


def causal_bias(
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
