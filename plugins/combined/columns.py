"""Frame patterns by column: one pattern for each key frame, weighted by the table of frame masses.

The pattern towards a key frame is that of the frame which looks at it most. Its rows are corrected by how
much the first frame, which attends exactly, gives to that key frame at each place; key frames that hold much
of the first frame's attention take its pattern itself.

Shape letters: H heads of all batch entries, F frames, P places of a frame, D head dimension.
"""

from typing import NamedTuple

import torch

from plugins.combined.frame_attention import Heads, attention_with_lse, exact_frames, mix, text_attention
from plugins.combined.frame_tables import FrameTables

SMALLEST_CORRECTION = 1e-6  # no row is without any weight


class ColumnOptions(NamedTuple):
    """Numbers of the column form.

    Args:
        exact_mass (float): key frames with this share of the first frame's attention take its pattern.
        bounds (tuple[float, float]): range of the row corrections of frames.
        text_bounds (tuple[float, float]): range of those of the text.
    """

    exact_mass: float
    bounds: tuple[float, float]
    text_bounds: tuple[float, float]


def attend_by_columns(
    heads: Heads, tables: FrameTables, options: ColumnOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of all video queries, and the patterns that were computed beside the first frame's.

    Returns:
        tuple[Tensor, Tensor]: output ``[H, F, P, D]`` and computed patterns ``[H, F]`` bool.
    """
    query, key, value = (heads.frames(part) for part in heads[:3])
    text = text_attention(heads)
    exact = exact_frames(heads, text, torch.zeros(1, dtype=torch.int64, device=query.device))
    masses, text_masses = exact.masses[:, :, 0], exact.text_masses[:, 0]  # [H, F, P], [H, P]
    frame_mass, text_mass = tables.frames.clone(), tables.text.clone()
    frame_mass[:, 0], text_mass[:, 0] = masses.mean(-1), text_masses.mean(-1)

    sources = frame_mass.argmax(1)  # [H, F]
    replaced = frame_mass[:, 0] >= options.exact_mass
    needed = ~replaced & (sources != 0)
    rows = torch.arange(len(query), device=query.device)[:, None]
    outputs, _ = attention_with_lse(query[rows, sources], key, value, needed)
    outputs = torch.where(needed[..., None, None], outputs, exact.outputs[:, :, 0])

    corrections = relative(masses)
    kept = corrections.clamp(min=SMALLEST_CORRECTION)
    corrections = torch.where(replaced[..., None], kept, bounded(corrections, options.bounds))
    text_share = text_mass[..., None] * bounded(relative(text_masses), options.text_bounds)[:, None]
    return mix(outputs, corrections, frame_mass, text, text_share), needed


def relative(masses: torch.Tensor) -> torch.Tensor:
    """Masses over their mean along the last dimension; 1 where there are none."""
    means = masses.mean(-1, keepdim=True)
    return torch.where(means > 0, masses / means, 1.0)


def bounded(rows: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    """Rows within bounds: those that leave them are mapped linearly, keep their sum, and are cut last.

    Args:
        rows (Tensor): ``[..., P]``, not negative.
        bounds (tuple[float, float]): least and greatest value.
    """
    low, high = bounds
    least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    slope = (most.clamp(max=high) - least.clamp(min=low)) / (most - least)
    mapped = least.clamp(min=low) + (rows - least) * slope
    mapped = (mapped * (rows.sum(-1, keepdim=True) / mapped.sum(-1, keepdim=True))).clamp(low, high)
    leaves = ((least < low) | (most > high)) & (most > least)
    return torch.where(leaves, mapped, rows)
