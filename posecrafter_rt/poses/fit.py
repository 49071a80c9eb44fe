"""Fit another person's keypoints to the avatar's size and place, by scale and shift.

Layer 1: numpy; pure functions, and one class that remembers the first second of a person.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, FACE

CALIBRATION_S = 1.0
MAX_SAMPLES = 64  # of the first second, which ends early at a faster camera: enough for a median
_HEAD_AND_SHOULDERS = [0, 1, 2, 5, 14, 15, 16, 17]  # nose, neck, shoulders, eyes, ears
_MIN_SPREAD_PX = 1.0


class Similarity(NamedTuple):
    """x' = scale * x + shift_x, y likewise. There is no rotation, so a tilted head stays tilted."""

    scale: float
    shift_x: float
    shift_y: float

    def apply(self, keypoints: np.ndarray) -> np.ndarray:
        """Move keypoints (..., 3); return float32, a new array. Missing ones (confidence 0) stay (0, 0, 0)."""
        moved = np.array(keypoints, np.float32)
        moved[..., :2] = moved[..., :2] * self.scale + (self.shift_x, self.shift_y)
        moved[moved[..., 2] == 0] = 0
        return moved


def shown_median(values: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Return the median of each value over the frames that show it.

    Args: values: float (N, P, D). shown: bool (N, P). N at least 1.
    Returns: (P, D), dtype of `values`; NaN where no frame shows it.
    """
    count = shown.sum(axis=0)
    # Values that are not shown are sorted to the end, so the median is the middle of the first `count`.
    ordered = np.sort(np.where(shown[..., np.newaxis], values, np.inf), axis=0)
    middle = np.maximum([(count - 1) // 2, count // 2], 0)[..., np.newaxis]
    median = np.take_along_axis(ordered, middle, axis=0).mean(axis=0)
    return np.where(count[:, np.newaxis] > 0, median, np.nan)


def median_pose(keypoints: np.ndarray) -> np.ndarray:
    """Return the median place of each keypoint over the frames that show it with a confidence of at least 0.3.

    Args: keypoints: (N, 134, 3), N at least 1.
    Returns: float32 (134, 3); a point's confidence is the share of frames that show it. Points that none shows are
        zeros.
    """
    shown = keypoints[..., 2] >= CONFIDENCE_THRESHOLD
    median = np.zeros(keypoints.shape[1:], np.float32)
    median[:, :2] = np.nan_to_num(shown_median(keypoints[..., :2], shown))
    median[:, 2] = shown.mean(axis=0)
    return median


def fit_person(person: np.ndarray, reference: np.ndarray) -> Similarity | None:
    """Return the similarity that lays a person's head and shoulders onto the avatar's.

    It uses the points that both poses show: neck, shoulders, nose, eyes, ears, and the corners of the box around the
    face points. scale is the ratio of their root mean square distances from their centres; the centres coincide.
    Args: person, reference: (134, 3) each, in pixels of their own canvas.
    Returns: the similarity from the person's pixels to the reference's; None if both show fewer than two of these
        points, or if either pose's are less than 1 px from their centre (root mean square).
    """
    ours, theirs = _anchors(person), _anchors(reference)
    shared = np.isfinite(ours[:, 0]) & np.isfinite(theirs[:, 0])
    if shared.sum() < 2:
        return None
    ours, theirs = ours[shared], theirs[shared]
    own_spread, other_spread = (float(np.sqrt(points.var(axis=0).sum())) for points in (ours, theirs))
    if min(own_spread, other_spread) < _MIN_SPREAD_PX:
        return None
    scale = other_spread / own_spread
    shift = theirs.mean(axis=0) - scale * ours.mean(axis=0)
    return Similarity(scale, float(shift[0]), float(shift[1]))


def _anchors(pose: np.ndarray) -> np.ndarray:
    """Return (10, 2) float64: single points, then the face box's corners; NaN where they are not shown."""
    shown = pose[:, 2] >= CONFIDENCE_THRESHOLD
    points = np.where(shown[:, np.newaxis], pose[:, :2], np.nan).astype(np.float64)
    box = np.full((2, 2), np.nan)
    if shown[FACE].all():  # the box of a partly seen face would not match a whole one's
        box = np.stack([points[FACE].min(axis=0), points[FACE].max(axis=0)])
    return np.concatenate([points[_HEAD_AND_SHOULDERS], box])


class PersonFit:
    """Fits a live person by the median pose of the first second in which they are seen; the fit then stays the same.

    If that median shows too little of the person, the next second is used. `reset` starts again.

    reference: (134, 3), the avatar's usual pose, see `median_pose`.
    """

    def __init__(self, reference: np.ndarray) -> None:
        self._reference = reference
        self.reset()

    def reset(self) -> None:
        """Forget the person."""
        self._samples: list[np.ndarray] = []
        self._canvas: tuple[int, int] | None = None
        self._since_s: float | None = None
        self._similarity: Similarity | None = None
        self._is_settled = False

    def similarity(self, keypoints: np.ndarray, canvas: tuple[int, int], now_s: float) -> Similarity | None:
        """Return how to move a pose; None as long as too little of the person was seen.

        Args: keypoints: (134, 3). canvas: (height, width); a change means another camera, so the fit starts again.
            now_s: seconds, of a clock that only goes forward.
        Raises: PoseError for another shape.
        """
        if keypoints.shape != self._reference.shape:
            raise PoseError(f"a pose has the shape {keypoints.shape}", f"give {self._reference.shape}")
        if canvas != self._canvas:
            self.reset()
            self._canvas = canvas
        if not self._is_settled:
            self._learn(keypoints, now_s)
        return self._similarity

    def _learn(self, keypoints: np.ndarray, now_s: float) -> None:
        if self._since_s is None:
            if fit_person(keypoints, self._reference) is None:
                return  # nobody to fit yet, so the second has not begun
            self._since_s = now_s
        if now_s - self._since_s < CALIBRATION_S and len(self._samples) < MAX_SAMPLES:
            self._samples.append(keypoints)
            self._similarity = fit_person(median_pose(np.stack(self._samples)), self._reference)
            return
        self._samples, self._since_s = [], None
        self._is_settled = self._similarity is not None
        if not self._is_settled:  # that second's median showed too little: start another
            self._learn(keypoints, now_s)
