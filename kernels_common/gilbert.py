"""The generalised Hilbert ("Gilbert") curve: an order of the cells of any box that keeps neighbours together.

A box is cut along its longest side, or into three or five smaller boxes whose paths join end to end; halves
are kept even where possible, because a box with even sides can be walked in unit steps. The curve starts at
the origin and ends at the far end of the longest side. With odd sides a few steps are longer than one cell.
"""

from collections.abc import Iterator

import numpy as np
import torch

from core.errors import LayoutError
from core.layout import TokenLayout

Vector = tuple[int, int, int]


def gilbert_curve(width: int, height: int, depth: int) -> torch.Tensor:
    """Cells of a box in the order of the curve.

    Args:
        width (int): cells along x, >= 1.
        height (int): cells along y, >= 1.
        depth (int): cells along z, >= 1.

    Returns:
        Tensor: ``[width * height * depth, 3]`` int64 coordinates (x, y, z), each cell once.

    Raises:
        LayoutError: a side is not a positive integer.
    """
    sides = (width, height, depth)
    if any(not isinstance(side, int) or side < 1 for side in sides):
        raise LayoutError(f"the sides of a box must be integers >= 1, got {sides}")
    axes = [(width, 0, 0), (0, height, 0), (0, 0, depth)]
    # Along the longest side first; ties prefer x, then y.
    if width >= height and width >= depth:
        main, second, third = axes
    elif height >= depth:
        second, main, third = axes
    else:
        second, third, main = axes
    return torch.from_numpy(np.concatenate(list(_walk(main, second, third))))


def gilbert_order(layout: TokenLayout) -> torch.Tensor:
    """Token order of a layout along the curve; x is the column, y the row and z the frame.

    Args:
        layout (TokenLayout): text and grid; text tokens keep their places.

    Returns:
        Tensor: ``[S]`` int64; place ``i`` of the reordered sequence holds token ``order[i]``.
    """
    x, y, z = gilbert_curve(layout.width, layout.height, layout.frames).unbind(-1)
    order = torch.arange(layout.sequence_length)
    order[layout.video_slice] = layout.video_start + x + layout.width * (y + layout.height * z)
    return order


def block_rms_radius(coordinates: torch.Tensor, block: int) -> float:
    """How compact blocks of consecutive tokens are: root mean square distance to the block's centre.

    Args:
        coordinates (Tensor): ``[S, 3]``, cells in the order to judge.
        block (int): tokens of a block; a ragged last block counts with its own tokens.

    Returns:
        float: in cells; a ball-like block of n cells has about ``0.48 * n^(1/3)``.
    """
    squares = [(part - part.mean(0)).square().sum() for part in coordinates.to(torch.float64).split(block)]
    return float((torch.stack(squares).sum() / len(coordinates)).sqrt())


def mean_step(coordinates: torch.Tensor) -> tuple[float, float]:
    """Mean Euclidean length of the steps of an order, and the share of steps of length 1.

    Args:
        coordinates (Tensor): ``[S, 3]``, S >= 2, cells in the order to judge.
    """
    steps = coordinates.to(torch.float64).diff(dim=0).norm(dim=-1)
    return float(steps.mean()), float((steps == 1).double().mean())


def _walk(main: Vector, second: Vector, third: Vector) -> Iterator[np.ndarray]:
    """Pieces of the path through the box that three signed vectors span from the origin."""
    # A piece is a start and its three vectors; a stack keeps deep boxes off Python's call stack.
    pending = [((0, 0, 0), main, second, third)]
    while pending:
        start, a, b, c = pending.pop()
        if not all(map(_length, (a, b, c))):
            continue  # a side of one cell has an empty half
        straight = _straight(a, b, c)
        if straight is not None:
            yield np.add(start, np.multiply.outer(np.arange(_length(straight)), _unit(straight)))
        else:
            pending.extend(reversed(_parts(start, a, b, c)))


def _straight(a: Vector, b: Vector, c: Vector) -> Vector | None:
    """The only vector longer than one cell (``a`` where none is), or None if there are two."""
    longer = [vector for vector in (a, b, c) if _length(vector) > 1]
    if len(longer) > 1:
        return None
    return longer[0] if longer else a


def _parts(o: Vector, a: Vector, b: Vector, c: Vector) -> list[tuple[Vector, Vector, Vector, Vector]]:
    """The smaller boxes of one box, in the order of the path."""
    w, h, d = _length(a), _length(b), _length(c)
    da, db, dc = _unit(a), _unit(b), _unit(c)
    a2, b2, c2 = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = _minus(a, a2), _minus(b, b2), _minus(c, c2)
    end_a = _plus(o, _minus(a, da))  # last cell along a
    last_b, last_c = _minus(b2, db), _minus(c2, dc)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        return [(o, a2, b, c), (_plus(o, a2), rest_a, b, c)]
    if 3 * h > 4 * d:
        return [
            (o, b2, c, a2),
            (_plus(o, b2), a, rest_b, c),
            (_plus(end_a, last_b), _neg(b2), c, _neg(rest_a)),
        ]
    if 3 * d > 4 * h:
        return [
            (o, c2, a2, b),
            (_plus(o, c2), a, b, rest_c),
            (_plus(end_a, last_c), _neg(c2), _neg(rest_a), b),
        ]
    far_c = _minus(c, dc)
    return [
        (o, b2, c2, a2),
        (_plus(o, b2), c, a2, rest_b),
        (_plus(_plus(o, last_b), far_c), a, _neg(b2), _neg(rest_c)),
        (_plus(_plus(end_a, b2), far_c), _neg(c), _neg(rest_a), rest_b),
        (_plus(end_a, last_b), _neg(b2), c2, _neg(rest_a)),
    ]


def _length(vector: Vector) -> int:
    return abs(sum(vector))


def _unit(vector: Vector) -> Vector:
    x, y, z = ((part > 0) - (part < 0) for part in vector)
    return x, y, z


def _half(vector: Vector) -> Vector:
    """Half of a vector, rounded towards minus infinity, then made even where it is longer than two."""
    x, y, z = (part // 2 for part in vector)
    half = (x, y, z)
    return _plus(half, _unit(vector)) if _length(half) % 2 and _length(vector) > 2 else half


def _plus(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _minus(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _neg(a: Vector) -> Vector:
    return -a[0], -a[1], -a[2]
