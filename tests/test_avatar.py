"""The whole path on a tiny base: build, load, render; modes, caches, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines.folder import write_manifest
from posecrafter_rt.errors import (
    BackendUnavailable,
    EngineFolderError,
    OutputExists,
    PoseCrafterError,
    PoseError,
    ShapeError,
)
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.options import MODES
from posecrafter_rt.tuning import TuneOptions, tune

SIZE = (32, 32)
TORCH = BuildOptions(backend="torch", precision="fp32")


def some_poses(count: int, seed: int = 3, size: tuple[int, int] = SIZE) -> PoseSequence:
    rng = np.random.default_rng(seed)
    keypoints = np.concatenate(
        [rng.uniform(0, 1, (1, 134, 2)) + rng.normal(0, 0.02, (count, 134, 2)), np.ones((count, 134, 1))], -1
    )
    keypoints[..., :2] *= (size[1], size[0])
    return PoseSequence(keypoints.astype(np.float32), size, 25.0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "tuned.ckpt"
    frames = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), np.uint8)
    tune(frames, some_poses(4), path, TuneOptions(base=str(tiny_base), frames=4, steps=3, precision="fp32"))
    return path


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "tiny.engine"
    return build_engine(tiny_checkpoint, path, TORCH).folder.path


@pytest.fixture
def avatar(tiny_engine: Path):
    with Avatar.load(tiny_engine) as avatar:
        yield avatar


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 3])
def test_every_mode_renders_every_pose(avatar: Avatar, mode: str, count: int) -> None:
    frames = avatar.render(some_poses(count), mode=mode, num_inference_steps=2)
    assert frames.shape == (count, *SIZE, 3) and frames.dtype == np.uint8
    assert avatar.last_report is not None and avatar.last_report.num_frames == count
    assert set(avatar.last_report.seconds) == {"prepare", "invert", "denoise", "decode"}


def test_rendering_twice_gives_the_same_bytes_and_inverts_once(avatar: Avatar) -> None:
    first = avatar.render(some_poses(2), num_inference_steps=3, tau=2)
    again = avatar.render(some_poses(2), num_inference_steps=3, tau=2)
    assert np.array_equal(first, again)
    assert avatar.last_report is not None and avatar.last_report.inversion_cached


def test_a_damaged_cached_inversion_is_computed_anew(avatar: Avatar) -> None:
    first = avatar.render(some_poses(2), num_inference_steps=4)
    for file in avatar.folder.inversions.iterdir():
        file.write_bytes(b"torn")
    assert np.array_equal(avatar.render(some_poses(2), num_inference_steps=4), first)
    assert avatar.last_report is not None and not avatar.last_report.inversion_cached


def test_options_change_what_they_should(avatar: Avatar) -> None:
    poses = some_poses(2)
    plain = avatar.render(poses, num_inference_steps=2)
    for change in (
        {"guidance_scale": 3.0, "prompt": "a woman"},
        {"conditioning_scale": 0.2},
        {"tau": 2},
        {"inversion_substeps": 3},
        {"strength": 0.5},
        {"mode": "+insertion"},
    ):
        assert not np.array_equal(avatar.render(poses, **{"num_inference_steps": 2, **change}), plain), change


def test_a_partial_inversion_asks_the_networks_only_below_its_start(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    controlnet, asked = avatar.engines["controlnet"], []

    class Watched:
        def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
            asked.append(len(inputs["latents"]))
            return controlnet(**inputs)

    monkeypatch.setitem(avatar.engines, "controlnet", Watched())
    told: list[tuple[str, int, int]] = []
    list(avatar.iter_render(some_poses(2), num_inference_steps=10, strength=0.3, inversion_substeps=1,
                            on_step=lambda *step: told.append(step)))  # fmt: skip
    assert asked == [1] * 3 + [3] * 3  # one frame inverted; then the reference and both targets
    assert [step for step in told if step[0] == "denoising"] == [("denoising", step, 3) for step in range(3)]


def test_a_late_edit_counts_from_the_first_step_that_is_done(avatar: Avatar) -> None:
    part = {"num_inference_steps": 10, "strength": 0.3}
    unedited = avatar.render(some_poses(2), mode="+insertion", **part)
    renders = [avatar.render(some_poses(2), tau=tau, **part) for tau in (1, 2, 3)]
    assert not any(np.array_equal(render, unedited) for render in renders)


def test_what_the_base_recommends_is_the_default(avatar: Avatar) -> None:
    poses = some_poses(2)
    assert avatar.folder.manifest["recommended"] == {"inversion_substeps": 1, "strength": 1.0}
    plain = avatar.render(poses, num_inference_steps=4)
    assert np.array_equal(avatar.render(poses, num_inference_steps=4, strength=1.0, inversion_substeps=1), plain)
    avatar.folder.manifest["recommended"] = {"inversion_substeps": 1, "strength": 0.5}
    half = avatar.render(poses, num_inference_steps=4)
    assert avatar.last_report is not None and avatar.last_report.options.strength == 0.5
    avatar.folder.manifest["recommended"] = {"inversion_substeps": 1, "strength": 1.0}
    assert np.array_equal(avatar.render(poses, num_inference_steps=4, strength=0.5), half)


def test_guidance_with_equal_prompts_changes_nothing_but_rounding(avatar: Avatar) -> None:
    poses = some_poses(2)
    avatar.prompt = ""
    plain = avatar.render(poses, num_inference_steps=2).astype(int)
    guided = avatar.render(poses, num_inference_steps=2, guidance_scale=5.0).astype(int)
    assert abs(plain - guided).max() <= 1


def test_iter_render_yields_the_same_frames_one_by_one(avatar: Avatar) -> None:
    whole = avatar.render(some_poses(3), num_inference_steps=2)
    frames = list(avatar.iter_render(some_poses(3), num_inference_steps=2))
    assert len(frames) == 3 and np.array_equal(np.stack(frames), whole)


def test_target_poses_from_another_canvas_are_scaled(avatar: Avatar) -> None:
    small = avatar.render(some_poses(2), num_inference_steps=2).astype(int)
    keypoints = some_poses(2).keypoints.copy()
    keypoints[..., :2] = (keypoints[..., :2] + 0.5) * 4 - 0.5
    large = avatar.render(PoseSequence(keypoints, (128, 128)), num_inference_steps=2).astype(int)
    assert abs(small - large).max() <= 2


def test_a_pose_without_a_shared_keypoint_is_named(avatar: Avatar) -> None:
    keypoints = some_poses(3).keypoints.copy()
    keypoints[1] = 0
    with pytest.raises(PoseError, match="1"):
        avatar.render(PoseSequence(keypoints, SIZE), num_inference_steps=2)


@pytest.mark.parametrize("change", [{"mode": "magic"}, {"num_inference_steps": 0}, {"tau": 3, "num_inference_steps": 2},
                                    {"guidance_scale": 0.5}, {"inversion_substeps": 0}, {"guidance_scale": float("nan")},
                                    {"strength": 0.0}, {"strength": 1.01}, {"strength": float("nan")},
                                    {"strength": 0.5, "num_inference_steps": 4, "tau": 3}])  # fmt: skip
def test_bad_options_are_refused(avatar: Avatar, change: dict) -> None:
    with pytest.raises(PoseCrafterError):
        avatar.render(some_poses(1), **change)


def test_the_same_build_twice_is_nothing_to_do(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    before = (tiny_engine / "manifest.json").stat().st_mtime_ns
    result = build_engine(tiny_checkpoint, tiny_engine, TORCH)
    assert result.was_current and (tiny_engine / "manifest.json").stat().st_mtime_ns == before


def test_one_byte_changed_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = build_engine(tiny_checkpoint, tmp_path / "e", TORCH).folder.path
    file = folder / "networks" / "unet.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(EngineFolderError, match="networks/unet.safetensors"):
        Avatar.load(folder)
    assert not build_engine(tiny_checkpoint, folder, TORCH).was_current  # building again mends it
    Avatar.load(folder).close()


@pytest.mark.parametrize(("damage", "named"), [("missing", "is missing"), ("extra", "was not built with it"),
                                               ("torn manifest", "damaged"), ("schema", "another version"),
                                               ("device", "was built on another processor"),
                                               ("library", "was built on torch 1.0, this is torch 2"),
                                               ("package", "was built on posecrafter-rt 0.0")])  # fmt: skip
def test_other_damage_is_refused_with_the_reason(
    tiny_checkpoint: Path, tmp_path: Path, damage: str, named: str
) -> None:
    folder = build_engine(tiny_checkpoint, tmp_path / "e", TORCH).folder.path
    manifest = json.loads((folder / "manifest.json").read_text())
    if damage == "missing":
        (folder / "networks" / "vae.safetensors").unlink()
    elif damage == "extra":
        (folder / "networks" / "more.bin").write_bytes(b"x")
    elif damage == "torn manifest":
        (folder / "manifest.json").write_text("{")
    else:
        manifest |= {
            "schema": {"schema": 99},
            "device": {"device": {"type": "cpu", "name": "another processor"}},
            "library": {"libraries": {**manifest["libraries"], "torch": "1.0"}},
            "package": {"package": "0.0"},
        }[damage]
        write_manifest(folder, manifest)
    with pytest.raises(EngineFolderError, match=named) as caught:
        Avatar.load(folder)
    assert caught.value.hint and "build-engine" in caught.value.hint


def test_what_the_user_made_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists):
        build_engine(tiny_checkpoint, tmp_path / "notes", TORCH)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_a_build_that_fails_leaves_nothing_and_the_old_engine_works(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = build_engine(tiny_checkpoint, tmp_path / "e", TORCH).folder.path

    def interrupt(stage: str) -> None:
        if stage == "vae":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny_checkpoint, folder, BuildOptions("torch", "bf16"), progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    Avatar.load(folder).close()


def test_sizes_and_backends_that_cannot_be_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="33x32"):
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("torch", "fp32", size=(33, 32)))
    with pytest.raises(BackendUnavailable, match="magic"):
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("magic"))
    with pytest.raises(BackendUnavailable, match="fp8"):
        build_engine(tiny_checkpoint, tmp_path / "a", BuildOptions("torch", "fp8"))


def test_an_engine_of_another_size_renders_at_that_size(tiny_checkpoint: Path, tmp_path: Path) -> None:
    build_engine(tiny_checkpoint, tmp_path / "e", BuildOptions("torch", "fp32", size=(48, 32)))
    with Avatar.load(tmp_path / "e") as avatar:
        assert avatar.render(some_poses(2), num_inference_steps=1).shape == (2, 48, 32, 3)
