"""Tests of what has to show the person.

Tests; no layer.
"""

from __future__ import annotations

import numpy as np
import pytest

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.poses.shown import abridged, shown_poses


def lacking(*frames: int) -> PoseSequence:
    keypoints = np.ones((20, 134, 3), np.float32)
    keypoints[list(frames)] = 0
    return PoseSequence(keypoints, (32, 32))


def test_what_a_range_leaves_out_need_not_show_the_person() -> None:
    poses = lacking(5)
    for window in (slice(None, 5), slice(6, None), slice(-3, None), slice(0, None, 2)):
        np.testing.assert_array_equal(shown_poses(poses, window, "me.json").keypoints, poses.keypoints[window])


@pytest.mark.parametrize(
    ("window", "named"),
    [(slice(None), "3 of 20 frames: 5, 17, 19"), (slice(-3, None), "2 of 3 frames: 17, 19"),
     (slice(5, 20, 2), "3 of 8 frames: 5, 17, 19"), (slice(5, 6), "1 of 1 frames: 5")],
)  # fmt: skip
def test_frames_that_lack_the_person_go_by_their_numbers_in_the_file(window: slice, named: str) -> None:
    with pytest.raises(PoseError, match=f"me.json does not show the person in {named}$"):
        shown_poses(lacking(5, 17, 19), window, "me.json")


def test_a_range_beyond_the_end_holds_none() -> None:
    with pytest.raises(PoseError, match="me.json has 20 poses, and 20:30 holds none of them"):
        shown_poses(lacking(), slice(20, 30), "me.json")


def test_long_lists_are_abridged() -> None:
    assert abridged([3, 4]) == "3, 4" and abridged(range(11)).endswith(", 9, ...")
