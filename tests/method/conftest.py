"""Poses for the tests of the method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from posecrafter_rt.poses.keypoints import PoseSequence


@pytest.fixture
def make_poses() -> Callable[..., PoseSequence]:
    """Random poses: make_poses(seed, frames, canvas=(height, width), missing=share of keypoints that are absent)."""

    def make(seed: int, frames: int, canvas: tuple[int, int] = (96, 128), missing: float = 0.0) -> PoseSequence:
        random = np.random.default_rng(seed)
        keypoints = np.empty((frames, 134, 3), dtype=np.float32)
        keypoints[..., 0] = random.uniform(0, canvas[1] - 1, (frames, 134))
        keypoints[..., 1] = random.uniform(0, canvas[0] - 1, (frames, 134))
        keypoints[..., 2] = np.where(random.uniform(size=(frames, 134)) < missing, 0.0, 0.9)
        return PoseSequence(keypoints, canvas, 25.0)

    return make
