"""Tests of the layout and of `PoseSequence`.

Tests; no layer.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence, keypoint_name, scale_keypoints

sides = st.integers(1, 4096)


def sequence(num_frames: int = 3) -> PoseSequence:
    keypoints = np.random.default_rng(5).random((num_frames, NUM_KEYPOINTS, 3)) * [160, 128, 1]
    return PoseSequence(keypoints, (128, 160), 25.0)


def test_a_sequence_holds_its_own_float32_copy() -> None:
    source = np.ones((2, NUM_KEYPOINTS, 3))
    poses = PoseSequence(source, (4, 5))
    source[:] = 0
    assert poses.keypoints.dtype == np.float32
    assert poses.keypoints.min() == 1
    assert poses.fps is None
    assert len(poses) == 2


def test_points_without_confidence_are_zero() -> None:
    keypoints = np.ones((1, NUM_KEYPOINTS, 3))
    keypoints[0, 7] = [12, 13, 0]
    assert PoseSequence(keypoints, (4, 5)).keypoints[0, 7].tolist() == [0, 0, 0]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_points_with_a_masked_number_are_missing(column: int) -> None:
    keypoints = np.ma.ones((2, NUM_KEYPOINTS, 3))
    keypoints.data[1, 7, column] = np.nan
    keypoints[1, 7, column] = np.ma.masked
    poses = PoseSequence(keypoints, (4, 5))
    assert poses.keypoints[1, 7].tolist() == [0, 0, 0] and poses.keypoints.sum() == 3 * (2 * NUM_KEYPOINTS - 1)
    assert type(poses.keypoints) is np.ndarray


def test_slices_arrays_lists_ints_and_iteration() -> None:
    poses = sequence(5)
    assert np.array_equal(poses[1:4].keypoints, poses.keypoints[1:4])
    assert np.array_equal(poses[[3, 1]].keypoints, poses.keypoints[[3, 1]])
    assert np.array_equal(poses[np.array([3, 1])].keypoints, poses.keypoints[[3, 1]])
    assert poses[1:4].canvas == (128, 160)
    assert poses[1:4].fps == 25.0
    assert len(poses[-1]) == 1
    assert np.array_equal(poses[-1].keypoints[0], poses.keypoints[4])
    assert np.array_equal(np.stack(list(poses)), poses.keypoints)
    with pytest.raises(IndexError):
        poses[5]
    with pytest.raises(PoseError, match="0 frames"):
        poses[3:3]


@pytest.mark.parametrize(
    ("keypoints", "message"),
    [
        (np.zeros((0, NUM_KEYPOINTS, 3)), "0 frames"),
        (np.zeros((2, 133, 3)), r"\(2, 133, 3\)"),
        (np.zeros((NUM_KEYPOINTS, 3)), r"\(134, 3\)"),
        ([["x"]], "not an array of numbers"),
    ],
)
def test_wrong_arrays_are_refused(keypoints: object, message: str) -> None:
    with pytest.raises(PoseError, match=message) as caught:
        PoseSequence(keypoints, (8, 8))  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, np.nan, "frame 1, left wrist: x is nan"),
        (1, np.inf, "frame 1, left wrist: y is inf"),
        (2, np.nan, "frame 1, left wrist: confidence is nan"),
        (2, 1.5, "frame 1, left wrist: confidence is 1.5"),
        (2, -0.5, "frame 1, left wrist: confidence is -0.5"),
    ],
)
def test_wrong_values_are_named(column: int, value: float, message: str) -> None:
    keypoints = np.ones((2, NUM_KEYPOINTS, 3))
    keypoints[1, 7, column] = value
    with pytest.raises(PoseError, match=message):
        PoseSequence(keypoints, (8, 8))


@pytest.mark.parametrize("canvas", [(0, 8), (8, -1), (8.5, 8), (8,), 8, ("a", "b"), (8, 8, 8)])
def test_wrong_canvases_are_refused(canvas: object) -> None:
    with pytest.raises(PoseError, match="canvas is"):
        PoseSequence(np.ones((1, NUM_KEYPOINTS, 3)), canvas)  # type: ignore[arg-type]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_wrong_fps_are_refused(fps: float) -> None:
    with pytest.raises(PoseError, match="fps is"):
        PoseSequence(np.ones((1, NUM_KEYPOINTS, 3)), (8, 8), fps)


def test_names() -> None:
    assert [keypoint_name(i) for i in (0, 4, 18, 24, 91, 92, 133)] == [
        "nose", "right wrist", "left big toe", "face 0", "face 67", "left hand 0", "right hand 20",
    ]  # fmt: skip
    with pytest.raises(IndexError):
        keypoint_name(NUM_KEYPOINTS)


def test_resizing_carries_pixel_centres() -> None:
    keypoints = np.zeros((1, NUM_KEYPOINTS, 3))
    keypoints[0, 0] = [0, 0, 1]
    keypoints[0, 1] = [3, 1, 1]
    resized = PoseSequence(keypoints, (2, 4), 30).resized(4, 16)
    assert resized.canvas == (4, 16)
    assert resized.fps == 30
    assert resized.keypoints[0, 0].tolist() == [1.5, 0.5, 1]
    assert resized.keypoints[0, 1].tolist() == [13.5, 2.5, 1]
    assert not resized.keypoints[0, 2:].any()


@given(height=sides, width=sides, new_height=sides, new_width=sides)
def test_resizing_there_and_back_changes_nothing(height: int, width: int, new_height: int, new_width: int) -> None:
    keypoints = np.random.default_rng(height).random((2, NUM_KEYPOINTS, 3)) * [width, height, 1]
    poses = PoseSequence(keypoints, (height, width))
    back = poses.resized(new_height, new_width).resized(height, width)
    # float32 keeps 24 bits; a small intermediate canvas scales its rounding up again.
    tolerance = 2e-6 * (1 + max(height / new_height, width / new_width) + max(height, width))
    assert np.abs(back.keypoints - poses.keypoints).max() <= tolerance


@given(height=sides, width=sides, x=st.floats(-0.5, 4095.5), y=st.floats(-0.5, 4095.5))
def test_resizing_keeps_the_place_in_the_picture(height: int, width: int, x: float, y: float) -> None:
    scaled = scale_keypoints(np.array([x, y, 1.0]), (4096, 4096), (height, width))
    place = (scaled[:2] + 0.5) / [width, height]
    assert np.allclose(place, [(x + 0.5) / 4096, (y + 0.5) / 4096], atol=1e-6 + 1e-6 / min(height, width))


def test_resizing_to_nothing_is_refused() -> None:
    with pytest.raises(PoseError, match="canvas is"):
        sequence().resized(0, 5)
