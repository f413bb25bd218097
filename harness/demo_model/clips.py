"""The renderer: scenes and seeds in, anti-aliased frames and object masks out; one path for CPU and GPU.

Shape legend: N clips, T frames, K objects (2 slots), H = 192 rows, W = 320 columns.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from harness.demo_model.captions import Scene
from harness.demo_model.defaults import DEMO_DEFAULTS
from harness.demo_model.grounds import NUMBERS_PER_GROUND, paint_ground
from harness.demo_model.solids import COLOUR_VALUES, draw_solid
from harness.demo_model.tracks import FRAME_ASPECT, NUMBERS_PER_OBJECT, Track, object_track

_WINDOW = 112  # pixels; holds the largest solid, radius 0.2625 of 192 rows, with its cube corners
_SUPERSAMPLING = 2
_SHADOW_TOP = 130  # first row that a shadow can reach
_PAN_LENGTH = 0.36  # frame heights over the whole clip


class Clips(NamedTuple):
    """Rendered clips: `frames` RGB float `(N, T, 3, H, W)` in 0..1, `masks` coverage `(N, 2, T, H, W)`
    in 0..1.
    """

    frames: torch.Tensor
    masks: torch.Tensor


def render_clips(
    scenes: list[Scene], seeds: list[int], times: torch.Tensor | None = None, device="cpu"
) -> Clips:
    """Renders one clip for each scene.

    Args:
        scenes: N scenes.
        seeds: N seeds; a scene and a seed give the same pixels every time on one device.
        times: frame times in 0..1, `(N, T)`. Default: 17 evenly spaced frames.
        device: where to render.

    Returns:
        The clips; mask slot 1 is empty where a scene has one object.

    Raises:
        ValueError: `scenes` and `seeds` differ in length.
    """
    if len(scenes) != len(seeds):
        raise ValueError(f"expected as many seeds as scenes, got {len(seeds)} and {len(scenes)}")
    if times is None:
        times = torch.linspace(0, 1, DEMO_DEFAULTS.num_frames).expand(len(scenes), -1)
    times = times.to(device)
    drawn = [
        np.random.default_rng(seed).random(NUMBERS_PER_GROUND + 2 * NUMBERS_PER_OBJECT) for seed in seeds
    ]
    numbers = torch.from_numpy(np.stack(drawn)).float().to(device)
    frames = _backgrounds(scenes, numbers[:, :NUMBERS_PER_GROUND], times)
    masks = frames.new_zeros(len(scenes), 2, *frames.shape[1:2], *frames.shape[3:])
    for slot in (0, 1):
        rows = [index for index, scene in enumerate(scenes) if len(scene.objects) > slot]
        if rows:
            start = NUMBERS_PER_GROUND + slot * NUMBERS_PER_OBJECT
            part = numbers[rows, start : start + NUMBERS_PER_OBJECT]
            track = object_track([scenes[index] for index in rows], slot, part, times[rows])
            frames[rows, :, :, _SHADOW_TOP:] *= 1 - _shadow(track, frames.device)
            _draw_objects(frames, masks, scenes, slot, rows, track)
    return Clips(frames, masks)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Rounds RGB frames in 0..1 to uint8 of the same shape."""
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8)


def _grid(device) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = DEMO_DEFAULTS.height, DEMO_DEFAULTS.width
    x = (torch.arange(width, device=device) + 0.5) / height
    y = (torch.arange(height, device=device) + 0.5) / height
    return x.view(1, 1, 1, width), y.view(1, 1, height, 1)


def _backgrounds(scenes, numbers, times):
    """Paints every ground; clips without a camera pan are painted once and repeated over time."""
    x, y = _grid(times.device)
    frames = x.new_empty(len(scenes), times.shape[1], 3, y.shape[2], x.shape[3])
    direction = {None: 0.0, "left": -1.0, "right": 1.0}
    groups: dict[tuple[str, bool], list[int]] = {}
    for index, scene in enumerate(scenes):
        groups.setdefault((scene.ground, scene.camera is not None), []).append(index)
    vignette = 1 - 0.10 * (((x - FRAME_ASPECT / 2) / 1.1) ** 2 + ((y - 0.5) / 0.9) ** 2)[:, :, None]
    for (ground, moving), rows in groups.items():
        sign = torch.tensor([direction[scenes[index].camera] for index in rows], device=times.device)
        time = times[rows] if moving else times[rows][:, :1]
        pan = (sign[:, None] * _PAN_LENGTH * (time - 0.5))[:, :, None, None]
        frames[rows] = (paint_ground(ground, x, y, pan, numbers[rows]) * vignette).expand(
            -1, times.shape[1], -1, -1, -1
        )
    return frames


def _shadow(track: Track, device) -> torch.Tensor:
    """Returns the darkness of the contact shadow, `(n, T, 1, H - 130, W)`: wider and fainter the higher
    the object.
    """
    x, y = _grid(device)
    y = y[:, :, _SHADOW_TOP:]
    centre, floor, radius, height = (
        value[:, :, None, None]
        for value in (track.x, track.y + track.radius + track.height, track.radius, track.height)
    )
    spread = radius * (0.95 + 0.9 * height)
    across = (x - centre - 0.18 * radius - 0.12 * height) / spread
    down = (y - floor + 0.04 * radius) / (0.27 * spread)
    darkness = 0.52 / (1 + 2.2 * height)
    return (darkness * torch.exp(-((across**2 + down**2) ** 1.3)))[:, :, None]


def _draw_objects(frames, masks, scenes, slot, rows, track):
    """Draws object `slot` of the clips in `rows` into `frames` and `masks`, one batch for each shape."""
    by_shape: dict[str, list[int]] = {}
    for position, index in enumerate(rows):
        by_shape.setdefault(scenes[index].objects[slot].shape, []).append(position)
    for shape, positions in by_shape.items():
        picked = Track(*(getattr(track, name)[positions] for name in ("x", "y", "radius", "height", "spin")))
        clips = [rows[position] for position in positions]
        colours = torch.tensor(
            [COLOUR_VALUES[scenes[i].objects[slot].colour] for i in clips], device=frames.device
        )
        window, left, top = _draw_window(shape, picked, colours)
        _paste(frames, masks, torch.tensor(clips, device=frames.device), slot, window, left, top)


def _draw_window(shape, track, colours):
    """Draws solids into windows `(n, T, 4, 112, 112)` (RGB times coverage, coverage) with their corner
    pixels.
    """
    size = DEMO_DEFAULTS.height
    left = ((track.x * size).round() - _WINDOW // 2).clamp(0, DEMO_DEFAULTS.width - _WINDOW)
    top = ((track.y * size).round() - _WINDOW // 2).clamp(0, size - _WINDOW)
    fine = (torch.arange(_WINDOW * _SUPERSAMPLING, device=left.device) + 0.5) / _SUPERSAMPLING
    u = (left[:, :, None, None] + fine.view(1, 1, 1, -1)) / size - track.x[:, :, None, None]
    v = (top[:, :, None, None] + fine.view(1, 1, -1, 1)) / size - track.y[:, :, None, None]
    radius = track.radius[:, :, None, None]
    inside, image = draw_solid(
        shape, u / radius, v / radius, track.spin[:, :, None, None], colours[:, None, :, None, None]
    )
    window = torch.cat([image * inside, inside], 2)
    window = nn.functional.avg_pool2d(window.flatten(0, 1), _SUPERSAMPLING).unflatten(0, window.shape[:2])
    return window, left.long(), top.long()


def _paste(frames, masks, clips, slot, window, left, top):
    """Blends windows, which lie inside the frame, over the frames and writes their coverage into the
    masks.
    """
    steps = torch.arange(_WINDOW, device=frames.device)
    row = (top[:, :, None] + steps)[:, :, :, None]  # (n, T, 112, 1)
    column = (left[:, :, None] + steps)[:, :, None, :]
    clip = clips.view(-1, 1, 1, 1)
    frame = torch.arange(frames.shape[1], device=frames.device).view(1, -1, 1, 1)
    window = window.permute(0, 1, 3, 4, 2)  # (n, T, 112, 112, 4)
    behind = frames[clip, frame, :, row, column]
    frames[clip, frame, :, row, column] = behind * (1 - window[..., 3:]) + window[..., :3]
    masks[clip, slot, frame, row, column] = window[..., 3]
