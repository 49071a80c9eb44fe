"""Tests of the pose pictures, with a golden one.

Tests; no layer.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.draw import draw_pose, draw_poses
from posecrafter_rt.poses.keypoints import BODY, FACE, FEET, LEFT_HAND, RIGHT_HAND, PoseSequence

GOLDEN = Path(__file__).parent / "golden" / "person_512.png"


def only(person: np.ndarray, *indices: int) -> np.ndarray:
    alone = np.zeros_like(person)
    alone[list(indices)] = person[list(indices)]
    return alone


def test_the_golden_picture(person: np.ndarray) -> None:
    picture = draw_pose(person, (512, 512))
    golden = cv2.cvtColor(cv2.imread(str(GOLDEN)), cv2.COLOR_BGR2RGB)
    assert picture.shape == golden.shape
    # OpenCV's versions rasterise a few edge pixels differently.
    differs = (picture != golden).any(axis=-1)
    assert differs.sum() <= 0.02 * (golden > 0).any(axis=-1).sum()


def test_picture_format(person: np.ndarray) -> None:
    for size in [(512, 512), (128, 160), (31, 97), (1, 1), (600, 520)]:
        picture = draw_pose(person, (512, 512), size)
        assert picture.shape == (*size, 3)
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous


@pytest.mark.parametrize(("height", "width", "multiple"), [(128, 160, 4), (100, 90, 6), (511, 600, 2)])
def test_small_pictures_are_averages_of_large_ones(person: np.ndarray, height: int, width: int, multiple: int) -> None:
    small = draw_pose(person, (512, 512), (height, width))
    large = draw_pose(person, (512, 512), (height * multiple, width * multiple))
    means = large.reshape(height, multiple, width, multiple, 3).mean(axis=(1, 3))
    assert np.abs(small - means).max() <= 1


def test_small_pictures_keep_sub_pixel_moves(person: np.ndarray) -> None:
    moved = person + np.array([0.3 * 512 / 128, 0, 0], np.float32)
    assert (draw_pose(person, (512, 512), (128, 128)) != draw_pose(moved, (512, 512), (128, 128))).any()


def test_colours_of_joints_limbs_hands_and_face(person: np.ndarray) -> None:
    picture = draw_pose(person, (512, 512))
    assert picture[160, 200].tolist() == [255, 170, 0]  # right shoulder
    assert picture[100, 296].tolist() == [255, 255, 255]  # a face point
    tip = person[LEFT_HAND][20, :2].astype(int)
    assert picture[tip[1], tip[0]].tolist() == [0, 0, 255]


def test_a_limb_needs_both_ends_and_is_dimmed(person: np.ndarray) -> None:
    both = draw_pose(only(person, 2, 3), (512, 512))
    middle = (195, 185)
    assert both[middle].tolist() == [153, 102, 0]
    assert not draw_pose(only(person, 2), (512, 512))[middle].any()


def test_points_below_the_threshold_are_not_drawn(person: np.ndarray) -> None:
    person[:, 2] = 0.29
    assert not draw_pose(person, (512, 512)).any()
    assert draw_pose(person, (512, 512), threshold=0.25).any()
    assert not draw_pose(np.zeros_like(person), (512, 512), threshold=0.0).any()


def test_feet_are_not_drawn(person: np.ndarray) -> None:
    assert not draw_pose(only(person, *range(FEET.start, FEET.stop)), (512, 512)).any()


@pytest.mark.parametrize("part", [BODY, FACE, LEFT_HAND, RIGHT_HAND])
def test_every_other_part_is_drawn(person: np.ndarray, part: slice) -> None:
    assert draw_pose(only(person, *range(part.start, part.stop)), (512, 512)).any()


def test_a_part_at_the_picture_edge_is_drawn_whole_pixels_in(person: np.ndarray) -> None:
    alone = only(person, 0)
    alone[0, :2] = 0
    picture = draw_pose(alone, (512, 512))
    assert picture[0, 0].tolist() == [255, 0, 0]


def test_points_far_outside_do_no_harm(person: np.ndarray) -> None:
    person[::2, :2] = 1e30
    person[::3, :2] = -1e30
    assert draw_pose(person, (512, 512), (64, 64)).shape == (64, 64, 3)


def test_a_sequence_is_drawn_frame_by_frame(person: np.ndarray) -> None:
    moved = person + np.array([10, 5, 0], np.float32)
    poses = PoseSequence(np.stack([person, moved]), (512, 512))
    pictures = draw_poses(poses, (64, 80))
    assert pictures.shape == (2, 64, 80, 3)
    assert np.array_equal(pictures[1], draw_pose(moved, (512, 512), (64, 80)))
    assert draw_poses(poses).shape == (2, 512, 512, 3)


def test_refusals(person: np.ndarray) -> None:
    with pytest.raises(PoseError, match=r"\(133, 3\)"):
        draw_pose(person[1:], (512, 512))
    with pytest.raises(PoseError, match="0 x 5"):
        draw_pose(person, (512, 512), (0, 5))
    person[3, 1] = np.nan
    with pytest.raises(PoseError, match="NaN"):
        draw_pose(person, (512, 512))


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (30_000, 30_000)])
def test_a_picture_that_opencv_would_crash_on_is_refused(person: np.ndarray, size: tuple[int, int]) -> None:
    with pytest.raises(PoseError, match=f"cannot draw a pose at {size[0]} x {size[1]} pixels"):
        draw_pose(person, (512, 512), size)
