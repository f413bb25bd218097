"""Figures about one video: likeness to the dense one, and steadiness over time.

They enter the benchmark as the metrics of any other plugin do, through ``register_metrics``.
"""

import functools
import itertools
from typing import Any

import numpy as np

from core.extensions import Metric
from core.hookspecs import hookimpl

PSNR_CAP_DB = 100.0


@hookimpl
def register_metrics() -> list[Metric]:
    """The built-in metrics."""
    return [
        Metric("psnr_db", psnr_db, True, "peak signal-to-noise ratio against the dense video, at most 100"),
        Metric("ssim", ssim, True, "structural similarity (Wang et al. 2004), mean over frames"),
        Metric("lpips", lpips, False, "learned perceptual distance (Zhang et al. 2018), AlexNet"),
        Metric("flow_warp_error", flow_warp_error, False, "change between frames that no motion explains"),
    ]


def psnr_db(video: np.ndarray, reference: np.ndarray | None) -> float | None:
    """PSNR of the whole video in dB, from the squared error over all frames together.

    Args:
        video (ndarray): ``[F, H, W, 3]`` uint8.
        reference (ndarray, Optional): the dense video of the same shape; None for dense itself.

    Returns:
        float | None: at most 100, which stands for identical videos; None without a reference.
    """
    if reference is None:
        return None
    if np.array_equal(video, reference):
        return PSNR_CAP_DB
    from skimage.metrics import peak_signal_noise_ratio

    return min(PSNR_CAP_DB, float(peak_signal_noise_ratio(reference, video, data_range=255)))


def ssim(video: np.ndarray, reference: np.ndarray | None) -> float | None:
    """SSIM with the Gaussian window and constants of its paper, mean over channels and frames.

    Args:
        video (ndarray): ``[F, H, W, 3]`` uint8, H and W at least 11.
        reference (ndarray, Optional): the dense video of the same shape; None for dense itself.

    Returns:
        float | None: 1 for identical videos; None without a reference.
    """
    if reference is None:
        return None
    from skimage.metrics import structural_similarity

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [
        structural_similarity(dense, frame, channel_axis=-1, data_range=255, **window)
        for dense, frame in zip(reference, video, strict=True)
    ]
    return float(np.mean(values))


def lpips(video: np.ndarray, reference: np.ndarray | None) -> float | None:
    """LPIPS with AlexNet features, mean over frames.

    Args:
        video (ndarray): ``[F, H, W, 3]`` uint8.
        reference (ndarray, Optional): the dense video of the same shape; None for dense itself.

    Returns:
        float | None: 0 for identical videos; None without a reference or where `lpips_problem` is not None.
    """
    if reference is None or lpips_problem() is not None:
        return None
    import torch

    def tensor(frame: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1

    with torch.no_grad():
        values = [
            float(_lpips_model()(tensor(dense), tensor(frame)))
            for dense, frame in zip(reference, video, strict=True)
        ]
    return float(np.mean(values))


@functools.cache
def lpips_problem() -> str | None:
    """Why LPIPS cannot be computed here; None if it can."""
    try:
        _lpips_model()
    except ImportError as error:
        return f"not installed ({error}); optional, for GPU machines: extra 'lpips', docs/install.md"
    except Exception as error:  # its network weights are downloaded at first use, which fails in many ways
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


@functools.cache
def _lpips_model() -> Any:
    import lpips as package

    return package.LPIPS(net="alex", verbose=False).eval()


def flow_warp_error(video: np.ndarray, reference: np.ndarray | None = None) -> float | None:
    """Change between neighbouring frames that is left when motion is taken out.

    Each frame is warped onto the next by the optical flow between them (Farneback), measured on this
    video itself; the result is the mean absolute difference to that next frame over the pixels
    where forward and backward flow agree (elsewhere something was hidden or came into view).

    Args:
        video (ndarray): ``[F, H, W, 3]`` uint8.
        reference (ndarray, Optional): not used.

    Returns:
        float | None: 0 (steady) to 1, mean over frame pairs; None for a single frame, or where no pixel can
        be followed.
    """
    found = (_warp_error(before, after) for before, after in itertools.pairwise(video))
    errors = [error for error in found if error is not None]
    return float(np.mean(errors)) if errors else None


def _warp_error(before: np.ndarray, after: np.ndarray) -> float | None:
    import cv2

    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    backward = _flow(grey[1], grey[0])
    forward = _flow(grey[0], grey[1])
    rows, columns = np.indices(grey[0].shape, dtype=np.float32)
    from_x, from_y = columns + backward[..., 0], rows + backward[..., 1]
    warped = cv2.remap(np.ascontiguousarray(before), from_x, from_y, cv2.INTER_LINEAR)
    returned = cv2.remap(forward, from_x, from_y, cv2.INTER_LINEAR)
    height, width = grey[0].shape
    inside = (from_x >= 0) & (from_x <= width - 1) & (from_y >= 0) & (from_y <= height - 1)
    gap = ((backward + returned) ** 2).sum(-1)
    travelled = (backward**2).sum(-1) + (returned**2).sum(-1)
    followed = inside & (gap < 0.01 * travelled + 0.5)
    if not followed.any():
        return None
    difference = np.abs(warped.astype(np.float32) - after.astype(np.float32)).mean(-1)
    return float(difference[followed].mean()) / 255


def _flow(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Displacement of every pixel of ``start`` in ``end``, ``[H, W, 2]`` in pixels (x, y)."""
    import cv2

    flow = np.zeros((*start.shape, 2), dtype=np.float32)
    return cv2.calcOpticalFlowFarneback(
        start, end, flow, pyr_scale=0.5, levels=3, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2, flags=0
    )
