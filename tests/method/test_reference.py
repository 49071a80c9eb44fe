"""Reference selection (Eq. 5), the medoid and the similarity of pose sequences (Eq. 21)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseError
from posecrafter_rt.method import (
    check_shared_keypoints,
    medoid_reference,
    pose_distances,
    select_reference,
    video_sim,
)
from posecrafter_rt.poses.keypoints import PoseSequence

seeds = st.integers(0, 2**32 - 1)
with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def distance_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    both = (a[:, 2] >= 0.3) & (b[:, 2] >= 0.3)
    if not both.any():
        return np.inf
    squares = ((a[both, :2].astype(float) - b[both, :2].astype(float)) ** 2).sum()
    return float(np.sqrt(squares * 134 / both.sum()))


@with_fixture
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.0, 0.4, 0.97]))
def test_distances_follow_the_definition(make_poses, seed, trains, targets, missing):
    train, target = make_poses(seed, trains, missing=missing), make_poses(seed + 1, targets, missing=missing)
    expected = [[distance_by_definition(a, b) for b in target] for a in train]
    np.testing.assert_allclose(pose_distances(train, target), expected, rtol=1e-9)


@with_fixture
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_takes_the_smallest_sum_of_distances(make_poses, seed, trains, targets):
    train, target = make_poses(seed, trains), make_poses(seed + 1, targets)
    sums = [sum(distance_by_definition(a, b) for b in target) for a in train]
    assert select_reference(train, target) == int(np.argmin(sums))


@with_fixture
@given(seeds, st.integers(2, 7), st.randoms())
def test_follows_a_reordering_of_the_training_frames(make_poses, seed, trains, random):
    train, target = make_poses(seed, trains, missing=0.2), make_poses(seed + 1, 4, missing=0.2)
    order = list(range(trains))
    random.shuffle(order)
    shuffled = PoseSequence(train.keypoints[order], train.canvas)
    assert order[select_reference(shuffled, target)] == select_reference(train, target)


@with_fixture
@given(seeds, st.integers(1, 6), st.randoms())
def test_does_not_depend_on_the_order_of_targets(make_poses, seed, targets, random):
    train, target = make_poses(seed, 5), make_poses(seed + 1, targets)
    order = list(range(targets))
    random.shuffle(order)
    assert select_reference(train, PoseSequence(target.keypoints[order], target.canvas)) == select_reference(
        train, target
    )


@with_fixture
@given(seeds, st.sampled_from([(48, 64), (96, 128), (480, 640), (1080, 1440)]))
def test_does_not_depend_on_the_targets_canvas(make_poses, seed, canvas):
    train, target = make_poses(seed, 5, missing=0.1), make_poses(seed + 1, 3, missing=0.1)
    assert select_reference(train, target.resized(*canvas)) == select_reference(train, target)
    np.testing.assert_allclose(pose_distances(train, target.resized(*canvas)), pose_distances(train, target), rtol=1e-3)


def test_a_training_pose_among_the_targets_is_found(make_poses):
    train = make_poses(3, 20)
    assert [select_reference(train, train[i]) for i in range(20)] == list(range(20))
    assert pose_distances(train, train[7])[7, 0] == 0


def test_the_first_of_equals_is_taken(make_poses):
    train = make_poses(3, 1)
    assert select_reference(PoseSequence(np.repeat(train.keypoints, 3, axis=0), train.canvas), make_poses(4, 5)) == 0


def test_values_of_missing_keypoints_do_not_count(make_poses):
    train, target = make_poses(0, 3), make_poses(1, 2)
    low = target.keypoints.copy()
    low[:, 5:, 2] = 0.29
    moved = low.copy()
    moved[:, 5:, :2] += 40
    np.testing.assert_array_equal(
        pose_distances(train, PoseSequence(low, target.canvas)),
        pose_distances(train, PoseSequence(moved, target.canvas)),
    )


def test_missing_keypoints_scale_to_the_full_count():
    pose = np.zeros((1, 134, 3))
    pose[..., 2] = 1
    moved = pose + [3, 4, 0]
    full = pose_distances(PoseSequence(pose, (64, 64)), PoseSequence(moved, (64, 64)))
    moved[:, 10:, 2] = 0
    part = pose_distances(PoseSequence(pose, (64, 64)), PoseSequence(moved, (64, 64)))
    np.testing.assert_allclose(full, 5 * np.sqrt(134))
    np.testing.assert_allclose(part, full)


def test_names_the_target_frame_that_shares_no_keypoint(make_poses):
    train = make_poses(0, 3)
    target = make_poses(1, 4).keypoints.copy()
    target[2, :, 2] = 0.1
    poses = PoseSequence(target, train.canvas)
    for function in (select_reference, video_sim):
        with pytest.raises(PoseError, match="target frame 2 shares no keypoint with any of the 3") as caught:
            function(train, poses)
        assert caught.value.hint
    with pytest.raises(PoseError, match="target frame 102 shares no keypoint with any of the 3"):
        check_shared_keypoints(train, poses, first=100)


def test_an_empty_training_pose_is_never_taken(make_poses):
    train = make_poses(0, 2).keypoints.copy()
    train[0, :, 2] = 0
    assert select_reference(PoseSequence(train, (96, 128)), make_poses(1, 3)) == 1


def test_a_pair_without_shared_keypoints_counts_as_far(make_poses):
    train = make_poses(0, 2).keypoints.copy()
    target = train[[0, 0]].copy()
    train[0, 50:, 2] = 0  # equal to target 0, but shares nothing with target 1
    target[1, :50, 2] = 0
    assert select_reference(PoseSequence(train, (96, 128)), PoseSequence(target, (96, 128))) == 1


def test_the_medoid_is_the_central_pose(make_poses):
    base = make_poses(0, 1).keypoints[0]
    shifts = [-9, 4, 0, -3, 11]
    train = PoseSequence(np.stack([base + np.float32([shift, 0, 0]) for shift in shifts]), (96, 128))
    assert medoid_reference(train) == 2


def test_the_medoid_passes_over_empty_frames(make_poses):
    train = make_poses(0, 4).keypoints.copy()
    train[0, :, 2] = 0
    with_empty, without = PoseSequence(train, (96, 128)), PoseSequence(train[1:], (96, 128))
    assert medoid_reference(with_empty) == medoid_reference(without) + 1
    train[..., 2] = 0.2
    with pytest.raises(PoseError, match="none of the 4 training poses"):
        medoid_reference(PoseSequence(train, (96, 128)))


def test_similarity_of_a_video_with_its_own_poses_is_one(make_poses):
    train = make_poses(0, 6)
    assert video_sim(train, train[2:4]) == 1.0


@with_fixture
@given(seeds, st.floats(1, 20))
def test_similarity_falls_with_the_displacement(make_poses, seed, step):
    train = make_poses(seed, 1)
    near, far = (PoseSequence(train.keypoints + np.float32([by, 0, 0]), train.canvas) for by in (step, 2 * step))
    assert video_sim(train, near) > video_sim(train, far)
    np.testing.assert_allclose(1 - video_sim(train, near), step / np.hypot(96, 128), rtol=1e-4)


@with_fixture
@given(seeds)
def test_similarity_never_falls_with_more_training_frames(make_poses, seed):
    train, target = make_poses(seed, 6), make_poses(seed + 1, 4)
    assert video_sim(train, target) >= video_sim(train[:3], target)


def test_similarity_does_not_depend_on_the_resolution(make_poses):
    train, target = make_poses(0, 4), make_poses(1, 3)
    larger = video_sim(train.resized(960, 1280), target)
    np.testing.assert_allclose(larger, video_sim(train, target), atol=1e-6)
