"""The skeleton: the tree of joints, the lengths of bones, and the axes of the head.

Layer 1: numpy only.
"""

from __future__ import annotations

import numpy as np

from posecrafter_rt.poses.fit import shown_median
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, FACE, FEET, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND
from posecrafter_rt.poses.layouts import LEFT_SHOULDER, NECK, RIGHT_SHOULDER

NOSE, RIGHT_ELBOW, RIGHT_WRIST, LEFT_ELBOW, LEFT_WRIST, RIGHT_HIP, LEFT_HIP = 0, 3, 4, 6, 7, 8, 11
RIGHT_ANKLE, LEFT_ANKLE, RIGHT_EYE, LEFT_EYE, RIGHT_EAR, LEFT_EAR = 10, 13, 14, 15, 16, 17

_BODY_PARENTS = (
    NECK, -1, NECK, RIGHT_SHOULDER, RIGHT_ELBOW, NECK, LEFT_SHOULDER, LEFT_ELBOW,
    NECK, RIGHT_HIP, 9, NECK, LEFT_HIP, 12, NOSE, NOSE, RIGHT_EYE, LEFT_EYE,
)  # fmt: skip
# What moves with the head, besides the nose and the 68 points of the face.
HEAD = (RIGHT_EYE, LEFT_EYE, RIGHT_EAR, LEFT_EAR)
# Joints that are placed by their own bone, each after its parent.
JOINTS = (NECK, NOSE, *range(2, 14), *range(FEET.start, FEET.stop))

# iBUG's numbers, within the face: the chin, the tip of the nose, the eyelids.
CHIN = slice(FACE.start + 6, FACE.start + 11)
NOSE_TIP = FACE.start + 30
RIGHT_LIDS = slice(FACE.start + 36, FACE.start + 42)
LEFT_LIDS = slice(FACE.start + 42, FACE.start + 48)

_UPRIGHT = (0.0, 1.0)
_SHORTEST_PX = 1e-3  # a shorter line has no reliable direction


def _parent_of(index: int) -> int:
    if index < FEET.start:
        return _BODY_PARENTS[index]
    if index < FEET.stop:
        return LEFT_ANKLE if index < FEET.start + 3 else RIGHT_ANKLE
    if index < FACE.stop:
        return NOSE
    hand, wrist = (LEFT_HAND, LEFT_WRIST) if index < LEFT_HAND.stop else (RIGHT_HAND, RIGHT_WRIST)
    point = index - hand.start
    if point == 0:
        return wrist
    return hand.start if point % 4 == 1 else index - 1


PARENTS = tuple(_parent_of(index) for index in range(NUM_KEYPOINTS))
"""The parent of each keypoint: the keypoint that it hangs on. The neck's is -1."""


def split(keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places, float64 (N, P, 2), and whether they are seen (confidence of at least 0.3), bool (N, P)."""
    return keypoints[..., :2].astype(np.float64), keypoints[..., 2] >= CONFIDENCE_THRESHOLD


def bone_lengths(keypoints: np.ndarray) -> np.ndarray:
    """Return the median length, in the picture, of the bone from each keypoint to its parent.

    Args: keypoints: (N, 134, 3): x, y in pixels, confidence.
    Returns: float64 (134,) in pixels; NaN if no frame shows both ends with a confidence of 0.3, and for the neck.
    """
    points, seen = split(keypoints)
    parents = np.array(PARENTS)
    lengths = np.linalg.norm(points - points[:, parents], axis=2)
    return shown_median(lengths[..., np.newaxis], seen & seen[:, parents] & (parents >= 0))[:, 0]


def head_axes(keypoints: np.ndarray) -> np.ndarray:
    """Return the directions across and down a head that may be tilted, from the line between its eyes and its chin.

    That line keeps its direction when the head turns; the line from eye to eye does not.
    Args: keypoints: (N, 134, 3).
    Returns: float64 (N, 2, 2): unit vectors across (to the picture's right in an upright head) and down. Frames that do
        not show eyes and chin are interpolated from their neighbours; if no frame does, the head counts as upright.
    """
    points, seen = split(keypoints)
    lids = slice(RIGHT_LIDS.start, LEFT_LIDS.stop)
    down = points[:, CHIN].mean(axis=1) - points[:, lids].mean(axis=1)
    is_known = seen[:, CHIN].all(axis=1) & seen[:, lids].all(axis=1) & (np.linalg.norm(down, axis=1) > _SHORTEST_PX)
    if not is_known.any():
        return np.tile(np.array([_UPRIGHT[::-1], _UPRIGHT]), (len(points), 1, 1))
    down[is_known] /= np.linalg.norm(down[is_known], axis=1, keepdims=True)
    down = fill_between(down, is_known)
    # Interpolation between two opposite directions can give zero.
    down[np.linalg.norm(down, axis=1) <= _SHORTEST_PX] = _UPRIGHT
    down /= np.linalg.norm(down, axis=1, keepdims=True)
    across = np.stack([down[:, 1], -down[:, 0]], axis=1)
    return np.stack([across, down], axis=1)


def fill_between(values: np.ndarray, is_known: np.ndarray) -> np.ndarray:
    """Interpolate unknown frames linearly between their known neighbours; at the ends, repeat the nearest known one.

    Args: values: (N, D). is_known: bool (N,), at least one true.
    Returns: float64 (N, D), new array.
    """
    frames = np.arange(len(values))
    return np.stack([np.interp(frames, frames[is_known], column[is_known]) for column in values.T], axis=1)
