"""Frame patterns from anchors: a few frames attend exactly, those between them follow.

The queries of an anchor frame see all keys. The same place of another frame takes the anchor's weights
within every key frame; its own are only what each key frame counts, by the sampled table of frame masses, and
what it takes from the text. Between two anchors both are blended by distance.

Shape letters: H heads of all batch entries, F frames, K anchors, P places of a frame, D head dimension.
"""

from typing import NamedTuple

import torch

from core.dense import attention
from plugins.combined.frame_attention import Heads, exact_frames, mix, text_attention
from plugins.combined.frame_tables import FrameTables

LEAST_MASS = 1e-6  # added to masses before two are compared: those of frames that nobody looks at are alike


class Anchors(NamedTuple):
    """Anchor frames on a device, ``[K]`` int64, and their share in every frame, ``[F, K]`` fp32."""

    frames: torch.Tensor
    blend: torch.Tensor

    @classmethod
    def spread(cls, frames: int, count: int, device: torch.device) -> "Anchors":
        """At most ``count`` anchors for so many frames."""
        anchors = anchor_frames(frames, count)
        return cls(torch.tensor(anchors, device=device), anchor_blend(frames, anchors).to(device))


def anchor_frames(frames: int, count: int) -> list[int]:
    """The middle frames of ``count`` equal parts of the video, no frame twice."""
    count = min(count, frames)
    return [(2 * index + 1) * frames // (2 * count) for index in range(count)]


def anchor_blend(frames: int, anchors: list[int]) -> torch.Tensor:
    """Share of every anchor in every frame, ``[F, K]`` fp32: linear between anchors, the nearest beyond."""
    blend = torch.zeros(frames, len(anchors))
    for frame in range(frames):
        after = next((index for index, anchor in enumerate(anchors) if anchor >= frame), len(anchors) - 1)
        before = max((index for index, anchor in enumerate(anchors) if anchor <= frame), default=0)
        distance = anchors[after] - anchors[before]
        share = (frame - anchors[before]) / distance if distance > 0 else 1.0
        blend[frame, before] = 1.0 - share
        blend[frame, after] += share
    return blend


def attend_by_anchors(heads: Heads, tables: FrameTables, anchors: Anchors, exact_rows: float) -> torch.Tensor:
    """Output of all video queries, ``[H, F, P, D]``; anchor frames are exact.

    Args:
        heads (Heads): the call.
        tables (FrameTables): masses of the call.
        anchors (Anchors): the frames that attend exactly.
        exact_rows (float): share of the video queries that attend exactly beside them: those that differ most
            from the anchors' queries at their place, as a moving object's do.
    """
    frames = heads.layout.frames
    text = text_attention(heads)
    exact = exact_frames(heads, text, anchors.frames)

    # The text counts as one more frame, the last one.
    masses = torch.cat([exact.masses, exact.text_masses[:, None]], 1)  # [H, F + 1, K, P]
    means = masses.mean(-1)
    corrections = masses / means.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    sampled = torch.cat([tables.frames, tables.text[..., None]], 2) + LEAST_MASS  # [H, F, F + 1]
    ratios = sampled[:, :, None] / sampled[:, None, anchors.frames]  # [H, F, K, F + 1]
    weights = (ratios * anchors.blend[..., None]).mT * means[:, None]  # [H, F, F + 1, K]
    text_share = torch.einsum("hfk,hkp->hfp", weights[:, :, frames], corrections[:, frames])
    outputs, rows = (part[:, :frames].flatten(1, 2) for part in (exact.outputs, corrections))
    output = mix(outputs, rows, weights[:, :, :frames].flatten(2), text, text_share)
    if (moved := int(exact_rows * heads.layout.video_length)) > 0:
        attend_rows(heads, _farthest_rows(heads, anchors, moved), output)
    return output


def attend_rows(heads: Heads, rows: torch.Tensor, output: torch.Tensor) -> None:
    """Dense attention of single video queries, written into ``output``.

    Args:
        heads (Heads): the call.
        rows (Tensor): ``[H, R]`` int64, video tokens of every head.
        output (Tensor): ``[H, F, P, D]``, contiguous.
    """
    index = rows[..., None].expand(-1, -1, output.shape[3])
    query = heads.query[:, heads.layout.video_slice].gather(1, index)
    exact = attention(*(part[:, None] for part in (query, heads.key, heads.value)))[:, 0]
    output.flatten(1, 2).scatter_(1, index, exact)


def _farthest_rows(heads: Heads, anchors: Anchors, count: int) -> torch.Tensor:
    """Video tokens whose queries differ most from the blend of the anchors' queries, ``[H, count]`` int64."""
    query = heads.frames(heads.query)
    weights = anchors.blend.to(query.dtype).expand(len(query), -1, -1)
    expected = torch.bmm(weights, query.index_select(1, anchors.frames).flatten(2)).view(query.shape)
    distance = (query - expected).square().sum(-1, dtype=torch.float32)
    return distance.flatten(1).topk(count, 1, sorted=False).indices
