"""Which blocks a call keeps: mean tokens of blocks, their softmax, and a choice per row."""

import torch

from core.block_mask import BlockSparseMask, block_count
from core.errors import UnsupportedCallError
from core.layout import TokenLayout
from kernels_common.block_statistics import block_means, token_mean
from kernels_common.mask_density import mask_density
from kernels_common.score_projection import Projection, reduce_tokens
from kernels_common.selection import lists_from_blocks, select_mass, select_top_k
from kernels_common.tensor_checks import resolve_scale


def predict_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    block_size: tuple[int, int],
    *,
    top_k: int | float | torch.Tensor | None = None,
    cdf: float | torch.Tensor | None = None,
    similarity_threshold: float | torch.Tensor | None = None,
    scale: float | None = None,
    forced: torch.Tensor | None = None,
    causal: bool = False,
    order: torch.Tensor | None = None,
    projection: Projection = "none",
    directions: int = 16,
) -> BlockSparseMask:
    """Blocks that carry most of the attention between mean tokens (SpargeAttn, arXiv 2502.18137, section 3).

    Blocks whose tokens differ (self-similarity up to the threshold, of keys centred by their mean unless
    the call is causal) have a mean that says nothing: such key blocks are kept in every row, and such query
    blocks keep every key.

    The queries of a block share one choice. In a causal call it depends on them and on earlier tokens only.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        top_k (int | float | Tensor, Optional): key blocks per row, or their share, or one of either per
            head, or per head and row; see :func:`kernels_common.select_top_k`. Either this or ``cdf`` is
            given.
        cdf (float | Tensor, Optional): share of the estimated attention that the kept blocks hold at most,
            one number or one per head; see :func:`kernels_common.select_mass`.
        similarity_threshold (float | Tensor, Optional): self-similarity from 0 to 1, one number or one per
            query head. Default: every block is taken as alike
        scale (float, Optional): factor on the scores. Default: ``1 / sqrt(D)``
        forced (Tensor, Optional): blocks kept in any case, bool, broadcastable to ``[B, Hq, Mq, Mk]``.
            Forced and unlike blocks take no part in the softmax, and are not counted in ``top_k`` and
            ``cdf``. Default: none
        causal (bool): no query sees a later key (Nq = Nk): blocks behind a row are left out, and those that
            hold tokens of the row itself are kept; neither is counted. Default: False
        order (Tensor, Optional): ``[N]`` int32 or int64, tokens in blocks, not in causal calls; Nq = Nk.
            Default: the order that they come in
        projection (str): in which dimensions mean tokens are compared: ``"none"``, all; others as
            :func:`kernels_common.score_projection.score_projection` finds them from the mean tokens, not
            in causal calls. Default: ``"none"``
        directions (int): dimensions that a projection leaves. Default: 16

    Returns:
        BlockSparseMask: ``[B, Hq]`` lists.

    Raises:
        UnsupportedCallError: a projection, which depends on all tokens, in a causal call.
        ParameterError: ``scale`` is not positive and finite.
    """
    if causal and projection != "none":
        raise UnsupportedCallError(
            f"sparge: a causal row must not depend on later tokens, and projection '{projection}' does; "
            "leave projection at 'none'"
        )
    queries, keys = query.shape[2], key.shape[2]
    scale = resolve_scale(scale, query.shape[3])
    query_blocks = block_means(query, block_size[0], order=order)
    # The softmax over blocks is blind to a shared offset; self-similarity is not. A causal row must not
    # depend on later keys, and their mean does.
    offset = token_mean(key) if similarity_threshold is not None and not causal else None
    key_blocks = block_means(key, block_size[1], subtract=offset, order=order)
    if similarity_threshold is not None:
        unlike = _unlike(query_blocks.similarity, key_blocks.similarity, similarity_threshold)
        forced = unlike if forced is None else unlike | forced
    lengths = (block_size, queries, keys)
    if not causal:
        means = reduce_tokens(query_blocks.mean, key_blocks.mean, projection, directions)
        return _select(_importance(*means, scale, forced), lengths, top_k, cdf, forced)
    visible, own = causal_blocks(queries, block_size, query.device)
    forced = own if forced is None else own | forced
    importance = _importance(query_blocks.mean, key_blocks.mean, scale, forced | ~visible)
    mask = _select(importance, lengths, top_k, cdf, forced)
    return BlockSparseMask(*lists_from_blocks(mask.to_blocks() & visible), block_size, queries, keys)


def _importance(
    query_means: torch.Tensor, key_means: torch.Tensor, scale: float, left_out: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention of mean query tokens to mean key tokens, ``[B, Hq, Mq, Mk]``.

    Blocks left out (bool, broadcastable) have 0, unless a row has no other: then equal shares.
    """
    grouped = query_means.unflatten(1, (key_means.shape[1], -1)).flatten(2, 3)  # [B, Hkv, group * Mq, D]
    scores = (grouped * scale) @ key_means.transpose(2, 3)
    scores = scores.view(*query_means.shape[:3], key_means.shape[2])
    if left_out is not None:
        scores.masked_fill_(left_out, torch.finfo(scores.dtype).min)  # -inf could make a row NaN
    return scores.softmax(-1)


def _select(
    importance: torch.Tensor,
    lengths: tuple[tuple[int, int], int, int],
    top_k: int | float | torch.Tensor | None,
    cdf: float | torch.Tensor | None,
    forced: torch.Tensor | None,
) -> BlockSparseMask:
    if cdf is not None:
        return select_mass(importance, cdf, *lengths, include_crossing=False, forced=forced)
    assert top_k is not None
    return select_top_k(importance, top_k, *lengths, forced=forced)


def causal_blocks(
    length: int, block_size: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks with any visible pair, and those with tokens of both sides alike, ``[Mq, Mk]`` bool each."""
    rows, columns = (torch.arange(0, length, size, device=device) for size in block_size)
    visible = columns < (rows + block_size[0])[:, None]
    return visible, visible & (columns + block_size[1] > rows[:, None])


def _unlike(
    query_similarity: torch.Tensor, key_similarity: torch.Tensor, threshold: float | torch.Tensor
) -> torch.Tensor:
    """Blocks whose query or key block is not alike, ``[B, Hq, Mq, Mk]`` bool."""
    group = query_similarity.shape[1] // key_similarity.shape[1]
    key_similarity = key_similarity.repeat_interleave(group, 1)
    if isinstance(threshold, torch.Tensor):
        threshold = threshold[:, None]
    # Written so that a NaN counts as unlike.
    rows, columns = ~(query_similarity > threshold), ~(key_similarity > threshold)
    return rows[..., None] | columns[:, :, None]


def executed_density(mask: BlockSparseMask, *, causal: bool) -> torch.Tensor:
    """Share of the work of dense attention that a mask keeps, a 0-d float64 tensor on its device.

    Of all (query, key) pairs; in a causal call of the blocks with any visible pair.
    """
    if not causal:
        return mask_density(mask)
    visible, _ = causal_blocks(mask.query_length, mask.block_size, mask.device)
    return mask.counts.sum(dtype=torch.float64) / (visible.sum() * mask.counts[..., 0].numel())


def forced_blocks(layout: TokenLayout, block_size: tuple[int, int], *, sink: bool) -> torch.Tensor:
    """Blocks that hold text and, with ``sink``, those of the first key block: ``[Mq, Mk]`` bool."""
    length = layout.sequence_length
    rows, columns = (torch.arange(block_count(length, size)) * size for size in block_size)
    forced = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    if layout.text_length:
        text = layout.text_slice
        forced |= ((rows < text.stop) & (rows + block_size[0] > text.start))[:, None]
        forced |= (columns < text.stop) & (columns + block_size[1] > text.start)
    if sink:
        forced[:, 0] = True
    return forced
