import math

import numpy as np
import pytest

from core.registry import installed
from harness import metrics


@pytest.fixture
def textured():
    """One smooth random picture, 64 x 96 x 3 in 0..255."""
    import cv2

    noise = np.random.default_rng(0).uniform(0, 255, (64, 96, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    low, high = smooth.min(), smooth.max()
    return ((smooth - low) / (high - low) * 255).astype(np.uint8)


def test_psnr_by_hand():
    reference = np.full((2, 16, 16, 3), 100, dtype=np.uint8)
    video = reference.copy()
    video[0] += 10  # mean squared error 100 in one frame, 0 in the other: 50 over both
    assert metrics.psnr_db(video, reference) == pytest.approx(10 * math.log10(255**2 / 50))


def test_psnr_of_identical_videos_is_the_cap():
    video = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    assert metrics.psnr_db(video, video.copy()) == 100.0


def test_ssim_of_flat_pictures_by_hand():
    reference = np.full((1, 16, 16, 3), 100, dtype=np.uint8)
    video = np.full((1, 16, 16, 3), 120, dtype=np.uint8)
    constant = (0.01 * 255) ** 2  # without variance only the luminance term is left
    expected = (2 * 100 * 120 + constant) / (100**2 + 120**2 + constant)
    assert metrics.ssim(video, reference) == pytest.approx(expected, abs=1e-6)
    assert metrics.ssim(reference, reference) == pytest.approx(1.0)


def test_the_dense_video_is_compared_with_nothing():
    video = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    assert metrics.psnr_db(video, None) is None
    assert metrics.ssim(video, None) is None
    assert metrics.lpips(video, None) is None


def test_lpips_is_null_with_a_reason_where_it_is_missing():
    video = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    problem = metrics.lpips_problem()
    value = metrics.lpips(video, video)
    assert (value is None) == (problem is not None)
    if problem is None:
        assert value == pytest.approx(0.0, abs=1e-6)


def test_a_still_video_has_no_warp_error(textured):
    assert metrics.flow_warp_error(np.stack([textured] * 3)) == pytest.approx(0.0, abs=1e-4)


def test_motion_is_explained_and_flicker_is_not(textured):
    moving = np.stack([np.roll(textured, 2 * step, axis=1) for step in range(4)])
    flicker = np.stack([textured if step % 2 else textured // 2 for step in range(4)])
    unexplained = np.abs(np.diff(moving.astype(float), axis=0)).mean() / 255
    assert metrics.flow_warp_error(moving) < 0.25 * unexplained
    assert metrics.flow_warp_error(flicker) > 5 * metrics.flow_warp_error(moving)


def test_one_frame_has_no_warp_error(textured):
    assert metrics.flow_warp_error(textured[None]) is None


def test_they_are_registered_like_any_other():
    names = {metric.name for metric in installed().metrics()}
    assert {"psnr_db", "ssim", "lpips", "flow_warp_error"} <= names
