"""8-bit and tile-skipping block-sparse attention by its definition: online softmax, tile after tile.

SageAttention (arXiv 2410.02367, 2411.10958): scores from INT8 query and centred INT8 key; with FP8 also the
softmax weights, relative to the running maximum, and the value are e4m3.

SpargeAttn's second stage (arXiv 2502.18137, section 3.4): a tile is dropped if no row's largest score in it
comes within a threshold of that row's running maximum. Dropping means that the tile is masked: it is left
out of the output and of the log-sum-exp. Tiles are at most 64 x 128, and smaller where mask blocks are; they
are visited in ascending order, which every form must share, since the running maximum depends on it.

Shape letters: B batch, H query heads, N tokens, D head dimension, U rows of tiles.
"""

import math

import torch
import torch.nn.functional as F

from core.block_mask import BlockSparseMask
from kernels_common.quantization import (
    FP8_DTYPE,
    FP8_MAX,
    dequantize_tokens,
    dequantize_value,
    quantize_query_key_torch,
    quantize_value_fp8_torch,
    valid_key_counts,
)

QUANTIZATIONS = ("none", "int8_fp16", "int8_fp8")
LOG2_E = math.log2(math.e)


def skip_tile(block_size: tuple[int, int]) -> tuple[int, int]:
    """Query and key tokens of the tile that is skipped or computed as a whole."""
    return math.gcd(block_size[0], 64), math.gcd(block_size[1], 128)


def precise_operands(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_lengths: torch.Tensor | None,
    quantization: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Query, key and value after the rounding of ``quantization``, in fp32 or fp64.

    Returns:
        tuple: the three tensors, and what centring took from the scores of each query before scaling,
        ``[B, H, Nq]`` or 0.
    """
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    mean_scores: torch.Tensor | float = 0.0
    query_BHND, key_BHND, value_BHND = (tensor.to(precise) for tensor in (query, key, value))
    if quantization != "none":
        operands = quantize_query_key_torch(query, key, key_lengths=key_lengths)
        query_BHND = dequantize_tokens(operands.query, operands.query_scale).to(precise)
        key_BHND = dequantize_tokens(operands.key, operands.key_scale).to(precise)
        mean_scores = operands.mean_scores
    if quantization == "int8_fp8":
        value_fp8, value_scale = quantize_value_fp8_torch(value, key_lengths=key_lengths)
        value_BHND = dequantize_value(value_fp8, value_scale, value.shape[2]).to(precise)
    return query_BHND, key_BHND, value_BHND, mean_scores


def round_weights(weights: torch.Tensor, quantization: str) -> torch.Tensor:
    """Softmax weights in [0, 1] after the rounding of ``quantization``; 1 becomes the largest e4m3."""
    if quantization != "int8_fp8":
        return weights
    return (weights * FP8_MAX).to(FP8_DTYPE).to(weights.dtype) / FP8_MAX


def block_sparse_attention_quantized_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    quantization: str,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    skip_threshold: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block-sparse attention with 8-bit operands and skipped tiles, with quadratic memory.

    Arguments as in :func:`kernels_common.block_sparse_attention`, with the mask as its two tensors, and:

    Args:
        quantization (str): ``"int8_fp8"`` INT8 query and key, e4m3 weights and value; ``"int8_fp16"`` INT8
            query and key, weights and value in the dtype of ``value``; ``"none"`` neither, for skipping
            alone.
        skip_threshold (Tensor, Optional): ``[Hq]`` fp32, >= 0, in log2 units: a tile of :func:`skip_tile` is
            skipped if each of its rows has its largest score ``skip_threshold`` or more below the largest of
            the tiles before it. So is a tile without any valid key. Default: compute every tile

    Returns:
        tuple[Tensor, Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype of ``query``; the natural
        log-sum-exp of the scores that were not skipped ``[B, Hq, Nq]`` fp32; skipped tiles of every row of
        the mask ``[B, Hq, Mq]`` int32.
    """
    tile_m, tile_n = skip_tile(block_size)
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    query_BHND, key_BHND, value_BHND, mean_scores = precise_operands(
        query, key, value, key_lengths, quantization
    )
    key_BHND, value_BHND = (part.repeat_interleave(group, dim=1) for part in (key_BHND, value_BHND))
    scores = query_BHND @ key_BHND.transpose(2, 3) * (scale * LOG2_E)  # [B, H, Nq, Nk]
    if bias is not None:
        scores = scores + bias.repeat_interleave(heads // bias.shape[1], dim=1)[:, :, None] * LOG2_E
    # Whole blocks: the last one may hold tiles past the keys, which are skipped like other empty tiles.
    tail = -key.shape[2] % block_size[1]
    scores, value_BHND = F.pad(scores, (0, tail)), F.pad(value_BHND, (0, 0, 0, tail))
    kept = BlockSparseMask(counts, indices, block_size, queries, scores.shape[3]).to_dense().expand_as(scores)
    inside = torch.arange(scores.shape[3], device=key.device) < valid_key_counts(key, key_lengths)[:, None]
    scores = scores.masked_fill(~(kept & inside[:, None, None]), float("-inf"))

    peak = scores.new_full((batch, heads, queries), float("-inf"))
    total = torch.zeros_like(peak)
    output = torch.zeros_like(query_BHND)
    skipped = torch.zeros(batch, heads, counts.shape[2], dtype=torch.int32, device=query.device)
    for start in range(0, scores.shape[3], tile_n):
        tile = scores[..., start : start + tile_n]
        if skip_threshold is not None:
            idle = tile.amax(-1) <= peak - skip_threshold[:, None]
            idle_tile = F.pad(idle, (0, -queries % tile_m), value=True).unflatten(2, (-1, tile_m)).all(-1)
            idle = idle_tile.repeat_interleave(tile_m, dim=2)[..., :queries] & kept[..., start]
            tile = tile.masked_fill(idle[..., None], float("-inf"))
            first_rows = idle[:, :, ::tile_m]  # [B, H, U]
            per_block = F.pad(first_rows, (0, -first_rows.shape[2] % (block_size[0] // tile_m)))
            skipped += per_block.unflatten(2, (counts.shape[2], -1)).sum(-1, dtype=torch.int32)
        new_peak = torch.maximum(peak, tile.amax(-1))
        base = new_peak.clamp(min=torch.finfo(peak.dtype).min)  # no -inf - -inf
        weights, rescale = torch.exp2(tile - base[..., None]), torch.exp2(peak - base)
        total = total * rescale + weights.sum(-1)
        weighted = round_weights(weights, quantization) @ value_BHND[:, :, start : start + tile_n]
        output = output * rescale[..., None] + weighted
        peak = new_peak
    output = output / total.masked_fill(total == 0, 1)[..., None]
    lse = (peak + total.log2()) / LOG2_E + mean_scores * scale
    return output.to(query.dtype), lse.to(torch.float32), skipped
