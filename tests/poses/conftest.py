"""Fixtures for the pose tests: one person with every keypoint, made by formula.

Tests; no layer.
"""

from __future__ import annotations

import numpy as np
import pytest

from posecrafter_rt.poses.keypoints import BODY, FACE, FEET, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND

_BODY_XY = [
    (256, 100), (256, 160), (200, 160), (170, 230), (180, 300), (312, 160), (350, 220), (390, 150), (225, 310),
    (220, 390), (215, 470), (287, 310), (292, 390), (297, 470), (245, 90), (267, 90), (230, 95), (282, 95),
]  # fmt: skip
_FEET_XY = [(310, 485), (320, 482), (295, 480), (200, 485), (190, 482), (217, 480)]


def _hand(wrist: tuple[float, float], towards_degrees: float) -> np.ndarray:
    points = [wrist]
    for finger in range(5):
        angle = np.radians(towards_degrees - 60 + 30 * finger)
        points += [(wrist[0] + 12 * b * np.cos(angle), wrist[1] + 12 * b * np.sin(angle)) for b in (1, 2, 3, 4)]
    return np.array(points)


@pytest.fixture
def person() -> np.ndarray:
    """Float32 (134, 3) on a canvas of 512 x 512, all confidences 1."""
    keypoints = np.ones((NUM_KEYPOINTS, 3), np.float32)
    keypoints[BODY, :2] = _BODY_XY
    keypoints[FEET, :2] = _FEET_XY
    angles = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    keypoints[FACE, :2] = np.stack([256 + 40 * np.cos(angles), 100 + 50 * np.sin(angles)], axis=1)
    keypoints[LEFT_HAND, :2] = _hand(_BODY_XY[7], -90)
    keypoints[RIGHT_HAND, :2] = _hand(_BODY_XY[4], 90)
    return keypoints
