"""Tests of following one person among several.

Tests; no layer.
"""

from __future__ import annotations

import numpy as np
import pytest

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import BODY, FACE, NUM_KEYPOINTS
from posecrafter_rt.poses.tracking import follow_person

NOBODY = np.zeros((0, NUM_KEYPOINTS, 3), np.float32)


def at(person: np.ndarray, x: float, y: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return person * np.array([scale, scale, 1], np.float32) + np.array([x, y, 0], np.float32)


def follow(frames: list[list[np.ndarray]], **options: object) -> np.ndarray:
    stacked = [np.stack(people) if people else NOBODY for people in frames]
    return follow_person(stacked, source="clip", **options)  # type: ignore[arg-type]


def test_the_track_follows_through_reordering_and_growth(person: np.ndarray) -> None:
    # The neighbour grows past the person and the order alternates.
    frames, expected = [], []
    for index in range(20):
        own, other = at(person, 3.0 * index), at(person, 700, scale=0.5 + 0.1 * index)
        frames.append([own, other] if index % 2 else [other, own])
        expected.append(own)
    assert np.allclose(follow(frames), expected)


def test_two_people_walking_past_each_other_keep_their_tracks(person: np.ndarray) -> None:
    left = [at(person, 20.0 * i) for i in range(21)]
    right = [at(person, 400 - 20.0 * i, y=60) for i in range(21)]
    frames = [[a, b] for a, b in zip(left, right, strict=True)]
    assert np.allclose(follow(frames, person=0), left)
    assert np.allclose(follow(frames, person=1), right)


def test_the_track_does_not_jump_to_somebody_else(person: np.ndarray) -> None:
    own, other = at(person, 0), at(person, 900, scale=0.8)
    frames = [[own, other], [other], [own, other]]
    with pytest.raises(PoseError, match=r"clip: frame 1 does not show the person \(1 other there\)") as caught:
        follow(frames)
    assert "cut" not in caught.value.hint and "read_openpose(…, allow_missing=True)" in caught.value.hint
    tracked = follow(frames, allow_missing=True)
    assert not tracked[1].any()
    assert np.allclose(tracked[2], own)


def test_somebody_beside_the_person_is_not_taken_for_them(person: np.ndarray) -> None:
    own, beside = at(person, 300), at(person, 500)  # 395 px tall
    together = [own, beside]
    for frames in (
        [together] * 3 + [[beside]] + [together] * 5,
        [together] * 3 + [[own], [beside], [beside], together],
    ):
        tracked = follow(frames, allow_missing=True)
        there = [any(one is own for one in frame) for frame in frames]
        assert np.allclose(tracked, [own if is_there else 0 * own for is_there in there])
        with pytest.raises(PoseError, match=f"frame {there.index(False)} does not show the person"):
            follow(frames)


@pytest.mark.parametrize("first", [0, 3])
def test_one_person_who_is_found_twice_is_not_lost(person: np.ndarray, first: int) -> None:
    """The second time without legs. Then the person walks on towards where they were found that time."""
    walk = [at(person, 3.0 * index) for index in range(20)]
    again = at(walk[first], 4)
    again[8:14] = 0
    frames = [[one, again] if index == first else [one] for index, one in enumerate(walk)]
    assert np.allclose(follow(frames), walk)


@pytest.mark.parametrize("step", [60, 90])
def test_who_stands_shoulder_to_shoulder_with_the_person_is_somebody_else(person: np.ndarray, step: float) -> None:
    own, beside = at(person, 300), at(person, 300 + step)
    frames = [[own, beside]] * 3 + [[beside]] + [[own, beside]] * 3
    tracked = follow(frames, person=0, allow_missing=True)
    assert np.allclose(tracked, [own] * 3 + [0 * own] + [own] * 3)


def test_who_comes_to_where_the_missing_person_was_is_not_taken_for_them(person: np.ndarray) -> None:
    own, beside = at(person, 300), at(person, 500)
    frames = [[own, beside]] * 3 + [[at(person, x)] for x in (450, 400, 380, 380)]  # 99 px are the same place
    tracked = follow(frames, person=0, allow_missing=True)
    assert np.allclose(tracked, [own] * 3 + [0 * own] * 4)


def test_who_stays_in_the_picture_does_not_become_the_person_that_left(person: np.ndarray) -> None:
    own, other = at(person, 0), at(person, 2000)
    frames = [[own, other]] * 3 + [[other]] * 12 + [[other, own]] * 5
    tracked = follow(frames, person=0, allow_missing=True)
    assert np.allclose(tracked, [own] * 3 + [0 * own] * 12 + [own] * 5)


def test_the_person_may_walk_to_where_another_one_stood(person: np.ndarray) -> None:
    walk = [at(person, 30.0 * index) for index in range(30)]
    frames = [[walk[0], at(person, 450)], *([one] for one in walk[1:])]
    assert np.allclose(follow(frames, person=0), walk)


def test_people_that_move_together_keep_their_tracks(person: np.ndarray) -> None:
    # By more than half of the distance between them, such as before a camera that is turned.
    left = [at(person, 120.0 * index) for index in range(5)]
    frames = [[at(one, 200), one] for one in left]
    assert np.allclose(follow(frames, person=1), left)


def test_the_person_may_be_found_elsewhere_after_a_cut(person: np.ndarray) -> None:
    own, later = at(person, 0), at(person, 2000)
    frames = [[own, at(person, 600)], [own], *[[later]] * 9]
    assert np.allclose(follow(frames, person=0, allow_missing=True)[-1], later)


def test_a_person_alone_may_move_anywhere(person: np.ndarray) -> None:
    frames = [[at(person, 0)], [at(person, 5000)]]
    assert np.allclose(follow(frames)[1], frames[1][0])


def test_a_person_without_any_point_is_nobody(person: np.ndarray) -> None:
    empty = np.zeros_like(person)
    assert np.allclose(follow([[empty, person], [person, empty]], person=0), [person, person])
    with pytest.raises(PoseError, match="no person in any of 2 frames"):
        follow([[empty], []])


def test_the_first_frame_may_be_empty_only_if_allowed(person: np.ndarray) -> None:
    frames = [[], [person]]
    with pytest.raises(PoseError, match="frame 0 does not show the person"):
        follow(frames)
    tracked = follow(frames, allow_missing=True)
    assert not tracked[0].any()
    assert np.allclose(tracked[1], person)


def test_negative_persons_are_refused(person: np.ndarray) -> None:
    with pytest.raises(PoseError, match="person -1 was asked for, but frame 0 has 1"):
        follow([[person]], person=-1)


def test_frames_that_share_no_point_compare_by_their_centres(person: np.ndarray) -> None:
    body, face = person.copy(), person.copy()
    body[BODY.stop :] = 0
    face[: FACE.start] = 0
    face[FACE.stop :] = 0
    other = at(person, 600)
    assert np.allclose(follow([[body, other], [other, face]], person=0)[1], face)


def test_faint_people_are_followed_too(person: np.ndarray) -> None:
    person[:, 2] = 0.1
    assert np.allclose(follow([[person], [at(person, 4)]])[1], at(person, 4))
