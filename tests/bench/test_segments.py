"""The price of segments: measured where the seams are, against the joint render. No number is judged but known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.fused import Fused, render_fused, windows
from bench.runs import moving_person
from bench.segments import compare, jumps, markdown, seam_frames
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.runtime.options import RenderOptions
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
    joint, *merged, whole = rows
    assert [row["num_segments"] for row in rows] == [1, 2, 2, 2, 1]
    assert all(10 < row["psnr_to_exact"] < 60 and row["time_ratio"] > 0 for row in merged)
    assert len({row["psnr_to_exact"] for row in merged}) == 3
    assert whole["psnr_to_exact"] is None  # a clip that fits is the joint render
    document = {"machine": {"processor": "one"}, "engine": "torch fp32", "steps": 2, "num_frames": 10, "rows": rows}
    text = markdown(document)
    assert "| 6, 2 shared | once | 2 |" in text and "| 12, 4 shared | once | 1 | same |" in text
    assert (
        "| 6, 2 shared | at every step | 2 |" in text and "| 6, 2 shared | at every step, with key frames | 2 |" in text
    )


@pytest.mark.parametrize("with_key_frames", [False, True])
@pytest.mark.parametrize(("num_frames", "segment", "overlap"), [(10, 6, 2), (74, 16, 4), (23, 9, 3), (10, 12, 4)])
def test_the_weights_of_a_frame_in_all_windows_sum_to_one(
    num_frames: int, segment: int, overlap: int, with_key_frames: bool
) -> None:
    total = np.zeros(num_frames)
    for frames, weights in windows(num_frames, segment, overlap, with_key_frames=with_key_frames):
        assert (weights > 0).all()
        total[frames] += weights
    np.testing.assert_allclose(total, 1)


@pytest.mark.parametrize("with_key_frames", [False, True])
def test_predictions_go_back_to_the_frames_that_they_are_of(with_key_frames: bool) -> None:
    """Of denoisers that give back what they are given, in one memory that the next overwrites, as engines may."""
    memory = torch.empty(0)

    class Echo:
        def __init__(self, frames: torch.Tensor) -> None:
            assert frames[0] == 0
            self.num_frames = len(frames)

        def __call__(self, latents: torch.Tensor, index: int, timestep: int) -> torch.Tensor:
            assert len(latents) == self.num_frames
            memory.resize_(latents.shape).copy_(latents)
            return memory

        def forget(self) -> None: ...

    latents = torch.randn(11, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    fused = Fused(windows(10, 6, 2, with_key_frames=with_key_frames), Echo)  # type: ignore[arg-type]
    torch.testing.assert_close(fused(latents, 0, 0), latents)


@pytest.mark.parametrize("change", [{"tau": 2}, {"sampler": "dpmpp"}, {"controlnet_every": 2}, {"segment": None}])
def test_what_is_not_merged_is_refused(tiny_engine: Path, change: dict[str, Any]) -> None:
    options = RenderOptions(**{"num_inference_steps": 4, "segment": 6, "overlap": 2, **change})
    with Avatar.load(tiny_engine) as avatar, pytest.raises(ValueError, match="only DDIM"):
        render_fused(avatar, moving_person(3, (32, 32)), options, with_key_frames=False)


def test_one_window_is_the_joint_render(tiny_engine: Path) -> None:
    target = moving_person(3, (32, 32), phase=1.0)
    with Avatar.load(tiny_engine) as avatar:
        joint = avatar.render(target, num_inference_steps=2)
        options = RenderOptions(num_inference_steps=2, segment=6, overlap=2)
        fused = render_fused(avatar, target, options, with_key_frames=False)
    assert np.array_equal(joint, fused)
