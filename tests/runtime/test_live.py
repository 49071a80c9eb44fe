"""What a stream makes of its poses: a person lost and found, still, or suddenly elsewhere; with a clock of the test's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import BODY, CONFIDENCE_THRESHOLD
from posecrafter_rt.runtime.live import LiveOptions, PoseFollower, ease, mean_distance

CANVAS = (30, 40)  # its diagonal is 50


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pose_at(x: float, y: float = 10.0) -> np.ndarray:
    """A person all of whose keypoints lie around a place."""
    offsets = np.random.default_rng(0).uniform(-3, 3, (134, 2))
    return np.concatenate([offsets + (x, y), np.ones((134, 1))], axis=1).astype(np.float32)


def follower(clock: Clock | None = None, **options: float) -> PoseFollower:
    return PoseFollower(pose_at(20), CANVAS, LiveOptions(**options), clock or Clock())  # type: ignore[arg-type]


NOBODY = np.zeros((134, 3), np.float32)


@pytest.mark.parametrize("nobody", [None, NOBODY])
def test_a_lost_person_is_held_then_eased_to_the_reference(nobody: np.ndarray | None) -> None:
    clock = Clock()
    poses = follower(clock, hold_s=1, ease_s=2, still=0)
    poses.next(pose_at(10))
    clock.now += 0.9
    held = poses.next(nobody)
    assert held.held and np.array_equal(held.pose, pose_at(10))
    clock.now += 1.1  # half-way
    assert poses.next(nobody).pose[0, 0] == pytest.approx((pose_at(10)[0, 0] + pose_at(20)[0, 0]) / 2, abs=1e-4)
    clock.now += 1
    np.testing.assert_allclose(poses.next(nobody).pose, pose_at(20), atol=1e-5)
    found = poses.next(pose_at(11))
    assert not found.held and np.array_equal(found.pose, pose_at(11))


def test_masked_keypoints_are_not_seen() -> None:
    masked = np.ma.array(pose_at(10))
    masked[5:] = np.ma.masked
    poses = follower()
    live = poses.next(masked)
    assert not live.held and np.array_equal(live.pose[:5], pose_at(10)[:5]) and not live.pose[5:].any()
    masked[:] = np.ma.masked
    assert poses.next(masked).held


def test_nobody_ever_seen_is_the_reference() -> None:
    live = follower().next(None)
    assert live.held and not live.jumped and np.array_equal(live.pose, pose_at(20))


def test_a_still_pose_repeats_but_not_for_ever_and_a_slow_drift_is_seen() -> None:
    poses = follower(still=0.01, max_repeats=3)  # half a pixel
    kinds = [poses.next(pose_at(10)).is_repeat for _ in range(9)]
    assert kinds == [False, True, True, True, False, True, True, True, False]
    drift = [poses.next(pose_at(10 + 0.2 * step)).is_repeat for step in range(1, 7)]
    assert drift == [True, True, False, True, True, False]  # against what was rendered, not what was seen last
    assert not poses.next(np.where(np.arange(134)[:, None] == 5, 0, pose_at(11.2)).astype(np.float32)).is_repeat


def test_every_pose_is_rendered_where_that_is_asked_for() -> None:
    poses = follower(still=0)
    assert not any(poses.next(pose_at(10)).is_repeat for _ in range(3))


def test_a_jump_is_a_long_way_between_two_poses() -> None:
    poses = follower(jump=0.1)  # 5 pixels
    assert [poses.next(pose_at(x)).jumped for x in (10, 14.9, 10, 15.1, 15.1)] == [False, False, False, True, False]
    half = pose_at(15.1)
    half[BODY, 2] = 0  # a pose that shows other keypoints altogether is elsewhere
    other = pose_at(15.1)
    other[BODY.stop :, 2] = 0
    poses.next(half)
    assert poses.next(other).jumped


def test_reset_forgets() -> None:
    poses = follower()
    poses.next(pose_at(10))
    poses.reset()
    live = poses.next(pose_at(30))
    assert not live.jumped and not live.is_repeat
    poses.reset()
    assert np.array_equal(poses.next(None).pose, pose_at(20))


def test_bad_poses_are_refused_and_change_nothing() -> None:
    poses = follower()
    poses.next(pose_at(10))
    above, below = (np.concatenate([pose_at(10)[:, :2], np.full((134, 1), score)], axis=1) for score in (1.02, -0.1))
    for bad, why in ((np.zeros((18, 3)), "shape"), (np.full((134, 3), np.inf), "NaN or infinity"),
                     (above, "not within 0 to 1"), (below, "not within 0 to 1")):  # fmt: skip
        with pytest.raises(PoseError, match=why):
            poses.next(bad)
    assert poses.next(pose_at(10)).is_repeat


@given(share=st.floats(-1, 2), hidden=st.integers(0, 133), only_start=st.booleans())
def test_easing_stays_between_and_keypoints_come_and_go_half_way(share: float, hidden: int, only_start: bool) -> None:
    start, end = pose_at(10), pose_at(20)
    (end if only_start else start)[hidden] = 0
    pose = ease(start, end, share)
    both = np.arange(134) != hidden
    low, high = np.minimum(start, end), np.maximum(start, end)
    assert np.all((pose[both] >= low[both] - 1e-4) & (pose[both] <= high[both] + 1e-4))
    assert (pose[hidden, 2] >= CONFIDENCE_THRESHOLD) == ((share < 0.5) == only_start)
    if share <= 0:
        assert np.array_equal(pose, start)


def test_the_distance_is_the_bodys_where_both_show_one() -> None:
    first, second = pose_at(10), pose_at(13)
    second[BODY.stop :, 0] += 50
    assert mean_distance(first, second) == pytest.approx(3, abs=1e-4)
    second[BODY, 2] = 0
    assert mean_distance(first, second) == pytest.approx(53, abs=1e-4)
    assert mean_distance(first, NOBODY) == np.inf
