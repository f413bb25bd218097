"""Six painted landscapes in muted colours (chroma below 0.26), each seeded and with parallax under a camera
pan.

Shape legend: N clips, T frames, H rows, W columns. Coordinates are in frame heights.
"""

from collections.abc import Callable

import torch

NUMBERS_PER_GROUND = 32


class Canvas:
    """Layers painted over each other, back to front.

    Args:
        x: column coordinate, `(1, 1, 1, W)`.
        y: row coordinate, `(1, 1, H, 1)`.
        pan: camera position, `(N, T, 1, 1)`.
        numbers: random numbers in 0..1, `(N, NUMBERS_PER_GROUND)`.
    """

    def __init__(self, x, y, pan, numbers):
        self.x, self.y, self.pan = x, y, pan
        self.pixel = 1 / y.shape[2]
        self.numbers = numbers[:, :, None, None, None]  # (N, K, 1, 1, 1)
        self.image = None

    def number(self, index: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Returns the `index`-th random number of each clip in low..high, `(N, 1, 1, 1)`."""
        return low + (high - low) * self.numbers[:, index]

    def column(self, parallax: float) -> torch.Tensor:
        """Returns world columns of a layer, `(N, T, 1, W)`; parallax 0 is infinitely far, 1 the floor."""
        return self.x + parallax * self.pan

    def tone(self, rgb, index: int, spread: float = 0.02) -> torch.Tensor:
        """Returns a colour with a small random brightness shift, `(N, 1, 3, 1, 1)`."""
        base = torch.tensor(rgb, device=self.x.device).view(1, 1, 3, 1, 1)
        return base + (self.numbers[:, index, None] - 0.5) * 2 * spread

    def gradient(self, top, bottom, start, end) -> torch.Tensor:
        """Returns a vertical blend of two tones between rows `start` and `end`."""
        weight = ((self.y - start) / (end - start)).clamp(0, 1)[:, :, None]
        return top + (bottom - top) * weight

    def paint(self, coverage: torch.Tensor, colour: torch.Tensor) -> None:
        """Blends `colour` over the image where `coverage` `(N, T, H, W)` is above 0."""
        weight = coverage[:, :, None].clamp(0, 1)
        self.image = colour * weight if self.image is None else self.image + (colour - self.image) * weight

    def below(self, line: torch.Tensor) -> torch.Tensor:
        """Returns the anti-aliased coverage of everything under `line`."""
        return ((self.y - line) / self.pixel + 0.5).clamp(0, 1)

    def disc(self, x, y, radius, softness: float = 1.0) -> torch.Tensor:
        """Returns the coverage of a disc with an edge `softness` pixels wide."""
        distance = ((self.x - x) ** 2 + (self.y - y) ** 2).sqrt()
        return ((radius - distance) / (self.pixel * softness) + 0.5).clamp(0, 1)

    def glow(self, x, y, radius) -> torch.Tensor:
        """Returns a soft round light, 1 in the middle."""
        return torch.exp(-((self.x - x) ** 2 + (self.y - y) ** 2) / radius**2)

    def ridge(self, parallax: float, index: int, level: float, swing: float, pace: float) -> torch.Tensor:
        """Returns a rolling line of hills, `(N, T, 1, W)`, around row `level`."""
        column = self.column(parallax) * pace
        first, second = self.number(index, 0, 6.28), self.number(index + 1, 0, 6.28)
        return level - swing * (0.6 * torch.sin(column + first) + 0.4 * torch.sin(2.3 * column + second))

    def tree(self, x, foot, height, width) -> torch.Tensor:
        """Returns the coverage of a fir tree of two stacked triangles standing at row `foot`."""
        rise = (foot - self.y) / height
        taper = torch.where(rise < 0.45, 1 - 0.9 * rise / 1.0, 1.15 * (1 - rise))
        half = width * taper.clamp(min=0)
        edge = ((half - (self.x - x).abs()) / self.pixel + 0.5).clamp(0, 1)
        return edge * (rise > 0) * (rise < 1)


def _desert(c: Canvas) -> None:
    c.paint(
        torch.ones_like(c.pan + c.x + c.y),
        c.gradient(c.tone((0.68, 0.78, 0.87), 0), c.tone((0.95, 0.87, 0.79), 1), 0.0, 0.55),
    )
    sun_x, sun_y = c.number(2, 0.2, 1.45) - 0.05 * c.pan, c.number(3, 0.12, 0.26)
    c.paint(0.6 * c.glow(sun_x, sun_y, 0.22), c.tone((0.99, 0.93, 0.82), 1, 0.0))
    c.paint(c.disc(sun_x, sun_y, 0.065, 1.5), c.tone((1.0, 0.97, 0.88), 1, 0.0))
    mesa = torch.tanh(4 * torch.sin(c.column(0.25) * 3.2 + c.number(4, 0, 6.28)))
    c.paint(c.below(0.50 - 0.045 * mesa), c.tone((0.80, 0.69, 0.63), 5))
    far = c.ridge(0.45, 6, 0.55, 0.035, 3.0)
    c.paint(
        c.below(far), c.gradient(c.tone((0.90, 0.80, 0.68), 8), c.tone((0.84, 0.73, 0.61), 8), 0.52, 0.66)
    )
    near = c.ridge(0.75, 9, 0.64, 0.03, 2.0)
    floor = c.gradient(c.tone((0.91, 0.82, 0.69), 11), c.tone((0.82, 0.71, 0.58), 11), 0.60, 1.0)
    ripple = torch.sin(
        c.y * 130 - c.y * c.y * 50 + 1.2 * torch.sin(c.column(1.0) * 4 + c.number(12, 0, 6.28))
    )
    c.paint(c.below(near), floor + 0.014 * ripple[:, :, None])
    for index in (13, 15):
        x, foot = c.number(index, 0.1, 1.6) - 0.6 * c.pan, c.number(index + 1, 0.60, 0.64)
        for shift, top, bottom in ((0.0, 0.13, 0.0), (-0.032, 0.085, 0.045), (0.032, 0.10, 0.06)):
            stem = ((0.0105 - (c.x - x - shift).abs()) / c.pixel + 0.5).clamp(0, 1)
            c.paint(stem * c.below(foot - top) * (1 - c.below(foot - bottom)), c.tone((0.50, 0.58, 0.46), 17))
        arm = ((0.009 - (c.y - foot + 0.055).abs()) / c.pixel + 0.5).clamp(0, 1)
        c.paint(arm * ((c.x - x).abs() < 0.038), c.tone((0.50, 0.58, 0.46), 17))


def _meadow(c: Canvas) -> None:
    c.paint(
        torch.ones_like(c.pan + c.x + c.y),
        c.gradient(c.tone((0.62, 0.76, 0.86), 0), c.tone((0.88, 0.92, 0.92), 1), 0.0, 0.55),
    )
    for index in (2, 5, 8):
        x, y = c.number(index, 0.0, 1.7) - 0.1 * c.pan, c.number(index + 1, 0.08, 0.30)
        for shift, lift, size in ((-0.08, 0.012, 0.045), (0.0, -0.012, 0.06), (0.085, 0.014, 0.042)):
            c.paint(0.85 * c.disc(x + shift, y + lift, size, 7.0), c.tone((0.97, 0.98, 0.98), 1, 0.0))
    c.paint(c.below(c.ridge(0.3, 11, 0.50, 0.04, 2.6)), c.tone((0.68, 0.77, 0.68), 13))
    hill = c.ridge(0.5, 14, 0.57, 0.035, 2.0)
    c.paint(
        c.below(hill), c.gradient(c.tone((0.68, 0.76, 0.56), 16), c.tone((0.58, 0.68, 0.46), 16), 0.53, 0.70)
    )
    for index in (17, 19, 21):
        x, foot = c.number(index, 0.05, 1.62) - 0.55 * c.pan, c.number(index + 1, 0.57, 0.63)
        trunk = (
            ((0.007 - (c.x - x).abs()) / c.pixel + 0.5).clamp(0, 1)
            * c.below(foot - 0.06)
            * (1 - c.below(foot))
        )
        c.paint(trunk, c.tone((0.50, 0.43, 0.38), 23))
        c.paint(c.disc(x, foot - 0.085, 0.05, 1.5), c.tone((0.45, 0.57, 0.40), 23))
        c.paint(0.5 * c.disc(x - 0.014, foot - 0.10, 0.026, 4.0), c.tone((0.58, 0.68, 0.50), 23))
    c.paint(
        c.below(c.ridge(0.8, 24, 0.67, 0.015, 2.5)),
        c.gradient(c.tone((0.63, 0.73, 0.50), 26), c.tone((0.48, 0.59, 0.37), 26), 0.64, 1.0),
    )
    for index in range(27, 31):
        c.paint(
            0.9
            * c.disc(
                c.number(index, 0.0, 1.67) - c.pan, 0.70 + 0.3 * ((c.number(index) * 7.3) % 1.0), 0.011, 2.5
            ),
            c.tone((0.96, 0.94, 0.88), 1, 0.0),
        )


def _night(c: Canvas) -> None:
    c.paint(
        torch.ones_like(c.pan + c.x + c.y),
        c.gradient(c.tone((0.05, 0.07, 0.17), 0, 0.01), c.tone((0.20, 0.25, 0.40), 1), 0.0, 0.58),
    )
    for index in range(2, 16):
        x, y = c.number(index, 0.0, 1.67) - 0.04 * c.pan, 0.03 + 0.42 * ((c.number(index) * 13.7) % 1.0)
        c.paint(0.9 * c.disc(x, y, 0.0062, 1.6), c.tone((0.92, 0.93, 0.97), 1, 0.0))
    moon_x, moon_y = c.number(16, 0.2, 1.45) - 0.05 * c.pan, c.number(17, 0.12, 0.24)
    c.paint(0.45 * c.glow(moon_x, moon_y, 0.17), c.tone((0.52, 0.57, 0.70), 1, 0.0))
    c.paint(c.disc(moon_x, moon_y, 0.07, 1.5), c.tone((0.95, 0.94, 0.88), 1, 0.0))
    c.paint(0.5 * c.disc(moon_x + 0.02, moon_y - 0.012, 0.017, 3.0), c.tone((0.83, 0.83, 0.80), 1, 0.0))
    c.paint(c.below(c.ridge(0.3, 18, 0.52, 0.06, 3.4)), c.tone((0.13, 0.16, 0.28), 20, 0.01))
    c.paint(c.below(c.ridge(0.5, 21, 0.61, 0.02, 2.4)), c.tone((0.09, 0.12, 0.20), 20, 0.01))
    for index in range(23, 28):
        x, foot = c.number(index, 0.0, 1.67) - 0.6 * c.pan, 0.66 + 0.02 * c.number(index)
        c.paint(c.tree(x, foot, 0.17, 0.055), c.tone((0.05, 0.08, 0.14), 20, 0.01))
    c.paint(
        c.below(c.ridge(0.8, 28, 0.66, 0.012, 2.5)),
        c.gradient(c.tone((0.22, 0.26, 0.36), 30), c.tone((0.13, 0.16, 0.24), 30), 0.64, 1.0),
    )


def _snow(c: Canvas) -> None:
    c.paint(
        torch.ones_like(c.pan + c.x + c.y),
        c.gradient(c.tone((0.66, 0.75, 0.85), 0), c.tone((0.91, 0.91, 0.93), 1), 0.0, 0.55),
    )
    peaks = (c.column(0.25) * 2.2 + c.number(2)).remainder(1.0)
    peak_line = 0.26 + 0.52 * (peaks - 0.5).abs() + 0.012 * torch.sin(40 * c.column(0.25))
    c.paint(
        c.below(peak_line),
        c.gradient(c.tone((0.60, 0.67, 0.76), 3), c.tone((0.78, 0.83, 0.89), 3), 0.26, 0.56),
    )
    c.paint(
        c.below(peak_line) * (1 - c.below(0.345 + 0.018 * torch.sin(55 * c.column(0.25)))),
        c.tone((0.96, 0.97, 0.99), 1, 0.0),
    )
    c.paint(c.below(c.ridge(0.45, 4, 0.57, 0.03, 2.4)), c.tone((0.83, 0.88, 0.93), 6))
    for index in range(7, 13):
        x, foot = c.number(index, 0.0, 1.67) - 0.6 * c.pan, 0.63 + 0.03 * ((c.number(index) * 5.1) % 1.0)
        c.paint(c.tree(x, foot, 0.17, 0.05), c.tone((0.43, 0.53, 0.55), 13))
        c.paint(0.6 * c.tree(x - 0.008, foot - 0.03, 0.12, 0.024), c.tone((0.80, 0.85, 0.88), 1, 0.0))
    drift = c.ridge(0.8, 14, 0.65, 0.02, 2.2)
    c.paint(
        c.below(drift),
        c.gradient(c.tone((0.96, 0.97, 0.98), 16, 0.01), c.tone((0.85, 0.89, 0.94), 16, 0.01), 0.63, 1.0),
    )
    shade = torch.sin(c.column(1.0) * 3 + c.number(17, 0, 6.28) + c.y * 9)
    c.image = c.image - 0.012 * (shade * c.below(drift))[:, :, None]


def _studio(c: Canvas) -> None:
    warmth = c.number(0, -0.03, 0.03)[:, :, None] * torch.tensor([1.0, 0.1, -1.0], device=c.x.device).view(
        1, 1, 3, 1, 1
    )
    wall = (
        c.gradient(c.tone((0.60, 0.60, 0.61), 1, 0.03), c.tone((0.76, 0.76, 0.76), 1, 0.03), 0.0, 0.62)
        + warmth
    )
    c.paint(torch.ones_like(c.pan + c.x + c.y), wall)
    panel = (c.column(0.6) * 3.0 + c.number(2)).remainder(1.0)
    groove = torch.exp(-(((panel - 0.5) / 0.025) ** 2)) * (1 - c.below(torch.full_like(c.pan, 0.60)))
    c.image = c.image - 0.07 * groove[:, :, None]
    floor = c.gradient(c.tone((0.70, 0.70, 0.70), 3), c.tone((0.56, 0.56, 0.57), 3), 0.62, 1.0) + warmth
    c.paint(c.below(torch.full_like(c.pan, 0.62)), floor)
    skirting = c.below(torch.full_like(c.pan, 0.60)) * (1 - c.below(torch.full_like(c.pan, 0.625)))
    c.paint(skirting, c.tone((0.88, 0.88, 0.87), 1, 0.02) + warmth)
    board = ((c.column(1.0) - 0.83) / (c.y - 0.35).clamp(min=0.1) * 1.6 + c.number(4)).remainder(1.0)
    seam = torch.exp(-(((board - 0.5) / 0.035) ** 2)) * c.below(torch.full_like(c.pan, 0.63))
    c.image = c.image - 0.045 * seam[:, :, None]
    lamp = c.number(5, 0.35, 1.3) - 0.4 * c.pan
    spot = torch.exp(-(((c.x - lamp) / 0.55) ** 2 + ((c.y - 0.40) / 0.42) ** 2))
    c.image = c.image + 0.17 * spot[:, :, None]


def _sea(c: Canvas) -> None:
    c.paint(
        torch.ones_like(c.pan + c.x + c.y),
        c.gradient(c.tone((0.66, 0.77, 0.87), 0), c.tone((0.96, 0.91, 0.85), 1), 0.0, 0.47),
    )
    sun_x = c.number(2, 0.25, 1.4) - 0.05 * c.pan
    c.paint(0.55 * c.glow(sun_x, 0.38, 0.2), c.tone((0.99, 0.94, 0.86), 1, 0.0))
    c.paint(c.disc(sun_x, 0.36, 0.06, 1.5), c.tone((1.0, 0.96, 0.87), 1, 0.0))
    horizon = torch.full_like(c.pan, 0.46)
    water = c.gradient(c.tone((0.50, 0.62, 0.71), 3), c.tone((0.63, 0.76, 0.79), 3), 0.46, 0.70)
    depth = (c.y - 0.44).clamp(min=0.01)
    wave = torch.sin(2.2 / depth + 2.0 * torch.sin(c.column(0.5) * 5 + 20 * c.y + c.number(4, 0, 6.28)))
    c.paint(c.below(horizon), water + 0.022 * wave[:, :, None])
    glitter = torch.exp(-(((c.x - sun_x) / 0.09) ** 2)) * c.below(horizon) * (0.35 + 0.25 * wave)
    c.paint(0.7 * glitter, c.tone((0.97, 0.93, 0.86), 1, 0.0))
    boat_x = c.number(5, 0.1, 1.55) - 0.3 * c.pan
    rise = (0.475 - c.y) / 0.10
    sail = (
        ((0.045 * (1 - rise) - (c.x - boat_x - 0.012).abs()) / c.pixel + 0.5).clamp(0, 1)
        * (rise > 0.12)
        * (rise < 1)
    )
    c.paint(sail, c.tone((0.98, 0.97, 0.95), 1, 0.0))
    c.paint(
        (rise > -0.1) * (rise < 0.10) * ((c.x - boat_x).abs() < 0.05 + 0.1 * (0.475 - c.y)),
        c.tone((0.45, 0.42, 0.42), 1, 0.0),
    )
    shore = c.ridge(0.9, 6, 0.66, 0.015, 4.0)
    c.paint(c.below(shore - 0.012), c.tone((0.96, 0.97, 0.97), 1, 0.0))
    c.paint(c.below(shore), c.tone((0.78, 0.73, 0.64), 8))
    c.paint(
        ((c.y - shore - 0.02) / 0.03).clamp(0, 1),
        c.gradient(c.tone((0.93, 0.86, 0.75), 9), c.tone((0.84, 0.76, 0.64), 9), 0.66, 1.0),
    )


_PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "desert": _desert,
    "meadow": _meadow,
    "night": _night,
    "snow": _snow,
    "studio": _studio,
    "sea": _sea,
}


def paint_ground(ground: str, x, y, pan: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Paints one ground for N clips.

    Args:
        ground: a name of `captions.GROUNDS`.
        x: column coordinates, `(1, 1, 1, W)`, in frame heights.
        y: row coordinates, `(1, 1, H, 1)`.
        pan: camera position to the right, `(N, T, 1, 1)`, in frame heights.
        numbers: random numbers in 0..1, `(N, NUMBERS_PER_GROUND)`.

    Returns:
        RGB in 0..1, `(N, T, 3, H, W)`.
    """
    canvas = Canvas(x, y, pan, numbers)
    _PAINTERS[ground](canvas)
    return canvas.image.clamp(0, 1)
