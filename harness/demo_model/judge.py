"""The automatic judge: reads colour, shape, motion, ground and camera pan back from the pixels of a clip.

Objects are the only strongly coloured things in a clip, so they are segmented by chroma; grounds stay below
that threshold. The
judge looks at nothing but pixels and the number of objects. It is itself checked on rendered clips, see
`evaluate`.
Shape legend: T frames, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import nn

from harness.demo_model.captions import COLOURS, GROUNDS, SHAPES, Scene, SceneObject
from harness.demo_model.clips import render_clips
from harness.demo_model.solids import COLOUR_VALUES
from harness.demo_model.tracks import ease

CHROMA_THRESHOLD = 0.262
_MINIMUM_AREA = 60  # pixels
_TEMPLATE = 24  # cells across a shape template
_BANDS = 16
_SMALL_LARGE_BORDER = 0.158  # mean radius in frame heights


@dataclass(frozen=True)
class Verdict:
    """What the judge saw of one object; None where it could not tell."""

    colour: str | None
    shape: str | None
    motion: str | None
    size: str | None


@dataclass(frozen=True)
class ClipVerdict:
    """What the judge saw in one clip: objects from left to right, the ground, the camera direction or
    None.
    """

    objects: tuple[Verdict, ...]
    ground: str
    camera: str | None


def compare(scene: Scene, verdict: ClipVerdict) -> dict[str, bool]:
    """Says which parts of a caption a clip shows.

    Returns:
        `colour`, `shape`, `motion` (true when right for every object), `ground`, `size` (true where
        unsaid), `camera`, and
        `all` = colour, shape, motion and ground together.
    """
    pairs = list(zip(scene.objects, verdict.objects, strict=True))
    result = {
        name: all(getattr(wanted, name) == getattr(seen, name) for wanted, seen in pairs)
        for name in ("colour", "shape", "motion")
    }
    result["ground"] = scene.ground == verdict.ground
    result["all"] = all(result.values())
    result["size"] = all(wanted.size in (None, seen.size) for wanted, seen in pairs)
    result["camera"] = scene.camera == verdict.camera
    return result


class Judge:
    """The judge with its reference material, rendered when it is made (about 5 s on one core).

    Args:
        device: where clips are judged.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self._hues = torch.tensor(
            [_hue(torch.tensor(COLOUR_VALUES[name])) for name in COLOURS], device=self.device
        )
        self._templates = {name: self._shape_templates(name) for name in SHAPES}
        self._grounds = torch.stack([self._ground_profiles(name) for name in GROUNDS])

    def judge(self, frames: torch.Tensor, num_objects: int) -> ClipVerdict:
        """Judges one clip.

        Args:
            frames: RGB in 0..1, float `(T, 3, H, W)`.
            num_objects: 1 or 2; of two, each is looked for in its half of the frame.

        Returns:
            What was seen.
        """
        frames = frames.to(self.device).float()
        masks = (frames.amax(1) - frames.amin(1)) > CHROMA_THRESHOLD  # (T, H, W)
        middle = frames.shape[-1] // 2
        halves = [slice(0, middle), slice(middle, None)] if num_objects == 2 else [slice(None)]
        objects = tuple(self._judge_object(frames[..., part], masks[..., part]) for part in halves)
        return ClipVerdict(objects, self._judge_ground(frames, masks), _judge_camera(frames, masks))

    def _judge_object(self, frames, masks) -> Verdict:
        colour = self._vote_colour(frames, masks)
        if colour is None:
            return Verdict(None, None, None, None)
        distance = (_hue(frames.movedim(1, 0)) - self._hues[COLOURS.index(colour)]).abs()
        masks = masks & (torch.minimum(distance, 360 - distance) < 40)
        area = masks.sum((1, 2))
        seen = area >= _MINIMUM_AREA
        if seen.float().mean() < 0.8:
            return Verdict(colour, None, None, None)
        shape, radius = self._judge_shape(masks[seen])
        size = "large" if radius > _SMALL_LARGE_BORDER else "small"
        return Verdict(colour, shape, _judge_motion(masks, seen), size)

    def _vote_colour(self, frames, masks) -> str | None:
        if masks.sum() < _MINIMUM_AREA:
            return None
        hue = _hue(frames.movedim(1, 0)[:, masks])
        distance = (hue[:, None] - self._hues).abs()
        votes = torch.minimum(distance, 360 - distance).argmin(1)
        return COLOURS[votes.bincount(minlength=len(COLOURS)).argmax().item()]

    def _judge_shape(self, masks) -> tuple[str, float]:
        pictures, extents = zip(*(_normalised(mask) for mask in masks), strict=False)
        pictures = torch.stack(pictures)  # (T, 24, 24)
        errors = torch.stack(
            [(pictures[:, None] - self._templates[name]).abs().mean((2, 3)).amin(1).mean() for name in SHAPES]
        )
        return SHAPES[errors.argmin().item()], sum(extents) / len(extents)

    def _judge_ground(self, frames, masks) -> str:
        profile = _profile(frames, masks)
        return GROUNDS[(self._grounds - profile).abs().mean((2, 3)).amin(1).argmin().item()]

    def _shape_templates(self, shape: str) -> torch.Tensor:
        """Renders a shape at many turns and sizes; `(K, 24, 24)`."""
        motions = ("moves right", "grows", "bounces", "circles")
        scenes = [
            Scene((SceneObject(size, "red", shape, motion),), "studio")
            for size in ("small", "large")
            for motion in motions
        ]
        times = torch.linspace(0, 1, 3).expand(len(scenes), -1)
        clips = render_clips(scenes, list(range(len(scenes))), times, self.device)
        return torch.stack([_normalised(mask > 0.5)[0] for mask in clips.masks[:, 0].flatten(0, 1)])

    def _ground_profiles(self, ground: str) -> torch.Tensor:
        """Renders a ground with many seeds; `(K, 16, 3)`."""
        scenes = [Scene((SceneObject("small", "red", "ball", "rises"),), ground)] * 12
        clips = render_clips(scenes, list(range(900, 912)), torch.zeros(12, 1), self.device)
        pairs = zip(clips.frames, clips.masks, strict=True)
        return torch.stack([_profile(frames, mask.amax(0) > 0.01) for frames, mask in pairs])


def _hue(rgb: torch.Tensor) -> torch.Tensor:
    """Returns the hue in degrees, 0 to 360, of RGB with the channels first."""
    red, green, blue = rgb
    return torch.rad2deg(torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)) % 360


def _normalised(mask: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cuts a mask `(H, W)` to its bounding box, `(24, 24)`; also returns half the box in frame heights."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    box = mask[top:bottom, left:right].float()[None, None]
    extent = (box.shape[2] + box.shape[3]) / 4 / mask.shape[0]
    return nn.functional.interpolate(box, (_TEMPLATE, _TEMPLATE), mode="area")[0, 0], extent


def _profile(frames, masks) -> torch.Tensor:
    """Returns the mean background colour of 16 horizontal bands over all frames, `(16, 3)`."""
    free = (~masks).float()[:, None]
    total = (frames * free).sum((0, 3)).unflatten(1, (_BANDS, -1)).sum(2)
    return (total / free.sum((0, 3)).unflatten(1, (_BANDS, -1)).sum(2).clamp(min=1)).T


def _judge_motion(masks, seen) -> str | None:
    """Compares the path and size of a mask over time with each motion; None when it hardly moves."""
    height, width = masks.shape[1:]
    weight = masks.float()
    area = weight.sum((1, 2)).clamp(min=1)
    x = (weight.sum(1) * torch.arange(width, device=masks.device)).sum(1) / area / height
    y = (weight.sum(2) * torch.arange(height, device=masks.device)).sum(1) / area / height
    growth = 0.5 * area.log()  # log of the radius
    time = torch.linspace(0, 1, len(masks), device=masks.device)
    path = torch.stack([x, y, 0.5 * growth])[:, seen]
    path = path - path.mean(1, keepdim=True)
    strength = path.norm() / path.shape[1] ** 0.5
    if strength < 0.03:
        return None
    scores = {name: _match(path, basis[..., seen]) for name, basis in _motion_bases(time).items()}
    best = max(scores, key=scores.get)
    return best if scores[best] > 0.8 else None


def _motion_bases(time: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns for each motion the paths that span it, `(K, 3, T)` over x, y and half the log of the
    radius.
    """
    zero, progress = torch.zeros_like(time), ease(time)
    arc = (2 * time) % 1.0
    hop = -4 * arc * (1 - arc)
    sine, cosine = torch.sin(2 * torch.pi * time), torch.cos(2 * torch.pi * time)
    radius = 0.62 + 0.63 * progress
    swelling = [zero, -0.17 * radius, 0.5 * radius.log()]
    shrinking = [part.flip(0) for part in swelling]
    return {
        "moves right": torch.stack([torch.stack([progress, zero, zero])]),
        "moves left": torch.stack([torch.stack([-progress, zero, zero])]),
        "rises": torch.stack([torch.stack([zero, -progress, zero])]),
        "falls": torch.stack([torch.stack([zero, progress, zero])]),
        "bounces": torch.stack([torch.stack([zero, hop, zero])]),
        "circles": torch.stack([torch.stack([cosine, sine, zero]), torch.stack([-sine, cosine, zero])]),
        "grows": torch.stack([torch.stack(swelling)]),
        "shrinks": torch.stack([torch.stack(shrinking)]),
    }


def _match(path: torch.Tensor, basis: torch.Tensor) -> float:
    """Returns the cosine between a path `(3, T)` and the span of `basis`; signed when it is a single path."""
    basis = basis - basis.mean(2, keepdim=True)
    basis = basis / basis.flatten(1).norm(dim=1)[:, None, None]
    products = (basis * path).sum((1, 2)) / path.norm()
    return products.item() if len(products) == 1 else products.norm().item()


def _judge_camera(frames, masks) -> str | None:
    """Finds the shift of the lower background between the first and the last frame; None when it stands
    still.
    """
    height = frames.shape[2]
    rows = slice(int(0.42 * height), int(0.72 * height))
    grey = frames[[0, -1], :, rows].mean(1)
    detail = grey - nn.functional.avg_pool2d(grey[:, None], 31, 1, 15, count_include_pad=False)[:, 0]
    first, last = detail
    valid_first, valid_last = (~masks[[0, -1], rows]).float()
    errors = {}
    for shift in range(-56, 57, 2):
        span = slice(max(0, shift), min(0, shift) or None)
        back = slice(max(0, -shift), min(0, -shift) or None)
        both = valid_first[:, span] * valid_last[:, back]
        gap = (first[:, span] - last[:, back]).square()
        errors[shift] = ((gap * both).sum() / both.sum().clamp(min=1)).item()
    best = min(errors, key=errors.get)
    if abs(best) < 8 or errors[best] > 0.8 * errors[0]:
        return None
    return "right" if best > 0 else "left"
