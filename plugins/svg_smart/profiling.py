"""Which pattern suits a head: both are compared with exact attention on a few query rows.

The patterns are judged by the blocks that would be executed. Rows are drawn from the video tokens: text
queries are dense under either pattern and tell nothing.
"""

import torch

from core.context import AttentionContext
from core.random import call_generator
from kernels_common.triton_choice import runs_triton
from plugins.svg_smart.patterns import KEYS_PER_WORD, HeadPatterns

SCORES_PER_CHUNK = 1 << 24
LARGEST_HEAD_DIM = 128  # of the Triton form


def sample_rows(count: int, seed: int, context: AttentionContext, device: torch.device) -> torch.Tensor:
    """Video tokens drawn with replacement from a generator of (seed, layer, step), ``[count]`` int64."""
    generator = call_generator(seed, context, device)
    video = context.layout.video_slice
    return torch.randint(video.start, video.stop, (count,), generator=generator, device=device)


def allowed_keys(patterns: HeadPatterns, rows: torch.Tensor) -> torch.Tensor:
    """Keys that the sampled queries see in the executed blocks, ``[2, R, S]`` bool, in the model's order."""
    row_blocks = patterns.places[:, rows].long() // patterns.masks.block_size[0]
    words = patterns.seen.take_along_dim(row_blocks[:, :, None], 1)  # [2, R, ceil(S / 64)]
    bits = words[..., None] >> torch.arange(KEYS_PER_WORD, device=rows.device) & 1
    return bits.flatten(2)[..., : patterns.places.shape[1]].bool()


def pattern_errors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, patterns: HeadPatterns
) -> torch.Tensor:
    """Mean squared error of each pattern's output against exact attention on the sampled rows.

    Args:
        query (Tensor): ``[B, H, S, D]``.
        key (Tensor): ``[B, H, S, D]``.
        value (Tensor): ``[B, H, S, D]``.
        rows (Tensor): ``[R]`` int64, sampled queries.
        patterns (HeadPatterns): what the two classes execute, on the device of the tensors.

    Returns:
        Tensor: ``[2, B, H]`` fp32, spatial and temporal.
    """
    if runs_triton(query) and query.shape[-1] <= LARGEST_HEAD_DIM:
        from plugins.svg_smart.kernels import sampled_errors

        return sampled_errors(query, key, value, rows, patterns)
    return _errors_in_chunks(query, key, value, rows, allowed_keys(patterns, rows))


def _errors_in_chunks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    step = max(1, SCORES_PER_CHUNK // (len(rows) * length))
    sampled, keys, values = (part.flatten(0, 1) for part in (query[:, :, rows], key, value))
    errors = query.new_empty(2, batch * heads, dtype=torch.float32)
    for start in range(0, batch * heads, step):
        chunk = slice(start, start + step)
        scores = torch.bmm(sampled[chunk].float(), keys[chunk].float().transpose(1, 2)) * dim**-0.5
        chunk_values = values[chunk].float()
        exact = torch.bmm(scores.softmax(-1), chunk_values)
        for index in range(2):
            weights = scores.masked_fill(~allowed[index], float("-inf")).softmax(-1)
            output = torch.bmm(weights, chunk_values)
            errors[index, chunk] = (output - exact).square().mean((-1, -2))
    return errors.view(2, batch, heads)
