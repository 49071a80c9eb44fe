"""The measure of mended stretches, on pictures whose figures are known; and one stretch mended on a tiny engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.runs import moving_person
from bench.stretch import compare, face_psnr, grade, markdown
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine

SIZE = (32, 32)


def test_seams_and_the_change_within_are_told_apart() -> None:
    footage, poses = np.zeros((6, *SIZE, 3), np.uint8), moving_person(6, SIZE)
    row = grade(np.stack([footage[0] + 10, footage[0] + 13]), footage, poses, 2, 4)
    assert row["seam"] == pytest.approx((10 + 13) / 2) and row["inside"] == pytest.approx(3)
    assert grade(footage[2:4], footage, poses, 2, 4) == {"seam": 0, "inside": 0}


def test_what_lies_outside_the_face_does_not_count() -> None:
    truth, poses = np.zeros((2, *SIZE, 3), np.uint8), moving_person(2, SIZE)
    below, within = truth.copy(), truth.copy()
    below[:, 24:], within[:, 8, 16] = 255, 255
    assert face_psnr(below, truth, poses) == float("inf") > face_psnr(within, truth, poses)


def test_a_stretch_is_compared(tiny_base: Path, tmp_path: Path) -> None:
    untrained_checkpoint(str(tiny_base), num_frames=3).save(tmp_path / "tuned.ckpt")
    build_engine(tmp_path / "tuned.ckpt", tmp_path / "tuned.engine", BuildOptions("torch", "fp32"))
    footage = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), np.uint8)
    with Avatar.load(tmp_path / "tuned.engine") as avatar:
        rows = compare(avatar, footage, moving_person(6, SIZE, phase=1.0), 2, 4, "fast")
    assert [set(row) >= {"psnr", "seam"} for row in rows] == [False, True, True, True]
    assert rows[3]["seam"] < rows[2]["seam"]
    text = markdown({"machine": {"processor": "one"}, "engine": "torch fp32", "preset": "fast", "rows": rows})
    assert "| 2:4, the truth |  |  |  |" in text and "| 2:4, rendered |" in text
