"""PSNR, SSIM (against scikit-image) and the pose error."""

from __future__ import annotations

import numpy as np
import pytest

from posecrafter_rt.errors import PoseError, ShapeError
from posecrafter_rt.evaluate.metrics import mse_p, psnr, ssim
from posecrafter_rt.poses.keypoints import PoseSequence


def clip(seed: int, noise: float = 0.0, size: tuple[int, int] = (37, 50)) -> np.ndarray:
    """Two smooth frames, with noise of a given strength on top."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    base = np.stack([128 + 100 * np.sin(x / 7 + c) * np.cos(y / 5 + c) for c in range(3)], axis=-1)
    frames = np.stack([base, base[::-1]]) + noise * random.standard_normal((2, *size, 3))
    return frames.clip(0, 255).round().astype(np.uint8)


def test_psnr_is_the_mean_over_frames():
    truth = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    rendered = truth.copy()
    rendered[0] += 10
    rendered[1] -= 1
    expected = (10 * np.log10(255**2 / 100) + 10 * np.log10(255**2)) / 2
    assert psnr(rendered, truth) == pytest.approx(expected)
    assert psnr(truth, rendered) == pytest.approx(expected)


def test_a_frame_without_error_counts_as_100_db():
    assert psnr(clip(0), clip(0)) == 100.0


def test_psnr_does_not_wrap_around():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == pytest.approx(0.0)


@pytest.mark.parametrize("noise", [1.0, 20.0, 80.0])
@pytest.mark.parametrize("size", [(11, 11), (37, 50), (64, 31)])
def test_ssim_agrees_with_scikit_image(noise, size):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = clip(0, size=size), clip(1, noise, size=size)
    expected = [
        metrics.structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert ssim(a, b) == pytest.approx(np.mean(expected), abs=1e-6)


def test_psnr_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = clip(0), clip(1, 20.0)
    expected = [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    assert psnr(b, a) == pytest.approx(np.mean(expected))


def test_ssim_is_one_for_equal_clips_and_falls_with_noise():
    assert ssim(clip(0), clip(0)) == pytest.approx(1.0)
    values = [ssim(clip(0), clip(1, noise)) for noise in (2.0, 10.0, 50.0)]
    assert values == sorted(values, reverse=True) and values[-1] > -1


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refuses_clips_that_do_not_fit(metric):
    truth = clip(0)
    for rendered in (truth[:1], truth[:, :-1]):
        with pytest.raises(ShapeError, match="cannot be compared") as caught:
            metric(rendered, truth)
        assert caught.value.hint
    for wrong in (truth.astype(np.float32), truth[..., :1], truth[0], truth[:0]):
        with pytest.raises(ShapeError):
            metric(wrong, wrong)


def test_ssim_refuses_frames_smaller_than_its_window():
    small = clip(0, size=(10, 40))
    with pytest.raises(ShapeError, match="10x40"):
        ssim(small, small)


def poses(seed: int, frames: int = 3) -> PoseSequence:
    random = np.random.default_rng(seed)
    keypoints = random.uniform(0, 60, (frames, 134, 3)).astype(np.float32)
    keypoints[..., 2] = 1
    return PoseSequence(keypoints, (80, 100))


def test_mse_p_of_a_known_shift():
    truth = poses(0)
    shifted = PoseSequence(truth.keypoints + np.float32([5, 8, 0]), truth.canvas)
    assert mse_p(shifted, truth) == pytest.approx((0.05**2 + 0.1**2) / 2, rel=1e-5)
    assert mse_p(truth, truth) == 0


def test_mse_p_does_not_depend_on_the_canvas():
    assert mse_p(poses(1).resized(480, 600), poses(0)) == pytest.approx(mse_p(poses(1), poses(0)), rel=1e-5)


def test_mse_p_leaves_out_keypoints_missing_on_either_side():
    truth, rendered = poses(0).keypoints.copy(), poses(0).keypoints.copy()
    rendered[:, :5, :2] += 30
    rendered[0, :5, 2] = 0.2
    truth[1:, :5, 2] = 0
    assert mse_p(PoseSequence(rendered, (80, 100)), PoseSequence(truth, (80, 100))) == 0


def test_mse_p_refuses_what_it_cannot_compare():
    with pytest.raises(PoseError, match="2 rendered poses"):
        mse_p(poses(0, 2), poses(0, 3))
    unseen = poses(0).keypoints.copy()
    unseen[..., 2] = 0.1
    with pytest.raises(PoseError, match="share no keypoint"):
        mse_p(poses(0), PoseSequence(unseen, (80, 100)))
