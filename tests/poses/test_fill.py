"""Gaps of a few frames: filled on the straight way, longer ones and the ends left."""

from __future__ import annotations

import numpy as np

from posecrafter_rt.poses.fill import fill_gaps
from posecrafter_rt.poses.keypoints import PoseSequence


def sequence(frames: int = 12) -> PoseSequence:
    """Points that move two pixels a frame to the right, with confidences of their own."""
    generator = np.random.default_rng(0)
    keypoints = np.repeat(generator.uniform(10, 50, (1, 134, 3)), frames, axis=0)
    keypoints[..., 0] += 2 * np.arange(frames)[:, np.newaxis]
    keypoints[..., 2] = generator.uniform(0.3, 1, (frames, 134))
    return PoseSequence(keypoints.astype(np.float32), (100, 100), 25.0)


def without(poses: PoseSequence, *gaps: tuple[slice, int | slice]) -> PoseSequence:
    keypoints = poses.keypoints.copy()
    for frames, points in gaps:
        keypoints[frames, points] = 0
    return PoseSequence(keypoints, poses.canvas, poses.fps)


def test_a_short_gap_is_filled_on_the_straight_way() -> None:
    whole = sequence()
    given = without(whole, (slice(4, 6), slice(None)), (slice(8, 9), 7))
    filled = fill_gaps(given, 2).keypoints
    np.testing.assert_allclose(filled[..., :2], whole.keypoints[..., :2], atol=1e-4)
    ends = np.minimum(whole.keypoints[3, :, 2], whole.keypoints[6, :, 2])
    assert np.array_equal(filled[4, :, 2], ends) and np.array_equal(filled[5, :, 2], ends)
    there = given.keypoints[..., 2] > 0
    assert np.array_equal(filled[there], given.keypoints[there])


def test_longer_gaps_and_the_ends_stay() -> None:
    given = without(sequence(), (slice(0, 1), slice(None)), (slice(3, 6), 5), (slice(10, 12), 9))
    assert np.array_equal(fill_gaps(given, 2).keypoints, given.keypoints)
    assert (fill_gaps(given, 3).keypoints[3:6, 5, 2] > 0).all()


def test_a_point_that_is_never_seen_and_one_that_is_seen_once_stay() -> None:
    given = without(sequence(), (slice(None), 3), (slice(1, None), 4))
    assert np.array_equal(fill_gaps(given, 100).keypoints, given.keypoints)


def test_points_too_faint_to_be_drawn_are_missing() -> None:
    keypoints = sequence(7).keypoints.copy()
    keypoints[3, 4] = [300, 10, 0.12]
    keypoints[0, 5, 2] = keypoints[2, 5, 2] = 0.29  # one before the first that is seen, one after it
    filled = fill_gaps(PoseSequence(keypoints, (100, 100)), 5).keypoints
    np.testing.assert_allclose(filled[3, 4], [*keypoints[2:5:2, 4, :2].mean(axis=0), keypoints[2:5:2, 4, 2].min()])
    assert np.array_equal(filled[0], keypoints[0])
    assert filled[2, 5, 2] == min(keypoints[1, 5, 2], keypoints[3, 5, 2])
