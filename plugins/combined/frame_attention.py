"""Exact attention of the queries of a few frames, frame by frame of the keys.

Shape letters: H heads of all batch entries, N tokens, T text tokens, F frames, P places of a frame, K chosen
frames, D head dimension.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from core.block_mask import BlockSparseMask
from core.dense import attention
from core.layout import TokenLayout
from kernels_common.block_sparse_attention import block_sparse_attention

BLOCK_SIZE = (128, 128)


class Heads(NamedTuple):
    """Query, key and value of the heads of one call, ``[H, N, D]`` each, and their layout."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: TokenLayout

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor, ...], index: torch.Tensor, layout: TokenLayout) -> "Heads":
        """Those of query, key and value ``[B, H, N, D]`` with indices ``batch * H + head``, ``[n]`` int64."""
        batch, heads = tensors[0].shape[:2]
        if len(index) == batch * heads:  # all of them, in their order: no copy
            query, key, value = (part.flatten(0, 1) for part in tensors)
        else:
            query, key, value = (part[index // heads, index % heads] for part in tensors)
        return cls(query, key, value, layout)

    def frames(self, part: torch.Tensor) -> torch.Tensor:
        """The video tokens of one of the three by frames, ``[H, F, P, D]``: a view."""
        shape = (self.layout.frames, self.layout.tokens_per_frame)
        return part[:, self.layout.video_slice].unflatten(1, shape)


class TextAttention(NamedTuple):
    """Attention of all video queries to the text alone.

    Args:
        output (Tensor): ``[H, F, P, D]``.
        lse (Tensor): natural log-sum-exp of the scores, ``[H, F, P]`` fp32; -inf without text.
    """

    output: torch.Tensor
    lse: torch.Tensor


class ExactFrames(NamedTuple):
    """Attention of the queries of chosen frames, split by the frames of the keys.

    Args:
        outputs (Tensor): within each key frame, ``[H, F, K, P, D]``.
        masses (Tensor): share of each key frame in the attention, ``[H, F, K, P]`` fp32.
        text_masses (Tensor): share of the text, ``[H, K, P]`` fp32.
    """

    outputs: torch.Tensor
    masses: torch.Tensor
    text_masses: torch.Tensor


def put_heads(output: torch.Tensor, index: torch.Tensor, part: torch.Tensor) -> None:
    """Write heads ``[n, N, D]`` to their places in ``[B, H, N, D]``: what `Heads.of` took."""
    heads = output.shape[1]
    output[index // heads, index % heads] = part


def text_attention(heads: Heads) -> TextAttention:
    """Attention of every video query to the text keys; zeros where there is no text."""
    layout = heads.layout
    query = heads.frames(heads.query)
    if not layout.text_length:
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
        return TextAttention(torch.zeros_like(query), lse)
    video, text = layout.video_slice, layout.text_slice
    parts = (heads.query[:, video], heads.key[:, text], heads.value[:, text])
    output, lse = attention_with_lse(*(part[:, None] for part in parts))
    frames = query.shape[1:3]
    return TextAttention(output[:, 0].unflatten(1, frames), lse[:, 0].unflatten(1, frames))


def exact_frames(heads: Heads, text: TextAttention, chosen: torch.Tensor) -> ExactFrames:
    """Attention of the queries of the chosen frames, by one batch of small problems.

    Args:
        heads (Heads): the call.
        text (TextAttention): its attention to the text.
        chosen (Tensor): ``[K]`` int64, frames.
    """
    query, key, value = (heads.frames(part) for part in heads[:3])
    shape = (len(chosen), query.shape[2])
    queries = query.index_select(1, chosen).flatten(1, 2)[:, None].expand(-1, query.shape[1], -1, -1)
    outputs, lse = attention_with_lse(queries, key, value)
    text_lse = text.lse.index_select(1, chosen)
    lse = lse.unflatten(2, shape)  # [H, F, K, P]
    total = torch.logaddexp(lse.logsumexp(1), text_lse)
    return ExactFrames(outputs.unflatten(2, shape), (lse - total[:, None]).exp(), (text_lse - total).exp())


def attend_text_queries(heads: Heads) -> torch.Tensor:
    """Dense attention of the text queries to the whole sequence, ``[H, T, D]``."""
    parts = (heads.query[:, heads.layout.text_slice], heads.key, heads.value)
    return attention(*(part[:, None] for part in parts))[:, 0]


def attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, needed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of many small problems, with the log-sum-exp of its scores.

    Args:
        query (Tensor): ``[B, H, Nq, D]``.
        key (Tensor): ``[B, H, Nk, D]``.
        value (Tensor): ``[B, H, Nk, D]``.
        needed (Tensor, Optional): ``[B, H]`` bool; the others are not computed and give 0 and -inf.
            Default: all

    Returns:
        tuple[Tensor, Tensor]: output ``[B, H, Nq, D]`` and natural log-sum-exp ``[B, H, Nq]`` fp32.
    """
    if needed is None and query.device.type == "cpu":
        # The kernel takes any other last stride for 1; scaled_dot_product_attention copies, but gives no LSE.
        parts = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, scale=query.shape[-1] ** -0.5
        )
    mask = BlockSparseMask.full(BLOCK_SIZE, query.shape[2], key.shape[2], query.device)
    if needed is not None:
        rows = (*needed.shape, mask.query_blocks)
        counts = (mask.counts * needed[..., None]).to(torch.int32)
        mask = replace(mask, counts=counts, indices=mask.indices.expand(*rows, -1))
    return block_sparse_attention(query, key, value, mask, return_lse=True)


def mix(
    outputs: torch.Tensor,
    corrections: torch.Tensor,
    weights: torch.Tensor,
    text: TextAttention,
    text_share: torch.Tensor,
) -> torch.Tensor:
    """Weighted means of pattern outputs and text, whose shares sum to 1 in every row; ``[H, F, P, D]``.

    Args:
        outputs (Tensor): ``[H, J, P, D]``, may be changed in place.
        corrections (Tensor): factor of every row of an output, ``[H, J, P]`` fp32.
        weights (Tensor): of the outputs in every frame, ``[H, F, J]`` fp32.
        text (TextAttention): attention to the text, may be changed in place.
        text_share (Tensor): its weight in every row, ``[H, F, P]`` fp32.
    """
    dtype = text.output.dtype
    precise = torch.float32 if dtype == torch.float16 else dtype  # weights reach 1e6, corrections 1e3
    outputs, text_output, weights = outputs.to(precise), text.output.to(precise), weights.to(precise)
    total = torch.bmm(weights.float(), corrections) + text_share  # with the weights as they are used
    outputs.mul_(corrections[..., None])
    mixed = torch.bmm(weights, outputs.flatten(2)).view_as(text_output)
    mixed.add_(text_output.mul_(text_share[..., None]))
    return mixed.div_(total[..., None]).to(dtype)
