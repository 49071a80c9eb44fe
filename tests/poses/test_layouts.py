"""Tests of the carrying over from other layouts, checked against points placed by name.

Tests; no layer.
"""

from __future__ import annotations

import numpy as np

from posecrafter_rt.poses.keypoints import BODY, FACE, FEET, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND, keypoint_name
from posecrafter_rt.poses.layouts import NUM_MEDIAPIPE_POINTS, NUM_WHOLEBODY_POINTS, from_mediapipe, from_wholebody

COCO = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)  # fmt: skip
BLAZE_POSE = {
    "nose": 0, "left eye": 2, "right eye": 5, "left ear": 7, "right ear": 8, "left shoulder": 11, "right shoulder": 12,
    "left elbow": 13, "right elbow": 14, "left wrist": 15, "right wrist": 16, "left hip": 23, "right hip": 24,
    "left knee": 25, "right knee": 26, "left ankle": 27, "right ankle": 28, "left heel": 29, "right heel": 30,
    "left big toe": 31, "right big toe": 32,
}  # fmt: skip


def numbered(count: int) -> np.ndarray:
    """Two people whose point i is at (i, 1000 + i) and (i + 0.5, ...), confidence growing with i."""
    index = np.arange(count, dtype=np.float32)
    one = np.stack([index, 1000 + index, 0.3 + index / (2 * count)], axis=1)
    return np.stack([one, one + np.array([0.5, 0, 0], np.float32)])


def test_wholebody() -> None:
    points = numbered(NUM_WHOLEBODY_POINTS)
    keypoints = from_wholebody(points)
    assert keypoints.shape == (2, NUM_KEYPOINTS, 3)
    assert keypoints.dtype == np.float32
    for index in range(BODY.stop):
        if keypoint_name(index) != "neck":
            assert np.array_equal(keypoints[:, index], points[:, COCO.index(keypoint_name(index))])
    # COCO-WholeBody: 17 body, then big toe, small toe, heel, left before right, 68 face, left hand, right hand.
    for part, start in ((FEET, 17), (FACE, 23), (LEFT_HAND, 91), (RIGHT_HAND, 112)):
        assert np.array_equal(keypoints[:, part], points[:, start : start + part.stop - part.start])


def test_the_neck_is_the_middle_of_the_shoulders_with_their_lower_confidence() -> None:
    points = numbered(NUM_WHOLEBODY_POINTS)
    points[:, 5] = [10, 20, 0.9]
    points[:, 6] = [30, 26, 0.4]
    assert np.allclose(from_wholebody(points)[:, 1], [20, 23, 0.4])


def test_mediapipe() -> None:
    points = numbered(NUM_MEDIAPIPE_POINTS)
    keypoints = from_mediapipe(points)
    assert keypoints.shape == (2, NUM_KEYPOINTS, 3)
    for index in range(FEET.stop):
        name = keypoint_name(index)
        if name in BLAZE_POSE:
            assert np.array_equal(keypoints[:, index], points[:, BLAZE_POSE[name]]), name
        elif name != "neck":
            assert name.endswith("small toe")
            assert not keypoints[:, index].any()
    assert np.array_equal(keypoints[:, LEFT_HAND], points[:, 33 + 468 : 33 + 468 + 21])
    assert np.array_equal(keypoints[:, RIGHT_HAND], points[:, 33 + 468 + 21 :])


def test_the_face_mesh_gives_ibug_landmarks_that_mesh_anatomy_confirms() -> None:
    face = from_mediapipe(numbered(NUM_MEDIAPIPE_POINTS))[0, FACE, 0] - 33
    assert len(set(face.tolist())) == 68
    # The mesh's corners of eyes and mouth, chin, nose tip and inner lips.
    expected = {36: 33, 39: 133, 42: 362, 45: 263, 48: 61, 54: 291, 60: 78, 64: 308, 62: 13, 66: 14, 8: 152, 30: 4}
    assert {index: int(face[index]) for index in expected} == expected


def test_nobody_stays_nobody() -> None:
    assert from_wholebody(np.zeros((0, NUM_WHOLEBODY_POINTS, 3))).shape == (0, NUM_KEYPOINTS, 3)
