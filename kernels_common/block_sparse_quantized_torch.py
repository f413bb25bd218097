"""8-bit and tile-skipping block-sparse attention in plain PyTorch, on any device.

The loop over rows is that of :mod:`kernels_common.block_sparse_torch`, on operands that were rounded to 8
bits and back. The online softmax needs no loop over tiles: a skipped tile never raises the running maximum,
so this is the cumulative maximum of all tiles, and one comparison tells which were skipped.

Shape letters: R rows, r rows of one chunk, M and N tokens of a query and a key block, K gathered keys (kept
blocks x N), U and T rows and columns of tiles, m and n tokens of a tile, D head dimension.
"""

import torch
import torch.nn.functional as F

from kernels_common.block_sparse_quantized_reference import (
    LOG2_E,
    precise_operands,
    round_weights,
    skip_tile,
)
from kernels_common.row_chunks import (
    SCORES_PER_CHUNK_CPU,
    SCORES_PER_CHUNK_OTHER,
    gather_keys,
    key_blocks,
    row_chunks,
    to_blocks,
)


def block_sparse_attention_quantized_torch(
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
    """Attention over the kept blocks with 8-bit operands; reads the counts back to the host once.

    Arguments and results as in
    :func:`kernels_common.block_sparse_quantized_reference.block_sparse_attention_quantized_reference`; the
    output has the memory order of ``query``.
    """
    batch, heads, queries, head_dim = query.shape
    rows = (batch, heads, counts.shape[2])
    query_BHND, key_BHND, value_BHND, mean_scores = precise_operands(
        query, key, value, key_lengths, quantization
    )
    scores_per_chunk = SCORES_PER_CHUNK_CPU if query.device.type == "cpu" else SCORES_PER_CHUNK_OTHER

    sorted_counts, order = counts.expand(rows).flatten().sort(stable=True)
    query_RMD = to_blocks(query_BHND * (scale * LOG2_E), block_size[0]).index_select(0, order)
    listed = indices.expand(*rows, -1).flatten(0, 2).index_select(0, order)
    blocks_per_chunk = max(scores_per_chunk // (block_size[0] * block_size[1]), listed.shape[1])
    keys = key_blocks(key_BHND, value_BHND, key_lengths, bias, block_size[1], rows, order, blocks_per_chunk)
    # Without a threshold nothing is that far below a maximum but a tile without valid keys.
    threshold = query_BHND.new_full((heads,), float("inf")) if skip_threshold is None else skip_threshold
    threshold_R = threshold[None, :, None].expand(rows).flatten()[order]
    valid_R = (queries - order % rows[2] * block_size[0]).clamp(max=block_size[0])
    output_RMD = torch.zeros_like(query_RMD)
    lse_RM = query_RMD.new_full(query_RMD.shape[:2], float("-inf"))
    skipped_R = torch.zeros_like(sorted_counts)
    for chunk, count in row_chunks(sorted_counts, blocks_per_chunk):
        kept = listed[chunk, :count].long()  # entries past the count are undefined
        gathered = gather_keys(keys, chunk, kept, head_dim)
        output_RMD[chunk], lse_RM[chunk], skipped_R[chunk] = _attend_tiles(
            query_RMD[chunk],
            *gathered,
            threshold_R[chunk],
            valid_R[chunk],
            skip_tile(block_size),
            quantization,
        )

    lse = torch.empty_like(lse_RM).index_copy_(0, order, lse_RM).view(batch, heads, -1)[:, :, :queries]
    blocked = torch.empty_like(output_RMD).index_copy_(0, order, output_RMD).view(batch, heads, -1, head_dim)
    skipped = torch.empty_like(skipped_R).index_copy_(0, order, skipped_R).view(rows)
    if skip_threshold is None:
        skipped.zero_()
    output = torch.empty_like(query).copy_(blocked[:, :, :queries])
    return output, (lse + mean_scores * scale).to(torch.float32), skipped


def _attend_tiles(
    query_rMD: torch.Tensor,
    key_rKD: torch.Tensor,
    value_rKD: torch.Tensor,
    bias_rMK: torch.Tensor | None,
    threshold_r: torch.Tensor,
    valid_r: torch.Tensor,
    tile: tuple[int, int],
    quantization: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output ``[r, M, D]``, log-sum-exp ``[r, M]`` and skipped tiles ``[r]`` of one chunk."""
    scores = torch.bmm(query_rMD, key_rKD.transpose(1, 2))
    if bias_rMK is not None:
        scores += bias_rMK * LOG2_E
    scores_rUmTn = scores.unflatten(2, (-1, tile[1])).unflatten(1, (-1, tile[0]))
    tile_peak = scores_rUmTn.amax(-1)  # [r, U, m, T]
    peak = tile_peak.cummax(-1).values
    before = F.pad(peak[..., :-1], (1, 0), value=float("-inf"))
    idle = tile_peak <= before - threshold_r[:, None, None, None]
    outside = torch.arange(query_rMD.shape[1], device=valid_r.device) >= valid_r[:, None]  # [r, M]
    idle |= outside.unflatten(1, (-1, tile[0]))[..., None]
    skipped_rUT = idle.all(2) & ~outside[:, :: tile[0], None]
    scores_rUmTn.masked_fill_(skipped_rUT[:, :, None, :, None], float("-inf"))

    base = peak.clamp_(min=torch.finfo(peak.dtype).min)  # no -inf - -inf
    weights = scores_rUmTn.sub_(base[..., None]).exp2_()
    rescale = torch.exp2(base - base[..., -1:])  # [r, U, m, T]
    total = (weights.sum(-1) * rescale).sum(-1).flatten(1)[..., None]  # [r, M, 1]
    weights_rMK = (round_weights(weights, quantization) * rescale[..., None]).view_as(scores)
    output = torch.bmm(weights_rMK, value_rKD) / total.masked_fill(total == 0, 1)
    lse = (base[..., -1].flatten(1) + total[..., 0].log2()) / LOG2_E
    return output, lse, skipped_rUT.sum((1, 2))
