"""Insertion of the reference pose before the targets."""

from __future__ import annotations

import numpy as np
import pytest

from posecrafter_rt.errors import PoseError
from posecrafter_rt.method import insert_reference


def test_puts_the_reference_first_and_leaves_the_rest(make_poses):
    target = make_poses(0, 4)
    pose = make_poses(1, 1).keypoints[0]
    inserted = insert_reference(pose, target)
    assert len(inserted) == 5 and inserted.canvas == target.canvas and inserted.fps == target.fps
    np.testing.assert_array_equal(inserted.keypoints[0], pose)
    np.testing.assert_array_equal(inserted.keypoints[1:], target.keypoints)
    assert len(target) == 4


@pytest.mark.parametrize("shape", [(1, 134, 3), (133, 3), (134, 2)])
def test_refuses_what_is_not_one_pose(make_poses, shape):
    with pytest.raises(PoseError, match="reference pose"):
        insert_reference(np.zeros(shape), make_poses(0, 2))
