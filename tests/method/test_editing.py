"""Edit planning: rectangles, maps in latent pixels, and what is reported as skipped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseError, ShapeError
from posecrafter_rt.method import REGIONS, fit_affine, plan_edits
from posecrafter_rt.poses.keypoints import FACE, LEFT_HAND, RIGHT_HAND

CANVAS, FACTOR, LATENT = (96, 128), 8, (12, 16)
seeds = st.integers(0, 2**32 - 1)
with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def plan(reference, targets, regions=("face", "left_hand", "right_hand")):
    return plan_edits(reference, targets, canvas=CANVAS, vae_scale_factor=FACTOR, latent_size=LATENT, regions=regions)


def to_latent(points):
    return (np.asarray(points, dtype=np.float64) + 0.5) / FACTOR - 0.5


@with_fixture
@given(seeds, st.integers(1, 4), st.sampled_from([0.0, 0.5]), st.sampled_from([0, 60]))
def test_rectangles_hold_their_points_and_stay_inside(make_poses, seed, frames, missing, beyond):
    reference = make_poses(seed, 1).keypoints[0]
    targets = make_poses(seed + 1, frames, missing=missing).keypoints.copy()
    targets[..., 0] += beyond  # partly outside the picture
    affines, rects, report = plan(reference, targets)
    assert affines.shape == (frames, 3, 2, 3) and affines.dtype == np.float32
    assert rects.shape == (frames, 3, 4) and rects.dtype == np.int32
    skipped = {(entry.frame, entry.region) for entry in report}
    for frame in range(frames):
        for number, region in enumerate(("face", "left_hand", "right_hand")):
            x0, y0, x1, y1 = rects[frame, number]
            if (frame, region) in skipped:
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
                np.testing.assert_array_equal(affines[frame, number], np.eye(2, 3))
                continue
            assert 0 <= x0 < x1 <= LATENT[1] and 0 <= y0 < y1 <= LATENT[0]
            points = targets[frame][list(REGIONS[region])]
            latent = to_latent(points[points[:, 2] >= 0.3, :2])
            inside = latent[(latent >= 0).all(axis=1) & (latent <= [LATENT[1] - 1, LATENT[0] - 1]).all(axis=1)]
            assert (inside >= [x0, y0]).all() and (inside <= [x1 - 1, y1 - 1]).all()
            # Minimal: without clipping, one row or column less would lose a point.
            low, high = np.floor(latent.min(axis=0)), np.ceil(latent.max(axis=0)) + 1
            assert (x0, y0) == (max(low[0], 0), max(low[1], 0))
            assert (x1, y1) == (min(high[0], LATENT[1]), min(high[1], LATENT[0]))


@with_fixture
@given(seeds, st.floats(0.5, 1.5), st.floats(-1, 1), st.floats(-10, 10))
def test_the_map_carries_reference_landmarks_to_target_landmarks(make_poses, seed, scale, angle, shift):
    reference = make_poses(seed, 1).keypoints[0]
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    target = reference.copy()
    target[:, :2] = (reference[:, :2] - [64, 48]) @ linear.T + [64 + shift, 48]
    affines, _, report = plan(reference, target[np.newaxis])
    assert not [entry for entry in report if "outside" not in entry.reason]
    for number, part in enumerate((FACE, LEFT_HAND, RIGHT_HAND)):
        if report:
            continue
        carried = to_latent(reference[part, :2]) @ affines[0, number, :, :2].T + affines[0, number, :, 2]
        np.testing.assert_allclose(carried, to_latent(target[part, :2]), atol=1e-4)


@with_fixture
@given(seeds)
def test_the_map_is_the_least_squares_fit_in_latent_pixels(make_poses, seed):
    reference, targets = make_poses(seed, 1, missing=0.3).keypoints[0], make_poses(seed + 1, 2, missing=0.3).keypoints
    targets[..., :2] = 0.2 * targets[..., :2] + 0.7 * reference[:, :2]
    affines, _, _ = plan(reference, targets, regions=("face",))
    both = (reference[FACE, 2] >= 0.3) & (targets[0, FACE, 2] >= 0.3)
    expected = fit_affine(to_latent(reference[FACE][both, :2]), to_latent(targets[0, FACE][both, :2]))
    np.testing.assert_allclose(affines[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_equal_poses_give_the_identity(make_poses):
    reference = make_poses(0, 1).keypoints[0]
    affines, rects, report = plan(reference, reference[np.newaxis])
    np.testing.assert_allclose(affines[0], np.tile(np.eye(2, 3), (3, 1, 1)), atol=1e-5)
    assert not report and (rects[..., 2] > rects[..., 0]).all()


def test_pixel_centres_decide_the_rectangle(make_poses):
    reference = make_poses(0, 1).keypoints[0]
    target = reference.copy()
    # Latent pixel u has its centre at picture coordinate 8u + 3.5: points at 2.0 to 5.0 and, in y, 3.25 to 4.5.
    low, high = np.array([8 * 2 + 3.5, 8 * 3.25 + 3.5]), np.array([8 * 5 + 3.5, 8 * 4.5 + 3.5])
    target[LEFT_HAND, :2] = np.random.default_rng(0).uniform(low, high, (21, 2))
    target[LEFT_HAND.start : LEFT_HAND.start + 2, :2] = low, high
    _, rects, _ = plan(reference, target[np.newaxis], regions=("left_hand",))
    assert rects[0, 0].tolist() == [2, 3, 6, 6]


def reasons(reference, target, region="left_hand"):
    affines, rects, report = plan(reference, target[np.newaxis], regions=(region,))
    assert not rects.any()
    np.testing.assert_array_equal(affines[0, 0], np.eye(2, 3))
    assert len(report) == 1 and report[0].frame == 0 and report[0].region == region
    return report[0].reason


@pytest.mark.parametrize("side", ["reference", "target"])
def test_too_few_landmarks_are_reported(make_poses, side):
    poses = {"reference": make_poses(0, 1).keypoints[0], "target": make_poses(1, 1).keypoints[0]}
    poses[side][LEFT_HAND.start + 2 : LEFT_HAND.stop, 2] = 0.29
    assert "2 usable landmarks" in reasons(**poses)


def test_landmarks_on_a_line_are_reported(make_poses):
    reference, target = make_poses(0, 1).keypoints[0], make_poses(1, 1).keypoints[0]
    line = np.outer(np.arange(21), [2, 1]) + 10
    straight = reference.copy()
    straight[LEFT_HAND, :2] = line
    assert "one line" in reasons(straight, target)
    straight = target.copy()
    straight[LEFT_HAND, :2] = line
    assert "singular" in reasons(reference, straight)


def test_a_region_outside_the_picture_is_reported(make_poses):
    reference = make_poses(0, 1).keypoints[0]
    target = reference.copy()
    target[LEFT_HAND, 0] += 1000
    assert "outside" in reasons(reference, target)
    target[LEFT_HAND, 0] -= 2000
    assert "outside" in reasons(reference, target)


def test_every_named_region_can_be_planned(make_poses):
    reference = make_poses(0, 1).keypoints[0]
    targets = np.stack([reference * [0.5, 0.8, 1], reference * [1, 0.7, 1]])
    affines, rects, report = plan(reference, targets, regions=tuple(REGIONS))
    assert affines.shape[1] == rects.shape[1] == len(REGIONS) and not report
    assert all(0 <= i < 134 for indices in REGIONS.values() for i in indices)


def test_unusable_landmarks_have_no_say(make_poses):
    reference, target = make_poses(0, 1).keypoints[0], make_poses(1, 1).keypoints
    target[:, LEFT_HAND.start : LEFT_HAND.start + 5, 2] = 0.1
    moved = target.copy()
    moved[:, LEFT_HAND.start : LEFT_HAND.start + 5, :2] = 5000
    for a, b in zip(plan(reference, target)[:2], plan(reference, moved)[:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_refuses_regions_that_do_not_exist(make_poses):
    reference, targets = make_poses(0, 1).keypoints[0], make_poses(1, 1).keypoints
    with pytest.raises(PoseError, match="'nose'") as caught:
        plan(reference, targets, regions=("face", "nose"))
    assert "left_hand" in caught.value.hint
    with pytest.raises(PoseError, match="twice"):
        plan(reference, targets, regions=("face", "face"))


def test_refuses_shapes_that_do_not_fit(make_poses):
    reference, targets = make_poses(0, 1).keypoints[0], make_poses(1, 1).keypoints
    with pytest.raises(ShapeError, match="keypoints"):
        plan(reference, targets[0])
    with pytest.raises(ShapeError, match="12x16, not 16x12"):
        plan_edits(reference, targets, canvas=CANVAS, vae_scale_factor=FACTOR, latent_size=(16, 12))
