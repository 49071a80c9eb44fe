"""Choose the reference frame, and measure how near two pose sequences are (Eq. 5, 21).

Layer 1: numpy and the keypoint layout.
"""

from __future__ import annotations

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, NUM_KEYPOINTS, PoseSequence


def pose_distances(train: PoseSequence, target: PoseSequence) -> np.ndarray:
    """Return the distance of every training pose to every target pose.

    d_ij = sqrt(134 / |M_ij| * sum_{k in M_ij} |p_ik - p'_jk|^2), where M_ij holds the keypoints usable in both poses:
    the Euclidean norm of Eq. 5, scaled to the full count if keypoints are missing.
    Args:
        train: T poses.
        target: N poses; they are scaled to the training canvas.
    Returns: float64 (T, N) in pixels of the training canvas; infinity where a pair shares no keypoint.
    """
    train_points, train_usable = _points(train)
    target_points, target_usable = _points(target.resized(*train.canvas))
    distances = np.full((len(train), len(target)), np.inf)
    # One training pose at a time: the whole (T, N, 134, 2) difference of a long sequence would not fit the cache,
    # and expanding the square into matrix products would lose the exact zero of equal poses.
    for row, points, usable in zip(distances, train_points, train_usable, strict=True):
        difference = target_points - points  # (N, 134, 2)
        squares = np.einsum("nkc,nkc->nk", difference, difference)
        shared = target_usable & usable  # (N, 134)
        count = shared.sum(axis=1)
        totals = np.einsum("nk,nk->n", squares, shared)
        np.sqrt(totals * NUM_KEYPOINTS / np.maximum(count, 1), out=row, where=count > 0)
    return distances


def select_reference(train: PoseSequence, target: PoseSequence) -> int:
    """Return the training frame whose pose is nearest to all target poses together.

    r = argmin_i sum_j |p_i - p'_j|_2   (Eq. 5; missing keypoints as in `pose_distances`; of equals, the first)
    A pair that shares no keypoint counts as if every keypoint were off by the canvas's diagonal; a training pose that
    shares none with any target is never taken.
    Args:
        train: T poses of the training video.
        target: N poses to render, on any canvas.
    Returns: index into `train`.
    Raises: PoseError naming the first target frame that shares no keypoint with any training pose.
    """
    check_shared_keypoints(train, target)
    return _nearest_row(pose_distances(train, target), train.canvas)


def check_shared_keypoints(train: PoseSequence, target: PoseSequence, *, first: int = 0) -> None:
    """Raise PoseError naming the first target frame that shares no keypoint with any training pose.

    Args: first: the number of the first target pose in what it was taken from, for the message.
    """
    seen = _usable(train).any(axis=0)
    lonely = np.flatnonzero(~(_usable(target) & seen).any(axis=1))
    if len(lonely):
        raise PoseError(
            f"target frame {first + lonely[0]} shares no keypoint with any of the {len(train)} training poses"
            + (f" (nor do {len(lonely) - 1} later frames)" if len(lonely) > 1 else ""),
            hint=f"keypoints count from confidence {CONFIDENCE_THRESHOLD} on; leave out the frames that show nobody",
        )


def medoid_reference(train: PoseSequence) -> int:
    """Return the training frame nearest to all others: the reference if the target poses are not known yet.

    As `select_reference(train, train)`, but frames that show nobody are ignored.
    Returns: index into `train`.
    Raises: PoseError if no frame has a usable keypoint.
    """
    distances = pose_distances(train, train)
    visible = np.isfinite(distances.diagonal())
    if not visible.any():
        raise PoseError(
            f"none of the {len(train)} training poses has a keypoint of confidence {CONFIDENCE_THRESHOLD} or more",
            hint="extract the poses again, or check the confidences in the file",
        )
    return _nearest_row(distances[:, visible], train.canvas)


def video_sim(train: PoseSequence, target: PoseSequence) -> float:
    """Return how well the training poses cover the target poses.

    Sim = 1 - 1/N sum_j min_i d_ij / (sqrt(134) * diagonal): the mean over target poses of the distance to the nearest
    training pose, as a root-mean-square keypoint displacement in units of the training canvas's diagonal, taken from 1.
    The paper's Eq. 21 measures the same thing; this form, which does not depend on the resolution, is our own.
    Args:
        train: T poses of the training video.
        target: N poses, on any canvas.
    Returns: 1 if every target pose occurs in the training video, less the farther they are (0.9: a tenth of the
        picture's diagonal on average); at most 1.
    Raises: PoseError naming the first target frame that shares no keypoint with any training pose.
    """
    check_shared_keypoints(train, target)
    return 1.0 - float(pose_distances(train, target).min(axis=0).mean()) / _farthest(train.canvas)


def _points(sequence: PoseSequence) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates, float64 (N, 134, 2), and which of them are usable, bool (N, 134)."""
    return sequence.keypoints[..., :2].astype(np.float64), _usable(sequence)


def _usable(sequence: PoseSequence) -> np.ndarray:
    return sequence.keypoints[..., 2] >= CONFIDENCE_THRESHOLD


def _nearest_row(distances: np.ndarray, canvas: tuple[int, int]) -> int:
    shared = np.isfinite(distances)
    totals = np.where(shared, distances, _farthest(canvas)).sum(axis=1)
    totals[~shared.any(axis=1)] = np.inf
    return int(np.argmin(totals))


def _farthest(canvas: tuple[int, int]) -> float:
    """Return the distance of two poses whose every keypoint is off by the canvas's diagonal, in pixels."""
    return float(np.hypot(*canvas) * np.sqrt(NUM_KEYPOINTS))
