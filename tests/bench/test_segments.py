"""The price of segments: measured where the seams are, against the joint render. No number is judged but known ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.runs import moving_person
from bench.segments import compare, jumps, markdown, seam_frames
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.runtime.segments import split_clip


def test_seams_are_the_shared_frames_and_their_neighbours() -> None:
    first, second = split_clip(10, 6, 2)
    assert (first.settled, first.stop, second.start) == (4, 6, 4)
    assert seam_frames(10, 6, 2) == [3, 4, 5, 6]
    assert seam_frames(6, 6, 2) == []
    assert seam_frames(10, 5, 0) == [4, 5]


def test_a_jump_shows() -> None:
    rng = np.random.default_rng(0)
    steady = np.cumsum(rng.integers(0, 2, (8, 4, 4, 3)), 0).astype(np.uint8)
    assert jumps(steady, steady, [3, 4, 5]) == pytest.approx(1)
    jumping = steady.copy()
    jumping[4:] += 40
    assert jumps(jumping, steady, [3, 4, 5]) > 5
    assert jumps(jumping, steady, [1, 2]) == pytest.approx(1)


def test_splits_are_compared_with_the_joint_render(tiny_base: Path, tmp_path: Path) -> None:
    untrained_checkpoint(str(tiny_base), num_frames=3).save(tmp_path / "tuned.ckpt")
    build_engine(tmp_path / "tuned.ckpt", tmp_path / "tuned.engine", BuildOptions("torch", "fp32"))
    truth = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    with Avatar.load(tmp_path / "tuned.engine") as avatar:
        rows = compare(avatar, moving_person(10, (32, 32), phase=1.0), truth, 2, ((6, 2), (12, 4)))
    joint, split, whole = rows
    assert (joint["num_segments"], split["num_segments"], whole["num_segments"]) == (1, 2, 1)
    assert 10 < split["psnr_to_exact"] < 60 and split["time_ratio"] > 0
    assert whole["psnr_to_exact"] is None  # a clip that fits is the joint render
    document = {"machine": {"processor": "one"}, "engine": "torch fp32", "steps": 2, "num_frames": 10, "rows": rows}
    text = markdown(document)
    assert "| 6, 2 shared | 2 |" in text and "| 12, 4 shared | 1 | same |" in text
