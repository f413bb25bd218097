"""Frame patterns and head tests by their definition: explicit matrices in fp64, one head. Slow and obvious.

Nothing here is shared with the modules that are tested against it. Memory is quadratic in the tokens.

Shape letters: N tokens, T text tokens, F frames, P places of a frame, D head dimension.
"""

import math

import torch

from core.layout import TokenLayout


def sorted_mass(
    query: torch.Tensor, key: torch.Tensor, layout: TokenLayout, places: list[int], key_stride: int
) -> float:
    """Sum of the first 20 % of the mean sorted attention row; query and key ``[N, D]``."""
    rows = []
    for place in places:
        scores = key[::key_stride].double() @ query[layout.video_start + place].double()
        rows.append((scores * query.shape[1] ** -0.5).softmax(0).sort(descending=True).values)
    return float(torch.stack(rows).mean(0)[: max(1, round(0.2 * len(rows[0])))].sum())


def tables(
    query: torch.Tensor, key: torch.Tensor, layout: TokenLayout, places: list[int]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Frame masses ``[F, F]``, text masses ``[F]`` and similarity of one head by the given places."""
    frames = range(layout.frames)
    tokens = [[layout.video_start + f * layout.tokens_per_frame + place for place in places] for f in frames]
    columns = list(range(layout.text_start, layout.text_start + layout.text_length)) + [
        token for frame in tokens for token in frame
    ]
    text, count = layout.text_length, len(places)
    masses, text_masses = (
        torch.zeros(layout.frames, layout.frames).double(),
        torch.zeros(layout.frames).double(),
    )
    blocks = {}
    for f in frames:
        scores = query[tokens[f]].double() @ key[columns].double().T * query.shape[1] ** -0.5
        scores[:, :text] += math.log(count / layout.tokens_per_frame)
        weights = scores.softmax(-1)
        text_masses[f] = weights[:, :text].sum(-1).mean()
        for g in frames:
            blocks[f, g] = weights[:, text + g * count : text + (g + 1) * count]
            masses[f, g] = blocks[f, g].sum(-1).mean()
    cosines = [
        (blocks[f, g] * blocks[other, g]).sum() / (blocks[f, g].norm() * blocks[other, g].norm())
        for g in frames
        for f in frames
        for other in frames
    ]
    return masses, text_masses, float(torch.stack(cosines).mean())


def bounded(row: list[float], low: float, high: float) -> list[float]:
    """The bounding rule for one row of corrections."""
    least, most = min(row), max(row)
    if (least >= low and most <= high) or least == most:
        return row
    target_least, target_most = max(least, low), min(most, high)
    mapped = [target_least + (x - least) / (most - least) * (target_most - target_least) for x in row]
    factor = sum(row) / sum(mapped)
    return [min(max(x * factor, low), high) for x in mapped]


def column_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    masses: torch.Tensor,
    text_masses: torch.Tensor,
    *,
    exact_mass: float,
    bounds: tuple[float, float],
    text_bounds: tuple[float, float],
) -> torch.Tensor:
    """Column form with its s x s patterns, one head: output ``[N, D]`` fp64.

    Args:
        query (Tensor): ``[N, D]``.
        key (Tensor): ``[N, D]``.
        value (Tensor): ``[N, D]``.
        layout (TokenLayout): text and grid of the sequence.
        masses (Tensor): ``[F, F]``, table of frame masses; row 0 is replaced by the exact one.
        text_masses (Tensor): ``[F]``, likewise.
        exact_mass (float): as in `ColumnOptions`.
        bounds (tuple[float, float]): as in `ColumnOptions`.
        text_bounds (tuple[float, float]): as in `ColumnOptions`.
    """
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.T * query.shape[1] ** -0.5
    weights = scores.softmax(-1)
    frames, text = _frame_slices(layout), layout.text_slice
    masses, text_masses = masses.double().clone(), text_masses.double().clone()
    first = weights[frames[0]]
    for i, columns in enumerate(frames):
        masses[0, i] = first[:, columns].sum(-1).mean()
    text_masses[0] = first[:, text].sum(-1).mean()

    patterns = []
    for i, columns in enumerate(frames):
        share = first[:, columns].sum(-1)
        if masses[0, i] >= exact_mass:
            patterns.append(first[:, columns] / share.mean())
            continue
        source = frames[int(masses[:, i].argmax())]
        correction = torch.tensor(bounded((share / share.mean()).tolist(), *bounds), dtype=torch.float64)
        patterns.append(correction[:, None] * scores[source, columns].softmax(-1))
    output = weights @ value  # text queries are exact
    for f, rows in enumerate(frames):
        combined = sum(masses[f, i] * patterns[i] @ value[columns] for i, columns in enumerate(frames))
        total = sum(masses[f, i] * patterns[i].sum(-1) for i in range(layout.frames))
        if layout.text_length:
            share = first[:, text].sum(-1)
            correction = torch.tensor(bounded((share / share.mean()).tolist(), *text_bounds)).double()
            correction *= text_masses[f]
            combined = combined + correction[:, None] * (scores[rows, text].softmax(-1) @ value[text])
            total = total + correction
        output[rows] = combined / total[:, None]
    return output


def anchor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    masses: torch.Tensor,
    text_masses: torch.Tensor,
    anchors: list[int],
    least_mass: float,
) -> torch.Tensor:
    """Anchor form by re-weighted rows of the attention matrix, one head: output ``[N, D]`` fp64.

    Args:
        query (Tensor): ``[N, D]``.
        key (Tensor): ``[N, D]``.
        value (Tensor): ``[N, D]``.
        layout (TokenLayout): text and grid of the sequence.
        masses (Tensor): ``[F, F]``, table of frame masses.
        text_masses (Tensor): ``[F]``, that of the text.
        anchors (list[int]): exact frames, ascending.
        least_mass (float): added to every mass before two are compared.
    """
    masses, text_masses = masses.double(), text_masses.double()
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.T * query.shape[1] ** -0.5
    weights = scores.softmax(-1)
    frames, text = _frame_slices(layout), layout.text_slice
    output = weights @ value
    for f, rows in enumerate(frames):
        before = max((a for a in anchors if a <= f), default=anchors[0])
        after = min((a for a in anchors if a >= f), default=anchors[-1])
        far = (f - before) / (after - before) if after > before else 0.0
        combined = torch.zeros_like(output[rows])
        total = combined[:, 0].clone()
        for anchor, share in ((before, 1 - far), (after, far)):
            row_weights = weights[frames[anchor]].clone()
            for i, columns in enumerate(frames):
                row_weights[:, columns] *= (
                    share * (masses[f, i] + least_mass) / (masses[anchor, i] + least_mass)
                )
            row_weights[:, text] *= share * (text_masses[f] + least_mass) / (text_masses[anchor] + least_mass)
            for columns in frames:
                combined = combined + row_weights[:, columns] @ value[columns]
            if layout.text_length:
                text_output = scores[rows, text].softmax(-1) @ value[text]
                combined = combined + row_weights[:, text].sum(-1, keepdim=True) * text_output
            total = total + row_weights.sum(-1)
        output[rows] = combined / total[:, None]
    return output


def _frame_slices(layout: TokenLayout) -> list[slice]:
    size = layout.tokens_per_frame
    return [
        slice(layout.video_start + f * size, layout.video_start + (f + 1) * size)
        for f in range(layout.frames)
    ]
