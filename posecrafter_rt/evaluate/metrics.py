"""Compare a rendered clip with the real one: PSNR, SSIM and the pose error MSE-P.

Layer 7: numpy and OpenCV.
"""

from __future__ import annotations

import cv2
import numpy as np

from posecrafter_rt.errors import PoseError, ShapeError
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, PoseSequence

MAX_PSNR_DB = 100.0
_WINDOW_PX, _SIGMA_PX = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(rendered: np.ndarray, truth: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio, the mean over frames.

    PSNR = 10 log10(255^2 / MSE) per frame, MSE over its pixels and channels; at most 100 dB, so that a frame without
    any error does not make the mean infinite.
    Args: rendered, truth: uint8 (N, H, W, 3), RGB.
    Returns: dB; higher is closer.
    Raises: ShapeError if the clips differ in shape, are empty or not uint8.
    """
    _check_clips(rendered, truth)
    return float(np.mean([_psnr_frame(a, b) for a, b in zip(rendered, truth, strict=True)]))


def ssim(rendered: np.ndarray, truth: np.ndarray) -> float:
    """Return the structural similarity, the mean over frames and colour channels.

    SSIM = (2 mu_a mu_b + C1)(2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1)(s_a^2 + s_b^2 + C2)), with moments under a Gaussian
    window of 11 x 11 pixels and sigma 1.5, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2 (Wang et al. 2004). It is averaged
    over the pixels whose window lies within the frame.
    Args: rendered, truth: uint8 (N, H, W, 3), RGB; H, W >= 11.
    Returns: -1..1; 1 for equal clips.
    Raises: ShapeError if the clips differ in shape, are empty, not uint8, or smaller than the window.
    """
    _check_clips(rendered, truth)
    if min(rendered.shape[1:3]) < _WINDOW_PX:
        raise ShapeError(
            f"SSIM needs frames of at least {_WINDOW_PX}x{_WINDOW_PX} pixels, these have "
            f"{rendered.shape[1]}x{rendered.shape[2]}",
            "compare larger frames",
        )
    return float(np.mean([_ssim_frame(a, b) for a, b in zip(rendered, truth, strict=True)]))


def mse_p(rendered: PoseSequence, truth: PoseSequence) -> float:
    """Return the mean squared error of keypoint coordinates, each divided by its canvas's width or height.

    This is the paper's MSE-P: the mean over x and y of all keypoints that are usable in both poses of a frame, over all
    frames together. The paper does not say how coordinates are normalised; that is our choice.
    Args: rendered: the poses found in the rendered clip. truth: the poses it was to follow. N frames each.
    Returns: 0 for equal poses; 1 is an error of the whole picture.
    Raises: PoseError if the sequences differ in length or share no keypoint in any frame.
    """
    if len(rendered) != len(truth):
        raise PoseError(
            f"{len(rendered)} rendered poses cannot be compared with {len(truth)}", hint="give as many of either"
        )
    shared = (rendered.keypoints[..., 2] >= CONFIDENCE_THRESHOLD) & (truth.keypoints[..., 2] >= CONFIDENCE_THRESHOLD)
    if not shared.any():
        raise PoseError(
            f"the poses share no keypoint of confidence {CONFIDENCE_THRESHOLD} or more in any of {len(truth)} frames",
            hint="check that both were extracted from clips that show the person",
        )
    difference = _normalised(rendered) - _normalised(truth)
    return float((difference[shared] ** 2).mean())


def _normalised(poses: PoseSequence) -> np.ndarray:
    """Return coordinates as fractions of the canvas, counted from its corner, not from a pixel centre: (N, 134, 2)."""
    height, width = poses.canvas
    return (poses.keypoints[..., :2].astype(np.float64) + 0.5) / (width, height)


def _psnr_frame(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(np.float64) - b) ** 2).mean()
    return MAX_PSNR_DB if error == 0 else min(MAX_PSNR_DB, 10 * np.log10(255.0**2 / error))


def _ssim_frame(a: np.ndarray, b: np.ndarray) -> float:
    first, second = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _local_mean(first), _local_mean(second)
    variance_a = _local_mean(first * first) - mean_a * mean_a
    variance_b = _local_mean(second * second) - mean_b * mean_b
    covariance = _local_mean(first * second) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return float((luminance * structure).mean())


def _local_mean(image: np.ndarray) -> np.ndarray:
    """Return the Gaussian-weighted mean around every pixel whose window lies within the image: (H - 10, W - 10, 3)."""
    margin = _WINDOW_PX // 2
    blurred = cv2.GaussianBlur(image, (_WINDOW_PX, _WINDOW_PX), _SIGMA_PX)
    return blurred[margin : image.shape[0] - margin, margin : image.shape[1] - margin]


def _check_clips(rendered: np.ndarray, truth: np.ndarray) -> None:
    if rendered.shape != truth.shape:
        raise ShapeError(
            f"clips of shapes {rendered.shape} and {truth.shape} cannot be compared",
            hint="render at the true clip's size and length",
        )
    is_clip = rendered.ndim == 4 and rendered.shape[3] == 3 and 0 not in rendered.shape
    if not is_clip or rendered.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ShapeError(
            f"clips of shape {rendered.shape}, {rendered.dtype} and {truth.dtype}", hint="give uint8 RGB (N, H, W, 3)"
        )
