"""Inputs of kernel checks and kernel benchmarks, and what attention over them is by definition.

Shape letters: B batch, H heads, N tokens, D head dimension, Mq and Mk query and key blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from core import BlockSparseMask
from core.block_mask import block_count
from core.level_mask import LEVELS, LevelMask

POOLED = "pooled"
LEVEL_SHARES = (
    0.05,
    0.10,
    0.10,
    0.25,
)  # key blocks of level 1, 2, 4 and 8 in a pooled pattern; the rest dropped
CHUNK_SCORES = 2**27  # scores in memory at once


class Shape(NamedTuple):
    """Size of one attention call."""

    batch: int
    heads: int
    tokens: int
    head_dim: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = {
    "cogvideox-2b": Shape(2, 30, 17_776, 64),  # 2: both halves of classifier-free guidance
    "cogvideox-5b": Shape(2, 48, 17_776, 64),
    "cogvideox-1.5-5b": Shape(2, 48, 45_106, 64),
    "hd128": Shape(1, 24, 32_768, 128),
    "wan-14b-720p": Shape(1, 40, 75_600, 128),
    "hunyuan-video": Shape(1, 24, 119_056, 128),
    "tiny": Shape(1, 2, 1_000, 64),  # for CPUs
}


@dataclass(frozen=True)
class Case:
    """Random tensors of one attention call, and the blocks it keeps.

    Args:
        query (Tensor): ``[B, H, N, D]``; key, value and grad_output likewise.
        key (Tensor): see query.
        value (Tensor): see query.
        grad_output (Tensor): gradient that a backward pass starts from.
        block_size (tuple[int, int], Optional): tokens of a (query block, key block); None if dense.
        levels (Tensor, Optional): ``[B, H, Mq, Mk]`` int8: 0 for a dropped block, 1 for a kept one, 2, 4
            or 8 for one that is pooled by so much; None if dense.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_output: torch.Tensor
    block_size: tuple[int, int] | None = None
    levels: torch.Tensor | None = None

    @cached_property
    def mask(self) -> BlockSparseMask:
        """Lists of the kept blocks; every block of 128 x 128 tokens if the case is dense."""
        length = self.query.shape[2]
        if self.levels is None or self.block_size is None:
            return BlockSparseMask.full((128, 128), length, length, self.query.device)
        return BlockSparseMask.from_blocks(self.levels > 0, self.block_size, length, length)

    @cached_property
    def level_mask(self) -> LevelMask:
        """Lists of the kept blocks by level."""
        assert self.levels is not None and self.block_size is not None
        length = self.query.shape[2]
        return LevelMask.from_levels(self.levels, self.block_size, length, length)

    @cached_property
    def density(self) -> float:
        """Executed share of the (query, key) pairs, 0 to 1; pooled keys count once."""
        if self.levels is None:
            return 1.0
        pooled = bool((self.levels > 1).any())
        return float(self.level_mask.density() if pooled else self.mask.density())

    @cached_property
    def _definitions(self) -> dict[tuple[int, int, bool], tuple[torch.Tensor, ...]]:
        return {}

    def definition(self, batch: int, head: int, *, gradients: bool) -> tuple[torch.Tensor, ...]:
        """`attention_by_definition` of one head, computed once."""
        which = (batch, head, gradients)
        if which not in self._definitions:
            self._definitions[which] = attention_by_definition(self, batch, head, gradients=gradients)
        return self._definitions[which]

    def pairs(self) -> float:
        """Executed (query, key) pairs of all heads."""
        batch, heads, length, _ = self.query.shape
        return batch * heads * float(length) ** 2 * self.density


def make_tensors(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """A dense case of standard normal numbers, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    query, key, value, grad_output = (
        torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(4)
    )
    return Case(query, key, value, grad_output)


def with_blocks(case: Case, block_size: tuple[int, int], pattern: float | str, empty_row: bool) -> Case:
    """The same tensors under a random block pattern.

    Args:
        case (Case): the tensors.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        pattern (float | str): share of the key blocks that every row drops, or ``POOLED``.
        empty_row (bool): let the first query block see nothing.
    """
    batch, heads, length, _ = case.query.shape
    rows, columns = (block_count(length, size) for size in block_size)
    generator = torch.Generator(case.query.device).manual_seed(1)
    draw = torch.rand(batch, heads, rows, columns, generator=generator, device=case.query.device)
    shares = LEVEL_SHARES if pattern == POOLED else (1.0 - float(pattern),)
    counts = [round(columns * share) for share in shares]
    counts[0] = max(counts[0], 1)
    chosen = draw.topk(min(sum(counts), columns), dim=-1).indices
    values = torch.tensor(LEVELS[: len(counts)], dtype=torch.int8, device=draw.device)
    values = values.repeat_interleave(torch.tensor(counts, device=draw.device))[: chosen.shape[-1]]
    levels = torch.zeros(draw.shape, dtype=torch.int8, device=draw.device)
    levels.scatter_(-1, chosen, values.expand(chosen.shape))
    if empty_row:
        levels[:, :, 0] = 0
    return replace(case, block_size=block_size, levels=levels)


class _Keys(NamedTuple):
    """Keys of one level of one head.

    Args:
        key (Tensor): ``[n, D]``; value likewise.
        value (Tensor): see key.
        log_counts (Tensor): logarithm of the tokens that each key stands for, ``[n]``.
        kept (Tensor): ``[Mq, Mk]`` bool.
        width (int): keys per key block.
    """

    key: torch.Tensor
    value: torch.Tensor
    log_counts: torch.Tensor
    kept: torch.Tensor
    width: int


def _pool(tokens: torch.Tensor, level: int, counts: torch.Tensor) -> torch.Tensor:
    """Means of runs of ``level`` rows of ``[n, D]``; the last run may be shorter."""
    padded = F.pad(tokens, (0, 0, 0, -len(tokens) % level))
    return padded.unflatten(0, (-1, level)).sum(1) / counts[:, None]


def _keys_of(
    key: torch.Tensor, value: torch.Tensor, levels: torch.Tensor | None, block_size: tuple[int, int] | None
) -> Iterator[_Keys]:
    length = key.shape[0]
    if levels is None or block_size is None:
        everything = torch.ones(1, 1, dtype=torch.bool, device=key.device)
        yield _Keys(key, value, key.new_zeros(length), everything, length)
        return
    for level in LEVELS:
        kept = levels == level
        if kept.any():
            starts = torch.arange(0, length, level, device=key.device)
            counts = (length - starts).clamp(max=level).to(key.dtype)
            pooled_key, pooled_value = (_pool(part, level, counts) for part in (key, value))
            yield _Keys(pooled_key, pooled_value, counts.log(), kept, block_size[1] // level)


def attention_by_definition(
    case: Case, batch: int, head: int, *, gradients: bool = False
) -> tuple[torch.Tensor, ...]:
    """Attention of one head over exactly the case's blocks, some query rows at a time.

    Computed in fp64 for fp32 tensors and in fp32 for 16-bit ones.

    Args:
        case (Case): the call.
        batch (int): batch entry.
        head (int): head.
        gradients (bool): return the gradients instead. Default: False

    Returns:
        tuple[Tensor, ...]: the output ``[N, D]``, or its gradients by query, key and value.
    """
    precise = torch.float64 if case.query.dtype == torch.float32 else torch.float32
    inputs = [part[batch, head].to(precise) for part in (case.query, case.key, case.value)]
    inputs = [part.requires_grad_(gradients) for part in inputs]
    query, key, value = inputs
    length, head_dim = query.shape
    levels = None if case.levels is None else case.levels[batch, head]
    rows_per_block = length if case.block_size is None else case.block_size[0]
    with torch.set_grad_enabled(gradients):
        parts = list(_keys_of(key, value, levels, case.block_size))
        outputs = []
        for rows in torch.arange(length, device=query.device).split(max(1, CHUNK_SCORES // length)):
            output = _attend_rows(query[rows] * head_dim**-0.5, parts, rows // rows_per_block)
            if gradients:
                output.backward(case.grad_output[batch, head, rows].to(precise), retain_graph=True)
            outputs.append(output.detach())
    if gradients:
        return tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in inputs)
    return (torch.cat(outputs),)


def _attend_rows(query: torch.Tensor, parts: list[_Keys], row_blocks: torch.Tensor) -> torch.Tensor:
    """Rows of softmax attention over all parts; a row without keys gives 0."""
    if not parts:
        return query * 0
    scores, values = [], []
    for part in parts:
        kept = part.kept[row_blocks].repeat_interleave(part.width, -1)[:, : len(part.key)]
        part_scores = query @ part.key.T + part.log_counts
        scores.append(part_scores.masked_fill(~kept, torch.finfo(query.dtype).min))
        values.append(part.value)
    all_scores = torch.cat(scores, 1)
    empty = (all_scores == torch.finfo(query.dtype).min).all(1, keepdim=True)
    return torch.softmax(all_scores, 1).masked_fill(empty, 0) @ torch.cat(values)
