"""Convert other tools' keypoint layouts to the 134 points: BODY_25, COCO-WholeBody, MediaPipe Holistic.

Layer 1: numpy only.
"""

from __future__ import annotations

import numpy as np

from posecrafter_rt.poses.keypoints import BODY, FACE, FEET, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND

NECK, RIGHT_SHOULDER, LEFT_SHOULDER = 1, 2, 5

# The BODY_25 index of each of our 18 body points. BODY_25 also has a mid hip (8), and from 19 the feet in our order.
BODY_25_BODY = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)
BODY_25_FEET = slice(19, 25)

NUM_WHOLEBODY_POINTS = 133
# COCO-17 indices; the neck is computed later, the left shoulder holds its place. Then 6 feet, 68 face, 21 + 21 hands.
_WHOLEBODY_BODY = (0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_WHOLEBODY_AFTER_BODY = slice(17, 133)

NUM_MEDIAPIPE_POINTS = 33 + 468 + 21 + 21
_MEDIAPIPE_BODY = (0, 11, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
# Big toe and heel of either foot; BlazePose has no small toe.
_MEDIAPIPE_FEET = {0: 31, 2: 29, 3: 32, 5: 30}
_MEDIAPIPE_MESH_START = 33
_MEDIAPIPE_LEFT_HAND = slice(501, 522)
_MEDIAPIPE_RIGHT_HAND = slice(522, 543)
# The face mesh's vertex nearest to each iBUG point: jaw, brows, nose, eyes, outer lips, inner lips.
_MESH_TO_IBUG = (
    162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,
    71, 63, 105, 66, 107, 336, 296, 334, 293, 301,
    168, 197, 5, 4, 75, 97, 2, 326, 305,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,
    78, 82, 13, 312, 308, 317, 14, 87,
)  # fmt: skip


def from_wholebody(points: np.ndarray) -> np.ndarray:
    """Convert COCO-WholeBody, the layout of DWPose and RTMPose, to our layout.

    The neck is the middle of the shoulders, with the lower of their confidences.
    Args: points: (P, 133, 3): x, y in pixels, confidence; one row per person.
    Returns: float32 (P, 134, 3).
    """
    points = np.asarray(points, np.float32)
    keypoints = np.zeros((len(points), NUM_KEYPOINTS, 3), np.float32)
    keypoints[:, BODY] = points[:, _WHOLEBODY_BODY]
    keypoints[:, BODY.stop :] = points[:, _WHOLEBODY_AFTER_BODY]
    _set_neck(keypoints)
    return keypoints


def from_mediapipe(points: np.ndarray) -> np.ndarray:
    """Convert MediaPipe Holistic to our layout; it has no small toes, so these are missing.

    Args: points: (P, 543, 3): 33 pose, 468 face mesh, 21 left hand, 21 right hand; x, y in pixels, confidence.
    Returns: float32 (P, 134, 3).
    """
    points = np.asarray(points, np.float32)
    keypoints = np.zeros((len(points), NUM_KEYPOINTS, 3), np.float32)
    keypoints[:, BODY] = points[:, _MEDIAPIPE_BODY]
    for ours, theirs in _MEDIAPIPE_FEET.items():
        keypoints[:, FEET.start + ours] = points[:, theirs]
    keypoints[:, FACE] = points[:, np.add(_MESH_TO_IBUG, _MEDIAPIPE_MESH_START)]
    keypoints[:, LEFT_HAND] = points[:, _MEDIAPIPE_LEFT_HAND]
    keypoints[:, RIGHT_HAND] = points[:, _MEDIAPIPE_RIGHT_HAND]
    _set_neck(keypoints)
    return keypoints


def _set_neck(keypoints: np.ndarray) -> None:
    right, left = keypoints[:, RIGHT_SHOULDER], keypoints[:, LEFT_SHOULDER]
    keypoints[:, NECK, :2] = (right[:, :2] + left[:, :2]) / 2
    keypoints[:, NECK, 2] = np.minimum(right[:, 2], left[:, 2])
