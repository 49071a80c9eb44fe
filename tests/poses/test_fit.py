"""Fitting a live person to the avatar: what is found back, what is missing, and what the first second settles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.fit import PersonFit, Similarity, fit_person, median_pose
from posecrafter_rt.poses.keypoints import FACE

CANVAS = (480, 640)


def person(seed: int = 0) -> np.ndarray:
    """Everything seen, within 100 × 100 pixels: float32 (134, 3)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(0, 100, (134, 2)), np.ones((134, 1))], 1).astype(np.float32)


@given(st.floats(0.1, 10), st.floats(-500, 500), st.floats(-500, 500))
def test_a_similarity_is_found_back(scale: float, shift_x: float, shift_y: float) -> None:
    reference = person()
    found = fit_person(Similarity(scale, shift_x, shift_y).apply(reference), reference)
    assert found is not None
    assert found.scale == pytest.approx(1 / scale, rel=1e-3)
    assert np.allclose(found.apply(Similarity(scale, shift_x, shift_y).apply(reference)), reference, atol=0.05)


def test_a_tilted_head_is_not_turned_back() -> None:
    reference, live = person(), person()
    angle = np.radians(20)
    live[:, :2] = live[:, :2] @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    found = fit_person(live, reference)
    assert found is not None and found.scale == pytest.approx(1, abs=0.1)  # the face's box does grow
    steps = np.diff(found.apply(live)[:10, :2], axis=0) / np.diff(live[:10, :2], axis=0)
    assert np.allclose(steps, found.scale, rtol=1e-3)  # both axes alike, and neither mixed into the other


def test_a_mirrored_person_is_neither_flipped_nor_shrunk() -> None:
    reference, mirrored = person(), person()
    mirrored[:, 0] = 100 - mirrored[:, 0]
    found = fit_person(mirrored, reference)
    assert found is not None and found.scale == pytest.approx(1)


def test_missing_points_stay_missing_and_do_not_count() -> None:
    reference, live = person(), Similarity(2, 10, 20).apply(person())
    live[[4, 14]] = 0
    live[FACE.start] = (1e4, 1e4, 0.1)  # seen badly: then the face has no box
    found = fit_person(live, reference)
    assert found is not None and found.scale == pytest.approx(0.5, rel=1e-5)
    moved = found.apply(live)
    assert not moved[[4, 14]].any() and np.allclose(moved[5], reference[5], atol=1e-3)


@pytest.mark.parametrize("seen", [[], [2], [3, 4, 6, 7, 100]])
def test_too_little_to_go_by_is_none(seen: list[int]) -> None:
    live = np.zeros((134, 3), np.float32)
    live[seen] = person()[seen]
    assert fit_person(live, person()) is None


def test_points_in_one_place_are_none() -> None:
    live = person()
    live[:, :2] = 7
    assert fit_person(live, person()) is None and fit_person(person(), live) is None


@given(st.integers(1, 9), st.integers(0, 99))
def test_the_median_is_of_the_frames_that_show_a_point(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    poses = np.stack([person(seed + index) for index in range(count)])
    poses[rng.random((count, 134)) < 0.4] = 0
    median = median_pose(poses)
    for point in range(0, 134, 7):
        shown = poses[poses[:, point, 2] > 0, point, :2]
        expected = np.median(shown, axis=0) if len(shown) else (0, 0)
        assert np.allclose(median[point, :2], expected, atol=1e-4)
        assert median[point, 2] == pytest.approx(len(shown) / count)


def test_the_first_second_settles_it() -> None:
    reference = person()
    fit = PersonFit(reference)
    near, far = (Similarity(scale, 50, 60).apply(reference) for scale in (2.0, 4.0))
    first = fit.similarity(near, CANVAS, 10.0)
    assert first is not None and first.scale == pytest.approx(0.5, rel=1e-4)
    for number in range(1, 8):
        assert fit.similarity(near, CANVAS, 10 + number / 10) is not None
    odd = fit.similarity(far, CANVAS, 10.9)  # one jump of the detector: the median does not follow
    assert odd is not None and odd.scale == pytest.approx(0.5, rel=1e-4)
    settled = [fit.similarity(far, CANVAS, 11.0 + number) for number in range(5)]
    assert all(after == settled[0] for after in settled) and settled[0] is not None
    assert settled[0].scale == pytest.approx(0.5, rel=1e-4)


def test_the_second_begins_when_somebody_is_seen() -> None:
    fit = PersonFit(person())
    nobody = np.zeros((134, 3), np.float32)
    assert fit.similarity(nobody, CANVAS, 0.0) is None and fit.similarity(nobody, CANVAS, 5.0) is None
    assert fit.similarity(Similarity(2, 0, 0).apply(person()), CANVAS, 9.0) is not None
    later = fit.similarity(Similarity(3, 0, 0).apply(person()), CANVAS, 9.5)
    assert later is not None and later.scale < 0.49  # it still learns


@pytest.mark.parametrize("poses_per_s", [25, 200])
def test_a_second_that_shows_too_little_is_not_the_last(poses_per_s: int) -> None:
    """Somebody is seen once, then their hands alone for longer than a second, or than the memory of one reaches."""
    fit, hands = PersonFit(person()), person()
    hands[:92] = 0
    live = Similarity(2, 30, 40).apply(person())
    assert fit.similarity(live, CANVAS, 0.0) is not None
    after_s = [number / poses_per_s for number in range(1, 3 * poses_per_s)]
    assert [fit.similarity(hands, CANVAS, now_s) for now_s in after_s][-1] is None
    found = [fit.similarity(live, CANVAS, 3 + number / poses_per_s) for number in range(2 * poses_per_s)]
    assert all(similarity is not None for similarity in found)
    assert found[-1] is not None and found[-1].scale == pytest.approx(0.5, rel=1e-4)
    assert fit.similarity(hands, CANVAS, 9.0) == found[-1]  # settled


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_reset_or_another_camera_begins_anew(is_reset: bool) -> None:
    fit = PersonFit(person())
    for now_s in (0.0, 2.0):
        fit.similarity(Similarity(2, 0, 0).apply(person()), CANVAS, now_s)
    if is_reset:
        fit.reset()
    found = fit.similarity(Similarity(5, 0, 0).apply(person()), CANVAS if is_reset else (720, 1280), 3.0)
    assert found is not None and found.scale == pytest.approx(0.2, rel=1e-4)


def test_a_fast_camera_does_not_fill_the_memory() -> None:
    fit = PersonFit(person())
    for number in range(1000):
        fit.similarity(person(), CANVAS, number / 2000)
    assert len(fit._samples) <= 64


def test_another_shape_is_refused() -> None:
    with pytest.raises(PoseError, match="shape"):
        PersonFit(person()).similarity(np.zeros((18, 3), np.float32), CANVAS, 0.0)
