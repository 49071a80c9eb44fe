"""The number of tuning steps: the paper's end points, the rebuilt line between, the floor."""

from __future__ import annotations

import pytest

from posecrafter_rt.errors import VideoError
from posecrafter_rt.method import tuning_steps


@pytest.mark.parametrize(
    ("frames", "steps"), [(8, 100), (100, 2000), (32, 596), (1, 1), (3, 1), (4, 17), (16, 265), (200, 4065)]
)
def test_tuning_steps(frames, steps):
    assert tuning_steps(frames) == steps


def test_never_falls():
    steps = [tuning_steps(frames) for frames in range(1, 300)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("frames", [0, -3])
def test_refuses_an_empty_clip(frames):
    with pytest.raises(VideoError, match=str(frames)):
        tuning_steps(frames)
