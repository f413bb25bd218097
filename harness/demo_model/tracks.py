"""Where each object is over time: eased motions in units of the frame height.

Shape legend: N clips, T frames. x runs 0 to 5/3, y runs 0 (top) to 1 (bottom).
"""

from dataclasses import dataclass

import torch

from harness.demo_model.captions import MOTIONS, Scene

FRAME_ASPECT = 5 / 3
RADII = {"small": 0.13, "large": 0.20}
NUMBERS_PER_OBJECT = 10
_MARGIN = 0.03


@dataclass(frozen=True)
class Track:
    """Motion of one object in N clips; every tensor is float32 `(N, T)`, lengths in frame heights.

    Args:
        x: centre, from the left.
        y: centre, from the top.
        radius: size of the solid.
        height: distance of its lowest point above the floor.
        spin: turn about its vertical axis in radians.
    """

    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor
    height: torch.Tensor
    spin: torch.Tensor


def ease(time: torch.Tensor) -> torch.Tensor:
    """Maps time 0..1 to progress 0..1 with a soft start and a soft end."""
    return 0.3 * time + 0.7 * time * time * (3 - 2 * time)


def radius_of(scene: Scene, slot: int, number: float) -> float:
    """Returns the nominal radius of object `slot`; `number` (0 to 1) decides when the caption gives no
    size.
    """
    size = scene.objects[slot].size or ("small" if number < 0.5 else "large")
    return RADII[size]


def object_track(scenes: list[Scene], slot: int, numbers: torch.Tensor, time: torch.Tensor) -> Track:
    """Returns the track of object `slot` of every scene.

    Args:
        scenes: N scenes that all have an object `slot`.
        slot: 0 (the only or the left object) or 1 (the right object).
        numbers: random numbers in 0..1, `(N, NUMBERS_PER_OBJECT)`.
        time: frame times in 0..1, `(N, T)`.

    Returns:
        A track whose object stays inside the frame, and inside its own half when there are two.
    """
    device = time.device
    u = numbers[..., None].unbind(1)  # NUMBERS_PER_OBJECT x (N, 1)
    choices = zip(scenes, numbers[:, 0].tolist(), strict=True)
    base = torch.tensor([radius_of(scene, slot, number) for scene, number in choices], device=device)
    base = base[:, None] * (0.95 + 0.1 * u[1])
    pair = torch.tensor([len(s.objects) == 2 for s in scenes], device=device)[:, None]
    motion = torch.tensor([MOTIONS.index(s.objects[slot].motion) for s in scenes], device=device)[:, None]

    def is_(name: str) -> torch.Tensor:
        return motion == MOTIONS.index(name)

    progress = ease(time)
    swell = torch.where(
        is_("grows"), 0.62 + 0.63 * progress, torch.where(is_("shrinks"), 1.25 - 0.63 * progress, 1.0)
    )
    radius = base * swell
    floor = 0.80 + 0.08 * u[2]
    room = (floor - 2 * base - _MARGIN).clamp(max=0.5)
    lift = (0.8 + 0.2 * u[3]) * room
    orbit = 0.13 + 0.035 * u[3]
    angle = 2 * torch.pi * (u[4] + time)
    arc = (2 * time) % 1.0
    height = torch.where(is_("rises"), lift * progress, torch.where(is_("falls"), lift * (1 - progress), 0.0))
    height = torch.where(is_("bounces"), lift * 4 * arc * (1 - arc), height)
    height = torch.where(is_("circles"), 0.01 + orbit * (1 - torch.sin(angle)), height)
    x = _horizontal(slot, pair, motion, base, orbit, u, progress)
    x = x + torch.where(is_("circles"), orbit * torch.cos(angle), 0.0)
    spin = torch.pi / 4 + 0.6 * (u[7] - 0.5) + (u[8] - 0.5) * 1.6 * time
    return Track(x, floor - radius - height, radius, height, spin)


def _horizontal(slot, pair, motion, base, orbit, u, progress):
    """Returns the `(N, T)` centre line: the start is random in the free room, `moves` travel over it."""
    left = torch.where(pair & (slot == 1), FRAME_ASPECT / 2, 0.0) + _MARGIN
    right = torch.where(pair & (slot == 0), FRAME_ASPECT / 2, FRAME_ASPECT) - _MARGIN
    reach = torch.where(motion == MOTIONS.index("circles"), base + orbit, base)
    reach = torch.where(motion >= MOTIONS.index("grows"), 1.25 * base, reach)
    free = right - left - 2 * reach
    sign = (motion == MOTIONS.index("moves right")).float() - (motion == MOTIONS.index("moves left")).float()
    travel = torch.where(pair, (0.8 + 0.2 * u[5]) * free, 0.5 + 0.3 * u[5])
    travel = torch.where(sign == 0, 0.0, travel)
    start = left + reach + u[6] * (free - travel)
    return start + travel * torch.where(sign < 0, 1 - progress, progress)
