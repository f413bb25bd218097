"""The four shaded solids, drawn in their own square window by orthographic projection.

Window coordinates u (right) and v (down) are in radii of the solid. Light comes from the upper left,
towards the viewer.
"""

import torch
from torch import nn

COLOUR_VALUES = {
    "red": (0.90, 0.15, 0.14),
    "yellow": (0.98, 0.80, 0.10),
    "green": (0.12, 0.74, 0.27),
    "cyan": (0.10, 0.78, 0.86),
    "blue": (0.15, 0.32, 0.93),
    "purple": (0.62, 0.19, 0.82),
}
_LIGHT = nn.functional.normalize(torch.tensor([-0.52, -0.62, 0.60]), dim=0)
_HALF = nn.functional.normalize(_LIGHT + torch.tensor([0.0, 0.0, 1.0]), dim=0)


def draw_solid(shape: str, u: torch.Tensor, v: torch.Tensor, spin: torch.Tensor, colour: torch.Tensor):
    """Draws one kind of solid.

    Args:
        shape: "ball", "cube", "cone" or "ring".
        u: window coordinate to the right in radii, broadcastable to `(N, T, h, w)`.
        v: window coordinate downwards in radii, likewise.
        spin: turn about the vertical axis in radians, `(N, T, 1, 1)`.
        colour: RGB in 0..1, `(N, 1, 3, 1, 1)`.

    Returns:
        `(inside, image)`: float `(N, T, 1, h, w)` of 0 or 1, and RGB `(N, T, 3, h, w)` in 0..1.
    """
    inside, normal = _GEOMETRY[shape](*torch.broadcast_tensors(u, v, spin))
    light, half = (vector.to(u.device)[:, None, None] for vector in (_LIGHT, _HALF))
    lambert = (normal * light).sum(2, keepdim=True).clamp(min=0)
    shine = (normal * half).sum(2, keepdim=True).clamp(min=0) ** 28 * (0.0 if shape == "cube" else 0.38)
    skylight = 0.06 * (0.5 - 0.5 * normal[:, :, 1:2])
    image = colour * (0.50 + 0.56 * lambert + skylight) + shine
    return inside[:, :, None].to(image.dtype), image.clamp(0, 1)


def _ball(u, v, spin):
    squared = u * u + v * v
    depth = (1 - squared).clamp(min=0).sqrt()
    return squared < 1, torch.stack([u, v, depth], 2)


def _ring(u, v, spin):
    tube = 0.30
    v = v / 0.94
    distance = (u * u + v * v).sqrt().clamp(min=1e-6)
    across = (distance - (1 - tube)) / tube
    depth = (1 - across * across).clamp(min=0).sqrt()
    return across.abs() < 1, torch.stack([across * u / distance, across * v / distance, depth], 2)


def _cone(u, v, spin):
    half_width, bottom, bulge = 0.92, 0.76, 0.22
    body = half_width * ((v + 1) / (1 + bottom)).clamp(0.02, 1)
    base = (u / half_width) ** 2 + ((v - bottom) / bulge) ** 2
    inside = ((v > -1) & (v <= bottom) & (u.abs() < body)) | ((v > bottom) & (base < 1))
    across = (u / body).clamp(-1, 1)
    depth = (1 - across * across).sqrt()
    return inside, torch.stack([0.9 * across, torch.full_like(u, -0.42), 0.9 * depth], 2)


def _cube(u, v, spin):
    half, pitch = 0.70, 0.46
    cos_p, sin_p = torch.cos(torch.tensor(pitch)).item(), torch.sin(torch.tensor(pitch)).item()
    cos_s, sin_s = torch.cos(spin), torch.sin(spin)
    axes = (  # the cube's own axes in (right, down, towards the viewer)
        (cos_s, -sin_s * sin_p, -sin_s * cos_p),
        (torch.zeros_like(u), torch.full_like(u, cos_p), torch.full_like(u, -sin_p)),
        (sin_s, cos_s * sin_p, cos_s * cos_p),
    )
    near = torch.full_like(u, 1e6)
    far = torch.full_like(u, -1e6)
    normal = torch.zeros_like(u)[:, :, None].repeat(1, 1, 3, 1, 1)
    for right, down, towards in axes:
        out = torch.where(towards.abs() < 1e-4, torch.full_like(towards, 1e-4), towards)
        middle = -(u * right + v * down) / out
        exit_, enter = middle + half / out.abs(), middle - half / out.abs()
        face = torch.stack([right, down, out], 2) * out.sign()[:, :, None]
        normal = torch.where((exit_ < near)[:, :, None], face, normal)
        near, far = torch.minimum(near, exit_), torch.maximum(far, enter)
    return near > far, normal


_GEOMETRY = {"ball": _ball, "cube": _cube, "cone": _cone, "ring": _ring}
