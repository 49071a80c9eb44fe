"""Tests of what has to show the person.

Tests; no layer.
"""

from __future__ import annotations

import numpy as np
import pytest

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.poses.shown import abridged, range_text, shown_poses


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


def test_points_below_the_least_confidence_do_not_show_the_person() -> None:
    poses = lacking(5)
    poses.keypoints[7, :, 2], poses.keypoints[8, 1:, 2] = 0.2, 0.2
    with pytest.raises(PoseError, match="1 of 20 frames: 5$") as caught:
        shown_poses(poses, slice(None), "me.json")
    assert caught.value.hint and "0.3" not in caught.value.hint
    with pytest.raises(PoseError, match="2 of 16 frames: 5, 7$") as caught:
        shown_poses(poses, slice(4, None), "me.json", least=0.3)
    assert caught.value.hint and caught.value.hint.endswith("keypoints count from confidence 0.3 on")


@pytest.mark.parametrize("window", [slice(20, 30), slice(20, None), slice(10, 21), slice(None, 21), slice(5, 5)])
def test_a_range_that_is_empty_or_ends_beyond_the_end_is_refused(window: slice) -> None:
    with pytest.raises(PoseError, match=f"me.json has 20 poses, and {range_text(window)} is not within them"):
        shown_poses(lacking(), window, "me.json")


def test_long_lists_are_abridged() -> None:
    assert abridged([3, 4]) == "3, 4" and abridged(range(11)).endswith(", 9, ...")
