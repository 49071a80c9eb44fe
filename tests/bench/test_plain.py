"""The baselines render what the runtime renders: they differ in what they compute, not in the result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import posecrafter_rt.avatar_render
from bench.plain import Baseline
from bench.runs import moving_person, psnr
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.errors import ModelError
from posecrafter_rt.poses.keypoints import PoseSequence

STEPS = 2
CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # of latents of unit variance, after four float32 networks in another order


@pytest.fixture(scope="module", params=["embedded", "tiny-frame", "tiny-clip"])
def tuned(request: pytest.FixtureRequest, tiny_base: Path) -> Checkpoint:
    """A checkpoint on a base, with temporal layers that act; `tiny` has random weights."""
    name, _, scope = request.param.partition("-")
    checkpoint = untrained_checkpoint("embedded" if name == "embedded" else str(tiny_base), num_frames=3)
    if scope:
        checkpoint.metadata["norm_scope"] = scope
    return checkpoint


@pytest.fixture(scope="module")
def avatar(tuned: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Avatar]:
    """The torch engine in float32."""
    folder = tmp_path_factory.mktemp("avatar")
    tuned.save(folder / "tuned.ckpt")
    build_engine(folder / "tuned.ckpt", folder / "tuned.engine", BuildOptions("torch", "fp32"))
    with Avatar.load(folder / "tuned.engine") as avatar:
        yield avatar


@pytest.fixture(scope="module")
def baseline(tuned: Checkpoint) -> Baseline:
    return Baseline(tuned.load_model())


def render(avatar: Avatar, target: PoseSequence, mode: str) -> tuple[np.ndarray, Tensor]:
    """Frames, and the latents that they were decoded from."""
    kept: list[Tensor] = []
    render_clip = posecrafter_rt.avatar_render.render_clip

    def keep(*arguments, **options) -> Tensor:
        kept.append(render_clip(*arguments, **options))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posecrafter_rt.avatar_render, "render_clip", keep)
        return avatar.render(target, mode=mode, num_inference_steps=STEPS, inversion_substeps=1, strength=1.0), kept[0]


def test_published_equals_the_runtimes_editing_mode(tuned: Checkpoint, avatar: Avatar, baseline: Baseline) -> None:
    target = moving_person(3, tuned.poses.canvas, phase=1.0)
    frames, latents = render(avatar, target, "+editing")
    assert avatar.last_report is not None and avatar.last_report.edited_regions > 0
    published = baseline.published(tuned.frames, tuned.poses, target, STEPS)
    torch.testing.assert_close(published.latents, latents, **CLOSE)
    assert psnr(published.frames, frames) >= 60


def test_plain_equals_the_runtimes_mode_controlvideo(tuned: Checkpoint, avatar: Avatar, baseline: Baseline) -> None:
    """Inverting copies of one frame with one pose is inverting it once, in both scopes of GroupNorm (METHOD)."""
    target = moving_person(3, tuned.poses.canvas, phase=1.0)
    frames, latents = render(avatar, target, "controlvideo")
    plain = baseline.plain(tuned.frames, tuned.poses, target, STEPS)
    torch.testing.assert_close(plain.latents, latents, **CLOSE)
    assert psnr(plain.frames, frames) >= 60


@pytest.mark.parametrize("tuned", ["tiny-frame", "tiny-clip"], indirect=True)
def test_inverting_different_frames_is_another_method(tuned: Checkpoint, baseline: Baseline) -> None:
    """ControlVideo's own use inverts a source video: its latents are those of no single frame."""
    text = baseline.encode_prompt()
    copies, video = [0, 0, 0], [0, 1, 2]
    one, same, different = (
        baseline.invert(tuned.frames[list(which)], PoseSequence(tuned.poses.keypoints[list(which)], tuned.poses.canvas),
                        text, STEPS) for which in ([0], copies, video))  # fmt: skip
    torch.testing.assert_close(same, one.expand_as(same), **CLOSE)
    assert (different - same)[1:].abs().max() > 0.1


def test_a_baseline_takes_no_folded_model(make_tiny_model) -> None:
    model = make_tiny_model()
    model.fold()
    with pytest.raises(ModelError, match="folded"):
        Baseline(model)


def test_a_baseline_leaves_the_model_as_it_was(make_tiny_model) -> None:
    model = make_tiny_model("clip")
    before = {name: id(module) for name, module in model.unet.named_modules()}
    baseline = Baseline(model)
    assert {name: id(module) for name, module in model.unet.named_modules()} == before
    shared = dict(baseline.networks.unet.named_parameters())
    for name, parameter in model.unet.named_parameters():
        if name in shared:  # no second copy of the weights
            assert shared[name].data_ptr() == parameter.data_ptr()
    assert len(shared) > 50
