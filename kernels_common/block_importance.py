"""Importance of every (query block, key block) pair, estimated from mean or sampled tokens.

Shape letters: B batch, H query heads, N tokens, M blocks, m sampled tokens per block, D head dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from core.argument_checks import check_alike, check_tensors_given, shapes_of
from core.block_mask import block_count
from core.errors import LayoutError, ParameterError
from kernels_common.permutation import gather_tokens
from kernels_common.tensor_checks import resolve_scale
from kernels_common.triton_choice import runs_triton

MAX_SAMPLES = 128  # sampled tokens per block that one tile of the kernel holds
MAX_TOKEN_BYTES = 512  # of one head, for which tiles of the kernel fit into shared memory
SCORES_PER_CHUNK = 1 << 22


class BlockSample(NamedTuple):
    """Tokens that stand for their blocks; made by :func:`sample_blocks`.

    Args:
        positions (Tensor): token indices, block after block, ``[(M - 1) * per_block + tail]`` int64 with
            1 <= tail <= per_block tokens of the last block.
        per_block (int): tokens of every block but the last.
    """

    positions: torch.Tensor
    per_block: int


def sample_blocks(length: int, block: int, samples: int, generator: torch.Generator) -> BlockSample:
    """Random tokens of every block, without repetition, on the generator's device.

    A ragged last block of n tokens gives ``ceil(samples * n / block)``, so that a sampled token stands for
    about as many tokens in every block.

    Args:
        length (int): tokens, >= 1.
        block (int): tokens of a block.
        samples (int): tokens to draw from a block, a power of two up to ``block`` and 128.
        generator (torch.Generator): source of the draw, such as :func:`core.random.call_generator`.

    Raises:
        ParameterError: the numbers are outside what is stated.
    """
    if not isinstance(generator, torch.Generator):
        raise ParameterError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    whole = all(isinstance(number, int) for number in (length, block, samples))
    if not whole or length < 1 or not 1 <= samples <= min(block, MAX_SAMPLES) or samples & (samples - 1):
        raise ParameterError(
            f"samples must be a power of two up to the block and {MAX_SAMPLES}, of at least 1 token; "
            f"got {samples} samples of blocks of {block} of {length} tokens"
        )
    blocks = block_count(length, block)
    tail = length - (blocks - 1) * block
    draw = torch.rand(blocks, block, generator=generator, device=generator.device)
    draw[-1, tail:] = 2.0  # behind every real token
    starts = torch.arange(0, length, block, device=generator.device)
    positions = draw.argsort(-1)[:, :samples] + starts[:, None]
    return BlockSample(positions.flatten()[: (blocks - 1) * samples + -(-samples * tail // block)], samples)


def mean_pool_importance(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    *,
    scale: float | None = None,
    excluded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of mean query tokens to mean key tokens (SpargeAttn, arXiv 2502.18137).

    Args:
        query_means (Tensor): ``[B, Hq, Mq, D]``, the mean of :func:`kernels_common.block_means`.
        key_means (Tensor): ``[B, Hkv, Mk, D]``; Hq is a multiple of Hkv.
        scale (float, Optional): factor on the scores, > 0. Default: ``1 / sqrt(D)``
        excluded (Tensor, Optional): key blocks that take no part, ``[B, Hkv, Mk]`` bool. Default: none

    Returns:
        Tensor: ``[B, Hq, Mq, Mk]`` fp32 (fp64 for fp64 means); rows sum to 1. Excluded blocks have 0,
        unless a head has no other: then equal shares.

    Raises:
        LayoutError: shapes or devices do not fit together.
        ParameterError: ``scale`` is not positive and finite.
    """
    scale = _check(query_means, key_means, scale)
    expected = tuple(key_means.shape[:3])
    if excluded is not None and (
        tuple(excluded.shape) != expected
        or excluded.dtype != torch.bool
        or excluded.device != key_means.device
    ):
        raise LayoutError(
            f"excluded must be bool {expected} on {key_means.device}, got {excluded.dtype} "
            f"{tuple(excluded.shape)} on {excluded.device}"
        )
    query_means, key_means = (_precise(part.detach()) for part in (query_means, key_means))
    grouped = query_means.reshape(*expected[:2], -1, query_means.shape[3])  # [B, Hkv, Hq / Hkv * Mq, D]
    scores = (grouped * scale) @ key_means.transpose(2, 3)
    if excluded is not None:
        scores.masked_fill_(excluded[:, :, None], torch.finfo(scores.dtype).min)  # -inf could make a row NaN
    return scores.softmax(-1).view(*query_means.shape[:3], expected[2])


def sampled_max_importance(
    query: torch.Tensor,
    key: torch.Tensor,
    query_sample: BlockSample,
    key_sample: BlockSample,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Largest attention weight of each block pair (BLADE, arXiv 2508.10774), rows scaled to sum 1.

    Weights are those of the softmax over all sampled keys, denominator included.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``, all tokens.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        query_sample (BlockSample): from :func:`sample_blocks`; its positions are trusted.
        key_sample (BlockSample): likewise for the keys.
        scale (float, Optional): factor on the scores, > 0. Default: ``1 / sqrt(D)``

    Returns:
        Tensor: ``[B, Hq, Mq, Mk]`` fp32 (fp64 for fp64 input).

    Raises:
        LayoutError: shapes or devices do not fit together.
        ParameterError: ``scale`` is not positive and finite.
    """
    largest = _sampled_importance(query, key, query_sample, key_sample, scale, maximum=True)
    return largest.div_(largest.sum(-1, keepdim=True))


def sampled_sum_importance(
    query: torch.Tensor,
    key: torch.Tensor,
    query_sample: BlockSample,
    key_sample: BlockSample,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention mass of each block pair: the weights of a query block summed per key block, rows sum to 1.

    Arguments, result and errors as in :func:`sampled_max_importance`.
    """
    return _sampled_importance(query, key, query_sample, key_sample, scale, maximum=False)


def _sampled_importance(
    query: torch.Tensor,
    key: torch.Tensor,
    query_sample: BlockSample,
    key_sample: BlockSample,
    scale: float | None,
    *,
    maximum: bool,
) -> torch.Tensor:
    scale = _check(query, key, scale)
    for sample in (query_sample, key_sample):
        if not isinstance(sample, BlockSample):
            raise LayoutError(f"samples must come from sample_blocks, got {type(sample).__name__}")
    query = gather_tokens(query.detach(), query_sample.positions)
    key = gather_tokens(key.detach(), key_sample.positions)
    samples = (query_sample.per_block, key_sample.per_block)
    if not _takes_triton(query):
        return pooled_softmax_torch(query, key, samples, scale, maximum=maximum)
    from kernels_common.block_importance_triton import pooled_softmax_triton

    return pooled_softmax_triton(query, key, samples, scale, maximum=maximum)


def pooled_softmax_torch(
    query: torch.Tensor, key: torch.Tensor, samples: tuple[int, int], scale: float, *, maximum: bool
) -> torch.Tensor:
    """Softmax attention weights pooled over blocks, a few query blocks at a time.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``, sampled tokens only.
        key (Tensor): ``[B, Hkv, Nk, D]``, likewise.
        samples (tuple[int, int]): tokens of a (query block, key block); the last block may have fewer.
        scale (float): factor on the scores.
        maximum (bool): largest weight of a block pair; otherwise the sum over its keys, averaged over its
            queries.

    Returns:
        Tensor: ``[B, Hq, Mq, Mk]`` fp32 (fp64 for fp64 input).
    """
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    keys_BHDN = _precise(key).repeat_interleave(group, 1).transpose(2, 3)
    tail = -key.shape[2] % samples[1]
    blocks_per_chunk = max(1, SCORES_PER_CHUNK // (batch * heads * samples[0] * key.shape[2]))
    parts = []
    for chunk in _precise(query).split(blocks_per_chunk * samples[0], 2):
        weights = F.pad(((chunk * scale) @ keys_BHDN).softmax(-1), (0, tail)).unflatten(-1, (-1, samples[1]))
        rows = weights.amax(-1) if maximum else weights.sum(-1)  # [B, H, sampled queries, Mk]
        blocks = rows.split(samples[0], 2)
        parts += [part.amax(2) if maximum else part.mean(2) for part in blocks]
    return torch.stack(parts, 2)


def _takes_triton(query: torch.Tensor) -> bool:
    return runs_triton(query) and query.shape[3] * query.element_size() <= MAX_TOKEN_BYTES


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _check(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> float:
    """The scale to use."""
    check_tensors_given(queries=query, keys=key)
    check_alike(queries=query, keys=key)
    shapes = shapes_of(queries=query, keys=key)
    if not query.dim() == key.dim() == 4:
        raise LayoutError(f"queries and keys must be [B, H, N, D]; got {shapes}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or not key.numel():
        raise LayoutError(f"queries and keys must share B and D and not be empty; got {shapes}")
    if query.shape[1] % key.shape[1]:
        raise LayoutError(f"query heads must be a multiple of key heads; got {shapes}")
    return resolve_scale(scale, query.shape[3])
