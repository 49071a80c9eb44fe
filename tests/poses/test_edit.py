"""Blinks, turns of the head and waves: what moves, how, and that nothing else does.

Tests; no layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posecrafter_rt.embedded.people_head import HeadPose, HeadShape, Projector, landmarks
from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses import edit
from posecrafter_rt.poses.edit import blink, turn_head, wave
from posecrafter_rt.poses.keypoints import BODY, FACE, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND, PoseSequence
from posecrafter_rt.poses.shown import range_text
from posecrafter_rt.poses.skeleton import HEAD, LEFT_LIDS, RIGHT_LIDS

CANVAS = (512, 512)
HEAD_POINTS = [0, *HEAD, *range(FACE.start, FACE.stop)]
FRONT = [0, 14, 15, *range(FACE.start + 17, FACE.stop)]  # the far side of the jaw is hidden by a turn
EDITS: dict[str, Callable[[PoseSequence, slice], PoseSequence]] = {
    "blink": blink,
    "turn": lambda poses, frames: turn_head(poses, frames, 25),
    "left": lambda poses, frames: wave(poses, frames, "left"),
    "right": lambda poses, frames: wave(poses, frames, "right"),
}


def head(yaw: float = 0.0, roll: float = 0.0, width: float = 1.0) -> np.ndarray:
    """The 73 points of a head as the camera sees it, turned in three dimensions: (73, 2)."""
    shape = HeadShape(width=width)
    project = Projector(HeadPose(yaw=yaw, roll=roll), (256.0, 100.0), 6.0, distance_cm=1e5)
    marks, _ = landmarks(shape, HeadPose(yaw=yaw, roll=roll), project)
    ears, _ = project(np.array([[-7.6 * shape.width, 1.2, -0.8], [7.6 * shape.width, 1.2, -0.8]], np.float32))
    return np.concatenate([marks[[30]], marks[36:42].mean(0)[None], marks[42:48].mean(0)[None], ears, marks])


@pytest.fixture
def somebody(person: np.ndarray) -> np.ndarray:
    """With a face that is one: float32 (134, 3)."""
    keypoints = person.copy()
    keypoints[HEAD_POINTS, :2] = head()
    return keypoints


@pytest.fixture
def poses(somebody: np.ndarray) -> PoseSequence:
    """30 frames of somebody who drifts a little."""
    keypoints = np.stack([somebody] * 30)
    keypoints[..., 0] += np.linspace(0, 20, 30)[:, np.newaxis]
    return PoseSequence(keypoints, CANVAS, 25.0)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("frames", [slice(5, 20), slice(None, 8), slice(22, None), slice(None), slice(7, 8)])
def test_other_frames_stay_bit_for_bit(poses: PoseSequence, name: str, frames: slice) -> None:
    before = poses.keypoints.copy()
    edited = EDITS[name](poses, frames)
    assert np.array_equal(poses.keypoints, before)
    assert (edited.canvas, edited.fps) == (poses.canvas, poses.fps)
    seen = edited.keypoints[..., 2]
    assert np.array_equal(np.delete(seen, HEAD, axis=1), np.delete(before[..., 2], HEAD, axis=1))
    changed = (edited.keypoints != before).any(axis=(1, 2))
    outside = np.ones(30, bool)
    outside[frames] = False
    assert not changed[outside].any()
    assert changed[frames].any()


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("blink", [*range(RIGHT_LIDS.start, LEFT_LIDS.stop)]),
        ("turn", HEAD_POINTS),
        ("left", [7, *range(LEFT_HAND.start, LEFT_HAND.stop)]),
        ("right", [4, *range(RIGHT_HAND.start, RIGHT_HAND.stop)]),
    ],
)
def test_other_points_stay_bit_for_bit(poses: PoseSequence, name: str, points: list[int]) -> None:
    edited = EDITS[name](poses, slice(5, 20)).keypoints
    others = np.setdiff1d(np.arange(NUM_KEYPOINTS), points)
    assert np.array_equal(edited[:, others], poses.keypoints[:, others])


@pytest.mark.parametrize("name", EDITS)
def test_edits_begin_and_end_softly(somebody: np.ndarray, name: str) -> None:
    still = PoseSequence(np.stack([somebody] * 80), CANVAS, 25.0)
    path = np.delete(EDITS[name](still, slice(10, 70)).keypoints[..., :2], HEAD[2:], axis=1)  # ears vanish
    steps = np.linalg.norm(np.diff(path, axis=0), axis=2).max(axis=1)
    assert steps.max() > 0.2  # it does move
    assert max(steps[9], steps[69]) < 0.2 * steps.max()
    assert np.abs(np.diff(steps)).max() < 0.6 * steps.max()


@pytest.mark.parametrize("name", EDITS)
def test_what_is_missing_stays_missing(poses: PoseSequence, name: str) -> None:
    keypoints = poses.keypoints.copy()
    lost = np.random.default_rng(2).choice(NUM_KEYPOINTS, 30, replace=False)
    keypoints[::2, lost] = 0
    edited = EDITS[name](PoseSequence(keypoints, CANVAS, 25.0), slice(0, 30)).keypoints
    assert not edited[::2, lost].any()


@given(st.integers(1, 40))
def test_an_edit_is_done_wholly_for_some_of_its_frames(num_frames: int) -> None:
    eased = edit._eased(num_frames)
    assert eased.max() == 1 and eased.min() > 0
    assert np.allclose(eased, eased[::-1])
    assert (np.diff(eased[: (num_frames + 1) // 2]) >= 0).all()


@pytest.mark.parametrize("roll", [0.0, 0.5, -1.2])
def test_lids_meet_and_corners_stay(poses: PoseSequence, roll: float) -> None:
    keypoints = poses.keypoints.copy()
    keypoints[:, HEAD_POINTS, :2] = head(roll=roll)
    open_eyes = PoseSequence(keypoints, CANVAS, 25.0)
    closed = blink(open_eyes, slice(10, 16)).keypoints
    for lids in (RIGHT_LIDS, LEFT_LIDS):
        corner, upper, upper_inner, inner, lower_inner, lower = range(lids.start, lids.stop)
        assert np.array_equal(closed[:, [corner, inner]], keypoints[:, [corner, inner]])
        gaps = np.linalg.norm(closed[:, [upper, upper_inner], :2] - closed[:, [lower, lower_inner], :2], axis=2)
        assert (np.diff(gaps[9:13], axis=0) < 1e-4).all() and (np.diff(gaps[13:17], axis=0) > -1e-4).all()
        assert gaps[12:14].max() < 1e-3 < gaps[10].min() < gaps[9].min()
        way = closed[12, [upper, lower], :2] - keypoints[12, [upper, lower], :2]
        assert np.linalg.norm(way[0]) > 4 * np.linalg.norm(way[1])  # it is the upper lid that falls


def test_an_eye_that_is_not_seen_does_not_hinder_the_other(poses: PoseSequence) -> None:
    keypoints = poses.keypoints.copy()
    keypoints[:, LEFT_LIDS.start + 2] = 0
    edited = blink(PoseSequence(keypoints, CANVAS), slice(3, 9)).keypoints
    assert np.array_equal(edited[:, LEFT_LIDS], keypoints[:, LEFT_LIDS])
    assert not np.array_equal(edited[:, RIGHT_LIDS], keypoints[:, RIGHT_LIDS])


@pytest.mark.parametrize("yaw", [-25, 0, 15])
@pytest.mark.parametrize("degrees", [-35, -10, 20, 40])
@pytest.mark.parametrize("roll", [0.0, 0.4])
@pytest.mark.parametrize("width", [0.9, 1.1])
def test_turns_are_those_of_a_head_in_three_dimensions(
    somebody: np.ndarray, yaw: float, degrees: float, roll: float, width: float
) -> None:
    before, after = (head(np.radians(angle), roll, width) for angle in (yaw, yaw + degrees))
    keypoints = somebody.copy()
    keypoints[HEAD_POINTS, :2] = before
    turned = turn_head(PoseSequence(keypoints[np.newaxis], CANVAS), slice(None), degrees).keypoints[0, FRONT, :2]
    front = [HEAD_POINTS.index(point) for point in FRONT]
    # Both turn about axes of their own, so the heads are laid onto each other.
    error, change = (
        (points - points.mean(axis=0)) - (after[front] - after[front].mean(axis=0))
        for points in (turned, before[front])
    )
    rms_error, rms_change = (float(np.sqrt((difference**2).sum(axis=1).mean())) for difference in (error, change))
    assert rms_error < 0.2 * rms_change


def test_the_depths_are_those_of_the_drawn_head() -> None:
    angle, level = np.radians(1.0), head() - (256, 0)
    turned = head(angle) - (256, 0)
    half_width = np.ptp(level[5:22, 0]) / 2
    depth = (turned[:, 0] - level[:, 0] * np.cos(angle)) / np.sin(angle) / half_width
    assert np.abs(edit._DEPTHS - depth).max() < 0.01
    corners = np.abs(level[[HEAD_POINTS.index(point) for point in edit._CORNERS], 0])
    assert np.allclose(corners / half_width, edit._CORNER_OFFSET, atol=0.01)


@pytest.mark.parametrize(
    ("yaw", "degrees", "hidden"),
    [(0, 15, []), (0, 25, [17]), (0, -25, [16]), (30, -20, []), (25, 0, []), (-15, -10, [16])],
)
def test_a_turned_head_hides_its_far_ear(somebody: np.ndarray, yaw: float, degrees: float, hidden: list[int]) -> None:
    keypoints = somebody.copy()
    keypoints[HEAD_POINTS, :2] = head(np.radians(yaw))
    turned = turn_head(PoseSequence(keypoints[np.newaxis], CANVAS), slice(None), degrees).keypoints[0]
    assert np.flatnonzero(turned[:, 2] == 0).tolist() == hidden
    assert not turned[hidden].any()


@pytest.mark.parametrize("degrees", [0, 0.0, -0.0])
def test_no_turn_is_none(poses: PoseSequence, degrees: float) -> None:
    assert np.array_equal(turn_head(poses, slice(None), degrees).keypoints, poses.keypoints)


def test_the_nose_goes_where_it_is_told(poses: PoseSequence) -> None:
    left, right = (turn_head(poses, slice(10, 20), degrees).keypoints[15, 0, 0] for degrees in (-20, 20))
    assert left < poses.keypoints[15, 0, 0] - 5 and right > poses.keypoints[15, 0, 0] + 5


def test_a_profile_stays_finite(somebody: np.ndarray) -> None:
    keypoints = somebody.copy()
    keypoints[FACE, 0] = 256 + np.random.default_rng(0).uniform(-1e-4, 1e-4, 68)
    turned = turn_head(PoseSequence(keypoints[np.newaxis], CANVAS), slice(None), 60)
    assert np.abs(turned.keypoints - keypoints).max() < 100


@pytest.mark.parametrize(("side", "elbow", "wrist", "hand"), [("left", 6, 7, LEFT_HAND), ("right", 3, 4, RIGHT_HAND)])
def test_a_wave_swings_an_upright_forearm(
    poses: PoseSequence, side: edit.Side, elbow: int, wrist: int, hand: slice
) -> None:
    keypoints = np.concatenate([poses.keypoints] * 3)
    keypoints[:, wrist, :2] = keypoints[:, elbow, :2] + (3, 75)  # they hang, one a little inwards
    edited = wave(PoseSequence(keypoints, CANVAS, 25.0), slice(5, 85), side).keypoints
    forearm = edited[:, wrist, :2] - edited[:, elbow, :2]
    assert np.allclose(np.linalg.norm(forearm, axis=1), np.hypot(3, 75), atol=1e-3)
    degrees = np.degrees(np.arctan2(forearm[:, 0], -forearm[:, 1]))
    assert degrees[33:57].max() == pytest.approx(25, abs=2) and degrees[33:57].min() == pytest.approx(-25, abs=2)
    outwards = forearm[8:20, 0] * (1 if side == "left" else -1)
    assert (outwards > 0).all()  # not before the belly
    arm = [elbow, wrist, *range(hand.start, hand.stop)]
    distances = [np.linalg.norm(frames[:, arm, None, :2] - frames[:, None, arm, :2], axis=-1)
                 for frames in (keypoints, edited)]  # fmt: skip
    assert np.allclose(*distances, atol=1e-3)


@pytest.mark.parametrize(("fps", "swings"), [(25.0, 6), (50.0, 3), (None, 6)])
def test_a_wave_keeps_time(somebody: np.ndarray, fps: float | None, swings: int) -> None:
    keypoints = np.stack([somebody] * 100)
    keypoints[:, 7, :2] = keypoints[:, 6, :2] + (0, -70)
    wrist = wave(PoseSequence(keypoints, CANVAS, fps), slice(None), "left").keypoints[:, 7, 0] - keypoints[:, 6, 0]
    assert np.count_nonzero((wrist[:-1] <= 0) & (wrist[1:] > 0)) + (wrist[0] > 0) == swings


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("frames", [slice(20, 31), slice(30, None), slice(5, 5), slice(-3, None), slice(0, 9, 2)])
def test_frames_that_are_not_there_are_refused(poses: PoseSequence, name: str, frames: slice) -> None:
    with pytest.raises(PoseError, match=f"there are 30 poses, and {range_text(frames)} is not within them"):
        EDITS[name](poses, frames)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("blink", [RIGHT_LIDS.start, LEFT_LIDS.stop - 1], "show no eye with all its lids"),
        ("turn", [FACE.start + 30], "show no face with both eyes, nose and chin"),
        ("left", [6], "show no left elbow with the wrist"),
        ("right", [4], "show no right elbow with the wrist"),
    ],
)
def test_parts_that_are_not_there_are_named(poses: PoseSequence, name: str, missing: list[int], message: str) -> None:
    keypoints = poses.keypoints.copy()
    keypoints[:, missing, 2] = 0.1
    with pytest.raises(PoseError, match=f"frames 4:12 {message}"):
        EDITS[name](PoseSequence(keypoints, CANVAS), slice(4, 12))
    keypoints[8, missing, 2] = 1  # one frame shows it: that one is edited
    changed = (EDITS[name](PoseSequence(keypoints, CANVAS), slice(4, 12)).keypoints != keypoints).any(axis=(1, 2))
    assert np.flatnonzero(changed).tolist() == [8]


@pytest.mark.parametrize("name", EDITS)
def test_frames_without_anybody_are_refused(poses: PoseSequence, name: str) -> None:
    keypoints = poses.keypoints.copy()
    keypoints[4:12] = 0
    with pytest.raises(PoseError, match="frames 4:12 show no person"):
        EDITS[name](PoseSequence(keypoints, CANVAS), slice(4, 12))


@pytest.mark.parametrize("degrees", [61, -90, float("nan"), float("inf")])
def test_turns_that_would_hide_the_face_are_refused(poses: PoseSequence, degrees: float) -> None:
    with pytest.raises(PoseError, match="a turn of") as caught:
        turn_head(poses, slice(None), degrees)
    assert caught.value.hint == "give -60 to 60"


def test_other_sides_are_refused(poses: PoseSequence) -> None:
    with pytest.raises(PoseError, match="no side 'both'"):
        wave(poses, slice(None), "both")  # type: ignore[arg-type]


def test_edits_can_follow_one_another(poses: PoseSequence) -> None:
    edited = wave(blink(turn_head(poses, slice(2, 20), 20), slice(5, 11)), slice(12, 29), "left")
    assert np.array_equal(edited.keypoints[[0, 1, 29]], poses.keypoints[[0, 1, 29]])
    assert np.array_equal(edited.keypoints[:, BODY.start + 8], poses.keypoints[:, BODY.start + 8])
