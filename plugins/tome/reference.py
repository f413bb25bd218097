"""Token merging by its definition: loops over cells, tokens and groups, softmax in fp64. Slow and obvious.

Nothing here is shared with `partition`, `matching` and `merging`, which are tested against it. Memory is
quadratic in the tokens.
"""

import itertools

import torch

from core.layout import TokenLayout


def split_tokens(
    layout: TokenLayout, cell: tuple[int, int, int], seed: int | None
) -> tuple[list[int], list[int]]:
    """Sources and destinations, ascending tokens of the sequence.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        cell (tuple[int, int, int]): frames, rows and columns of a cell.
        seed (int, Optional): seed of the destination's place in each cell; None takes the first.
    """
    starts = (
        range(1, layout.frames - cell[0] + 1, cell[0]),
        range(0, layout.height - cell[1] + 1, cell[1]),
        range(0, layout.width - cell[2] + 1, cell[2]),
    )
    corners = list(itertools.product(*starts))
    volume = cell[0] * cell[1] * cell[2]
    places = [0] * len(corners)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(volume, (len(corners),), generator=generator).tolist()
    destinations = set(range(layout.tokens_per_frame))
    for (frame, row, column), place in zip(corners, places, strict=True):
        f, y = frame + place // (cell[1] * cell[2]), row + place // cell[2] % cell[1]
        destinations.add((f * layout.height + y) * layout.width + column + place % cell[2])
    sources = [token for token in range(layout.video_length) if token not in destinations]
    first = layout.video_start
    return [first + token for token in sources], [first + token for token in sorted(destinations)]


def are_near(layout: TokenLayout, cell: tuple[int, int, int], source: int, destination: int) -> bool:
    """Whether two tokens lie in the same or neighbouring cells; frame 0 counts as near to every frame."""
    whole = ((layout.frames - 1) // cell[0], layout.height // cell[1], layout.width // cell[2])
    cells = []
    for token in (source, destination):
        place = token - layout.video_start
        frame, inside = divmod(place, layout.tokens_per_frame)
        grid = (frame - 1, inside // layout.width, inside % layout.width)
        # Tokens past the last whole cell belong to it.
        cells.append([min(g // size, max(n, 1) - 1) for g, size, n in zip(grid, cell, whole, strict=True)])
    in_first_frame = destination - layout.video_start < layout.tokens_per_frame
    return all(
        abs(a - b) <= 1 or (axis == 0 and in_first_frame)
        for axis, (a, b) in enumerate(zip(*cells, strict=True))
    )


def similarities(key: torch.Tensor, value: torch.Tensor, metric: str) -> torch.Tensor:
    """Similarity of every two tokens of one head, ``[S, S]`` fp64.

    Args:
        key (Tensor): ``[S, D]``; the mean over the heads for ``"mean_k"``.
        value (Tensor): ``[S, D]``.
        metric (str): ``"kv_norm"``, ``"k"`` or ``"mean_k"``.
    """
    key, value = key.double(), value.double()
    if metric != "kv_norm":
        length = key.norm(dim=-1)
        return key @ key.mT / (length[:, None] * length)
    dots, lengths, squares = torch.zeros(3, len(key), len(key), dtype=torch.float64)
    for part in (key, value):
        dots = dots + part @ part.mT
        lengths = lengths + part.norm(dim=-1)[:, None] * part.norm(dim=-1)
        squares = squares + part.square().sum(-1)[:, None]
    return (dots + lengths) / (2 * squares.sqrt() * squares.mT.sqrt())


def merged_groups(
    similarity: torch.Tensor, sources: list[int], near: dict[int, list[int]], r: int
) -> list[tuple[int, int]]:
    """The ``r`` pairs (source, destination) that are merged: the most similar, of equals the first.

    Args:
        similarity (Tensor): ``[S, S]``.
        sources (list[int]): tokens that may be merged, ascending.
        near (dict[int, list[int]]): destinations that each source looks at, ascending.
        r (int): pairs to merge.
    """
    pairs = [(token, max(near[token], key=lambda to: float(similarity[token, to]))) for token in sources]
    return sorted(pairs, key=lambda pair: -float(similarity[pair]))[:r]


def tome_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    r: int,
    cell: tuple[int, int, int],
    seed: int | None,
    metric: str,
    candidates: str,
    merge_queries: bool,
) -> torch.Tensor:
    """Attention with ``r`` merged tokens per head.

    Args:
        query (Tensor): ``[B, H, S, D]``; key and value likewise.
        layout (TokenLayout): text and grid of the sequence; the rest as in `plugins.tome.strategy`.

    Returns:
        Tensor: ``[B, H, S, D]`` fp64.
    """
    sources, destinations = split_tokens(layout, cell, seed)
    near = {
        token: [to for to in destinations if candidates == "all" or are_near(layout, cell, token, to)]
        for token in sources
    }
    output = torch.empty(query.shape, dtype=torch.float64)
    for batch, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        compared = key[batch].double().mean(0) if metric == "mean_k" else key[batch, head]
        similarity = similarities(compared, value[batch, head], metric)
        owner = dict(merged_groups(similarity, sources, near, r))
        groups: dict[int, list[int]] = {
            token: [token] for token in range(layout.sequence_length) if token not in owner
        }
        for token, to in owner.items():
            groups[to].append(token)
        q, k, v = (part[batch, head].double() for part in (query, key, value))
        merged_key = torch.stack([k[group].mean(0) for group in groups.values()])
        merged_value = torch.stack([v[group].mean(0) for group in groups.values()])
        counts = torch.tensor([len(group) for group in groups.values()], dtype=torch.float64)
        if merge_queries:
            q = torch.stack([q[owner_group(groups, token)].mean(0) for token in range(len(q))])
        scores = q @ merged_key.mT / q.shape[-1] ** 0.5 + counts.log()
        output[batch, head] = scores.softmax(-1) @ merged_value
    return output


def owner_group(groups: dict[int, list[int]], token: int) -> list[int]:
    """The group that holds a token."""
    return next(group for group in groups.values() if token in group)
