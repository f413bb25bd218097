"""Which pattern suits a head: both are compared with exact attention on a few query rows.

The patterns are judged by the blocks that would be executed. Rows are drawn from the video tokens: text
queries are dense under either pattern and tell nothing.
"""

import importlib.util

import torch

from core.context import AttentionContext
from core.random import call_generator
from plugins.svg_smart.patterns import HeadPatterns

SCORES_PER_CHUNK = 1 << 24

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def sample_rows(count: int, seed: int, context: AttentionContext, device: torch.device) -> torch.Tensor:
    """Video tokens drawn with replacement from a generator of (seed, layer, step), ``[count]`` int64."""
    generator = call_generator(seed, context, device)
    layout = context.layout
    drawn = torch.randint(layout.video_length, (count,), generator=generator, device=device)
    return layout.video_start + drawn


def allowed_keys(patterns: HeadPatterns, rows: torch.Tensor) -> torch.Tensor:
    """Keys that the sampled queries see in the executed blocks, ``[2, R, S]`` bool, in the model's order."""
    query_block, key_block = patterns.masks.block_size
    row_blocks = patterns.places[:, rows] // query_block
    column_blocks = patterns.places // key_block
    lists = torch.arange(2, device=rows.device)[:, None, None]
    return patterns.blocks[lists, row_blocks[:, :, None], column_blocks[:, None, :]]


def pattern_errors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of each pattern's output against exact attention on the sampled rows.

    Args:
        query (Tensor): ``[B, H, S, D]``.
        key (Tensor): ``[B, H, S, D]``.
        value (Tensor): ``[B, H, S, D]``.
        rows (Tensor): ``[R]`` int64, sampled queries.
        allowed (Tensor): ``[2, R, S]`` bool; each row allows at least one key.

    Returns:
        Tensor: ``[2, B, H]`` fp32, spatial and temporal.
    """
    if query.is_cuda and _TRITON_INSTALLED and query.shape[-1] <= 128:
        from plugins.svg_smart.kernels import sampled_outputs

        exact, *outputs = sampled_outputs(query, key, value, rows, allowed)
        return torch.stack([(output - exact).square().mean((-1, -2)) for output in outputs])
    return _errors_in_chunks(query, key, value, rows, allowed)


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
