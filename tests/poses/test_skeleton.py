"""The tree of joints, bone lengths, and the head's own axes.

Tests; no layer.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import posecrafter_rt
from posecrafter_rt.poses.keypoints import FACE, FEET, NUM_KEYPOINTS, keypoint_name
from posecrafter_rt.poses.skeleton import HEAD, JOINTS, PARENTS, bone_lengths, fill_between, head_axes


@pytest.mark.parametrize(
    ("joint", "parent"),
    [
        ("right wrist", "right elbow"),
        ("left ankle", "left knee"),
        ("right ear", "right eye"),
        ("left heel", "left ankle"),
        ("right small toe", "right ankle"),
        ("face 30", "nose"),
        ("left hand 0", "left wrist"),
        ("right hand 5", "right hand 0"),
        ("right hand 8", "right hand 7"),
    ],
)
def test_what_hangs_on_what(joint: str, parent: str) -> None:
    names = [keypoint_name(index) for index in range(NUM_KEYPOINTS)]
    assert names[PARENTS[names.index(joint)]] == parent


def test_the_tree_has_one_root_and_joints_come_after_their_parents() -> None:
    assert len(PARENTS) == NUM_KEYPOINTS and [index for index, parent in enumerate(PARENTS) if parent < 0] == [1]
    assert sorted([*JOINTS, *HEAD]) == list(range(FEET.stop))
    for place, joint in enumerate(JOINTS[1:], start=1):
        assert PARENTS[joint] in JOINTS[:place]


def test_the_page_drags_the_same_bones() -> None:
    source = Path(posecrafter_rt.__file__).parent / "serve" / "web" / "src" / "kinematics.ts"
    listed = re.search(r"return \[([-\d, ]+)\]\[index\]", source.read_text(encoding="utf-8"))
    assert listed is not None
    assert [int(number) for number in listed[1].split(",")] == list(PARENTS[: FEET.start])


def test_bone_lengths_are_medians_of_the_frames_that_show_both_ends(person: np.ndarray) -> None:
    poses = np.stack([person] * 5)
    poses[:, 4, 0] = poses[:, 3, 0]
    poses[:, 4, 1] = poses[:, 3, 1] + [10, 50, 30, 1000, 2000]
    poses[3, 4, 2] = 0.29  # hardly seen: not counted, nor is the next, whose elbow is missing
    poses[4, 3] = 0
    poses[:, 7] = 0
    lengths = bone_lengths(poses)
    assert lengths[4] == pytest.approx(30)
    assert np.isnan(lengths[7]) and np.isnan(lengths[1])
    assert lengths[0] == pytest.approx(60)


@pytest.mark.parametrize("degrees", [0, 25, -80, 180])
def test_the_axes_lean_with_the_head(person: np.ndarray, degrees: float) -> None:
    upright = person.copy()
    upright[FACE, :2] = np.random.default_rng(1).uniform(200, 300, (68, 2))
    upright[FACE.start + 36 : FACE.start + 48, :2] = [[240, 90], [260, 90]] * 6
    upright[FACE.start + 6 : FACE.start + 11, :2] = (250, 150)
    turn = np.radians(degrees)
    tilted = upright.copy()
    tilted[:, :2] = upright[:, :2] @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    across, down = head_axes(tilted[np.newaxis])[0]
    assert np.allclose(across, [np.cos(turn), np.sin(turn)], atol=1e-5)
    assert np.allclose(down, [-np.sin(turn), np.cos(turn)], atol=1e-5)


def test_axes_of_a_hidden_face_lie_between_its_neighbours(person: np.ndarray) -> None:
    poses = np.stack([person] * 3)
    for frame, chin in ((0, (350, 100)), (2, (250, 200))):
        poses[frame, FACE, :2] = (250, 100)
        poses[frame, FACE.start + 6 : FACE.start + 11, :2] = chin
    poses[1, FACE.start + 40] = 0
    axes = head_axes(poses)
    assert np.allclose(axes[:, 1], [(1, 0), (0.5**0.5, 0.5**0.5), (0, 1)])
    assert np.allclose(axes @ axes.swapaxes(1, 2), np.eye(2))
    poses[:, FACE] = 0
    assert np.allclose(head_axes(poses), np.eye(2))


def test_gaps_are_filled_by_lines() -> None:
    values = np.array([[9.0, 9], [1, 10], [9, 9], [3, 20], [9, 9]])
    filled = fill_between(values, np.array([False, True, False, True, False]))
    assert np.allclose(filled, [[1, 10], [1, 10], [2, 15], [3, 20], [3, 20]])
