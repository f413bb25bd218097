"""Pictures of the gallery: scatter plots as SVG, density maps as tiny PNG images.

Both take the page's colours: the SVG refers to the style sheet's custom properties and a density map
carries the density in its alpha channel, so light and dark mode need no second picture.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from PIL import Image

COLOURS = 12
"""Strategy colours of the style sheet (``--s0`` to ``--s11``); later strategies start over."""

MARKERS = "oDs^vPXd<>ph"
MOST_LABELS, LONGEST_LABEL = 7, 28
"""More curves and points, or longer labels, are named below the picture: they would cover it."""
INK, QUIET, RULE = "#a1b1c1", "#a1b1c2", "#a1b1c3"
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "text.color": INK,
    "grid.color": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_ACCENT = (42, 120, 184)


@dataclass(frozen=True)
class Point:
    """One strategy in a scatter plot.

    Args:
        label (str): text beside the marker.
        slot (int): index of the strategy among those compared; chooses colour and marker.
        x (float): median over the jobs.
        y (float): median over the jobs.
        cloud (list[tuple[float, float]]): the single jobs.
        curve (str): label of the line through this and other points, "" for none.
    """

    label: str
    slot: int
    x: float
    y: float
    cloud: list[tuple[float, float]] = field(default_factory=list)
    curve: str = ""

    @property
    def drawable(self) -> bool:
        return math.isfinite(self.x) and math.isfinite(self.y)


@dataclass(frozen=True)
class AxisLabel:
    """What an axis shows.

    Args:
        text (str): quantity and unit.
        baseline (float, Optional): where dense stands on it.
        span (float): smallest range shown, so that noise does not fill the picture.
    """

    text: str
    baseline: float | None = None
    span: float = 0.0


def scatter(points: Sequence[Point], x: AxisLabel, y: AxisLabel, title: str) -> str:
    """Draw one marker per strategy, its jobs faintly behind it, the baseline as a dashed line.

    Points of one curve are joined from left to right and labelled once.

    Returns:
        str: an `<svg>` element with an accessible title, without fixed width; "" if no point has
        both values.
    """
    drawn = [point for point in points if point.drawable]
    if not drawn:
        return ""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        names = list(dict.fromkeys(point.curve or point.label for point in drawn))
        crowded = len(names) > MOST_LABELS or max(map(len, names)) > LONGEST_LABEL
        height = 4.4 + (0.24 * len(names) if crowded else 0.0)
        figure = Figure(figsize=(6.4, height), dpi=72, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _decorate(axes, x, y)
        for curve in dict.fromkeys(point.curve for point in drawn if point.curve):
            _draw_curve(axes, [point for point in drawn if point.curve == curve])
        for point in drawn:
            _draw_point(axes, point)
        _widen(axes, x.span, y.span)
        if crowded:
            _write_legend(figure, drawn)
        else:
            _label_points(axes, drawn, canvas)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), title)


def _decorate(axes: Axes, x: AxisLabel, y: AxisLabel) -> None:
    axes.set_xlabel(x.text)
    axes.set_ylabel(y.text)
    axes.grid(True, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.16, y=0.14)
    axes.tick_params(length=0)
    axes.locator_params(nbins=7)
    if x.baseline is not None:
        axes.axvline(x.baseline, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            "dense",
            (x.baseline, 0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 4),
            textcoords="offset points",
            color=QUIET,
            fontsize=11,
        )


def _widen(axes: Axes, x_span: float, y_span: float) -> None:
    for (low, high), span, limit in (
        (axes.get_xlim(), x_span, axes.set_xlim),
        (axes.get_ylim(), y_span, axes.set_ylim),
    ):
        extra = max(0.0, span - (high - low)) / 2
        limit(low - extra, high + extra)


def _draw_curve(axes: Axes, points: Sequence[Point]) -> None:
    places = sorted((point.x, point.y) for point in points)
    axes.plot(*zip(*places, strict=True), color=_colour(points[0].slot), linewidth=1.6, alpha=0.6)


def _draw_point(axes: Axes, point: Point) -> None:
    colour = _colour(point.slot)
    marker = MARKERS[point.slot % len(MARKERS)]
    cloud = [(x, y) for x, y in point.cloud if math.isfinite(x) and math.isfinite(y)]
    if len(cloud) > 1:
        axes.plot(
            *zip(*cloud, strict=True), marker, color=colour, alpha=0.28, markersize=4, markeredgewidth=0
        )
    axes.plot(point.x, point.y, marker, color=colour, markersize=10, markeredgewidth=0)


def _write_legend(figure: Figure, points: Sequence[Point]) -> None:
    """One line per curve and per point that stands alone, below the axes."""
    slots = {point.curve or point.label: point.slot for point in reversed(points)}
    handles = [
        Line2D(
            [],
            [],
            color=_colour(slot),
            marker=MARKERS[slot % len(MARKERS)],
            markersize=8,
            linewidth=1.6,
            label=name,
        )
        for name, slot in reversed(slots.items())
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=11, labelcolor=INK)


def _label_points(axes: Axes, points: Sequence[Point], canvas: FigureCanvasAgg) -> None:
    """Put each label at the first of its places that touches neither a marker nor another label.

    A curve has one, at its uppermost point.
    """
    canvas.draw()
    renderer = canvas.get_renderer()
    room = Bbox(axes.bbox.get_points())
    centres = [tuple(axes.transData.transform((point.x, point.y))) for point in points]
    markers = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    labels: list[Bbox] = []
    labelled: set[str] = set()
    for index in sorted(range(len(points)), key=lambda index: -centres[index][1]):
        point = points[index]
        if point.curve in labelled:
            continue
        labelled |= {point.curve} - {""}
        text = axes.annotate(
            point.curve or point.label,
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            fontsize=11.5,
            color=INK,
            in_layout=False,
        )
        obstacles = markers[:index] + markers[index + 1 :] + labels
        for dx, dy, align in _places():
            text.set(position=(dx, dy), ha=align, va="center")
            box = text.get_window_extent(renderer)
            inside = all(room.contains(*corner) for corner in box.corners())
            if inside and not any(box.overlaps(other) for other in obstacles):
                break
        labels.append(box)
        if abs(dy) > 16:
            line = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 6}
            axes.annotate("", (point.x, point.y), (dx, dy), textcoords="offset points", arrowprops=line)


def _places() -> Iterator[tuple[float, float, str]]:
    """Offsets in points from the marker, the most natural first."""
    yield from ((10, 0, "left"), (-10, 0, "right"), (0, 14, "center"), (0, -14, "center"))
    for distance in (16, 32, 48, 64, 80):
        for sign in (1, -1):
            yield 9, sign * distance, "left"
            yield -9, sign * distance, "right"
    yield 10, 0, "left"


def _colour(slot: int) -> str:
    return f"#a1b2{slot % COLOURS:02x}"


def _themed(svg: str, title: str) -> str:
    """Make matplotlib's file part of the page: its colours and font, identifiers of its own, a title."""
    head, body = svg[svg.index("<svg") :].strip().split(">", 1)
    box = head.split('viewBox="', 1)[1].split('"', 1)[0]
    colours = {INK: "var(--ink)", QUIET: "var(--quiet)", RULE: "var(--rule)"}
    colours |= {_colour(slot): f"var(--s{slot})" for slot in range(COLOURS)}
    for mark, colour in colours.items():
        body = body.replace(mark, colour)
    prefix = re.sub(r"\W+", "-", title.lower()) + "-"
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;]*; ?", "", body)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", body)
    body = "\n".join(line.strip() for line in body.splitlines() if line.strip())
    return f'<svg class="plot" viewBox="{box}" role="img"><title>{html.escape(title)}</title>{body}'


def density_map(densities: Sequence[Sequence[float | None]]) -> str:
    """Draw layers (rows) by steps (columns) as a `data:` PNG, one pixel a cell.

    Args:
        densities (list[list[float]]): executed density, 0 to 1; None or NaN where nothing was called.
            Rows may differ in length.

    Returns:
        str: address of the image; alpha grows with density, uncalled cells are clear.
    """
    columns = max((len(row) for row in densities), default=0)
    if not columns:
        return ""
    pixels = np.zeros((len(densities), columns, 4), np.uint8)
    pixels[..., :3] = _ACCENT
    for row, values in enumerate(densities):
        for column, value in enumerate(values):
            if value is not None and math.isfinite(value):
                pixels[row, column, 3] = round(20 + 235 * min(max(value, 0.0), 1.0))
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def mean_map(maps: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]]:
    """Average several density maps cell by cell, leaving out what was not called."""
    layers = max((len(one) for one in maps), default=0)
    steps = max((len(row) for one in maps for row in one), default=0)
    if not layers or not steps:
        return []
    stack = np.full((len(maps), layers, steps), np.nan)
    for index, one in enumerate(maps):
        for layer, row in enumerate(one):
            stack[index, layer, : len(row)] = [np.nan if value is None else value for value in row]
    called = np.isfinite(stack)
    total = np.where(called, stack, 0.0).sum(0)
    count = called.sum(0)
    return [
        [round(float(t / c), 4) if c else None for t, c in zip(*pair, strict=True)]
        for pair in zip(total, count, strict=True)
    ]
