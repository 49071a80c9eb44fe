"""The whole path on a tiny base: build, load, render; modes, caches, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines import Engine
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
from posecrafter_rt.runtime import render as render_module
from posecrafter_rt.runtime.options import MODES
from posecrafter_rt.runtime.presets import PRESETS
from posecrafter_rt.runtime.segments import split_clip
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


class Watched:
    """An engine that notes the batch size of every call."""

    def __init__(self, engine: Engine, sizes: list[int]) -> None:
        self.engine, self.spec, self.device, self.sizes = engine, engine.spec, engine.device, sizes

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(inputs[self.spec.inputs[0].name]))
        return self.engine(**inputs)

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        return self.engine.swap_weights(tensors)


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


@pytest.mark.parametrize(("change", "is_cached"), [
    ({"mode": "+insertion"}, True), ({"tau": 2}, True), ({"resample": "nearest"}, True), ({"prompt": "a woman"}, True),
    ({"guidance_scale": 3.0}, True), ({"segment": 16}, True),
    ({"num_inference_steps": 4}, False), ({"inversion_substeps": 2}, False), ({"strength": 0.5}, False),
    ({"conditioning_scale": 0.5}, False), ({"sampler": "dpmpp"}, False),
])  # fmt: skip
def test_the_inversion_is_shared_by_all_that_it_does_not_depend_on(
    avatar: Avatar, change: dict, is_cached: bool
) -> None:
    for file in avatar.folder.inversions.glob("*"):
        file.unlink()
    avatar.render(some_poses(2), num_inference_steps=3)
    avatar.render(some_poses(2), **{"num_inference_steps": 3, **change})
    assert avatar.last_report is not None and avatar.last_report.inversion_cached is is_cached


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda content: b"torn", lambda content: content[:-4], flip_last_bit])
def test_a_damaged_cached_inversion_is_computed_anew(avatar: Avatar, damage: Callable[[bytes], bytes]) -> None:
    for file in avatar.folder.inversions.glob("*"):
        file.unlink()  # those of other options would stay damaged, and be damaged twice
    first = avatar.render(some_poses(2), num_inference_steps=4)
    for file in avatar.folder.inversions.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    assert np.array_equal(avatar.render(some_poses(2), num_inference_steps=4), first)
    assert avatar.last_report is not None and not avatar.last_report.inversion_cached
    avatar.render(some_poses(2), num_inference_steps=4)
    assert avatar.last_report.inversion_cached


def test_options_change_what_they_should(avatar: Avatar) -> None:
    poses = some_poses(2)
    plain = avatar.render(poses, num_inference_steps=2)
    for change in (
        {"guidance_scale": 3.0, "prompt": "a woman"},
        {"conditioning_scale": 0.2},
        {"tau": 2},
        {"inversion_substeps": 3},
        {"strength": 0.5},
        {"sampler": "dpmpp"},
        {"sampler": "unipc"},
        {"controlnet_every": 2},
        {"mode": "+insertion"},
    ):
        assert not np.array_equal(avatar.render(poses, **{"num_inference_steps": 2, **change}), plain), change


def test_a_partial_inversion_asks_the_networks_only_below_its_start(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setitem(avatar.engines, "controlnet", Watched(avatar.engines["controlnet"], asked))
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


def test_a_preset_is_its_options_and_the_report_names_what_it_approximates(avatar: Avatar) -> None:
    poses = some_poses(2)
    by_name = avatar.render(poses, preset="fast")
    assert avatar.last_report is not None
    report = avatar.last_report.to_json()
    steps = PRESETS["fast"]["num_inference_steps"]
    assert report["approximations"] == {"num_inference_steps": steps, "sampler": "dpmpp"}
    assert np.array_equal(avatar.render(poses, **PRESETS["fast"]), by_name)
    avatar.render(poses, preset="fast", num_inference_steps=2, sampler="ddim")
    assert avatar.last_report.to_json()["approximations"] == {"num_inference_steps": 2}


def test_residuals_that_are_kept_over_steps_save_the_controlnet_and_every_step_anew_changes_nothing(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    poses, asked = some_poses(2), list[int]()
    plain = avatar.render(poses, num_inference_steps=5)
    monkeypatch.setitem(avatar.engines, "controlnet", Watched(avatar.engines["controlnet"], asked))
    assert np.array_equal(avatar.render(poses, num_inference_steps=5, controlnet_every=1), plain)
    assert len(asked) == 5
    asked.clear()
    assert not np.array_equal(avatar.render(poses, num_inference_steps=5, controlnet_every=2), plain)
    assert len(asked) == 3  # at steps 0, 2 and 4; the inversion is cached
    assert avatar.last_report is not None
    assert avatar.last_report.to_json()["approximations"]["controlnet_every"] == 2


@pytest.mark.parametrize("sampler", ["dpmpp", "unipc"])
def test_a_late_edit_restarts_the_multistep_sampler(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    sample, restarts = getattr(render_module, f"{sampler}_sample"), []

    def watched(*arguments: object, restart_step: int | None, **named: object) -> Tensor:
        restarts.append(restart_step)
        return sample(*arguments, restart_step=restart_step, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(render_module, f"{sampler}_sample", watched)
    part = {"sampler": sampler, "num_inference_steps": 6, "strength": 0.5}
    renders = [avatar.render(some_poses(2), tau=tau, **part) for tau in (1, 2)]
    assert restarts == [None, 4]  # of the steps 3, 4 and 5, the second is the one before which it edits
    assert not np.array_equal(*renders)


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


SEGMENTS = {"num_inference_steps": 2, "segment": 6, "overlap": 2}


@pytest.mark.parametrize("count", [5, 6])
def test_a_clip_that_fits_into_one_segment_is_rendered_as_without(avatar: Avatar, count: int) -> None:
    plain = avatar.render(some_poses(count), num_inference_steps=2)
    assert np.array_equal(avatar.render(some_poses(count), **SEGMENTS), plain)
    assert avatar.last_report is not None and avatar.last_report.num_segments == 1


def test_segments_are_clips_of_their_own_blended_where_they_overlap(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 frames in segments of 6 that share 2 are 3 of 5, 6 and 6 frames in some order; each is its own render."""
    poses = some_poses(13)
    spans = split_clip(13, 6, 2)
    assert sorted(span.stop - span.start for span in spans) == [5, 6, 6]
    rendered = avatar.render(poses, **SEGMENTS)
    monkeypatch.setattr("posecrafter_rt.avatar.select_reference", lambda train, target: reference)
    assert avatar.last_report is not None
    reference = avatar.last_report.reference_index  # of the whole clip, which a part alone might not choose
    for earlier, span in zip([None, *spans], spans, strict=False):
        alone = avatar.render(poses[span.start : span.stop], num_inference_steps=2)
        shared = 0 if earlier is None else earlier.stop - span.start
        settled = slice(shared, span.settled - span.start)
        assert np.array_equal(rendered[span.start : span.settled][settled], alone[settled])
        if shared:
            assert not np.array_equal(rendered[span.start : span.start + shared], alone[:shared])


def test_the_report_names_the_segments_and_counts_each_frame_once(avatar: Avatar) -> None:
    keypoints = some_poses(13).keypoints.copy()
    keypoints[[3, 4, 9], 92:113] = 0  # the left hand of frames that two segments render, and of one that ends the clip
    keypoints[12, 24:92] = 0
    poses = PoseSequence(keypoints, SIZE)
    avatar.render(poses, num_inference_steps=2)
    assert avatar.last_report is not None
    whole = avatar.last_report.to_json()
    avatar.render(poses, **SEGMENTS)
    split = avatar.last_report.to_json()
    assert whole["num_segments"] == 1 and whole["options"]["segment"] is None
    assert split["num_segments"] == 3 and (split["options"]["segment"], split["options"]["overlap"]) == (6, 2)
    assert [(skipped["frame"], skipped["region"]) for skipped in split["skipped_regions"]] == [
        (3, "left_hand"), (4, "left_hand"), (9, "left_hand"), (12, "face")]  # fmt: skip
    for name in ("skipped_regions", "edited_regions", "reference_index"):
        assert split[name] == whole[name], name
    assert set(split["seconds"]) == {"prepare", "invert", "denoise", "decode"}


def test_no_network_ever_sees_more_than_one_segment(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is computed once a render is not computed again for each segment."""
    seen: dict[str, list[int]] = {name: [] for name in avatar.engines}

    for name, engine in list(avatar.engines.items()):
        monkeypatch.setitem(avatar.engines, name, Watched(engine, seen[name]))
    for count in (14, 26):
        for calls in seen.values():
            calls.clear()
        avatar._tables.clear()
        taken = 0
        for _ in avatar.iter_render(some_poses(count), inversion_substeps=1, **SEGMENTS):
            taken += 1
            # A segment's frames come before the next one's are denoised.
            assert len(seen["unet"]) <= 2 + 2 * (1 + (taken - 1) // 3)
        assert taken == count
        for name in ("controlnet", "unet"):
            assert max(seen[name]) == 1 + 6  # the reference and a segment
        assert {*seen["pose_embedding"], *seen["vae_decoder"]} == {1}  # what sees frames apart is given them apart
        assert sum(seen["vae_decoder"]) == count  # each frame once, the reference never
        assert len(seen["vae_encoder"]) <= 1 and seen["text_encoder"] == [1] and len(seen["time_tables"]) == 1


def test_going_on_from_a_finished_segment_gives_the_same_bytes(avatar: Avatar) -> None:
    poses = some_poses(13)
    whole = avatar.render(poses, **SEGMENTS)
    first = next(avatar.iter_segments(poses, **SEGMENTS))
    head = list(first.frames)
    rest = avatar.iter_segments(poses, finished=[first.report], carried=first.carried, **SEGMENTS)
    frames = [*head, *(frame for segment in rest for frame in segment.frames)]
    assert np.array_equal(np.stack(frames), whole)
    assert avatar.last_report is not None and avatar.last_report.num_resumed == 1


def test_automatic_segments_are_those_that_fit(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    poses, changes = some_poses(13), {**SEGMENTS, "segment": "auto"}
    whole = avatar.render(poses, num_inference_steps=2)
    assert np.array_equal(avatar.render(poses, **changes), whole)  # this machine has memory for so much
    assert avatar.last_report is not None and avatar.last_report.num_segments == 1
    assert str(avatar.last_report.segment_reason).startswith("the whole clip fits, at ")
    monkeypatch.setattr("posecrafter_rt.avatar.free_bytes", lambda device_type: 0)
    split = avatar.render(poses, **changes)
    assert avatar.last_report.num_segments == 3 and avatar.last_report.options.segment == 6
    assert np.array_equal(split, avatar.render(poses, **SEGMENTS))


@pytest.mark.parametrize("mode", ["controlvideo", "+selection"])
def test_modes_without_a_common_key_frame_are_not_split(avatar: Avatar, mode: str) -> None:
    with pytest.raises(PoseCrafterError, match="no key frame is common"):
        avatar.render(some_poses(3), mode=mode, **SEGMENTS)


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
                                    {"guidance_scale": float("inf")}, {"conditioning_scale": float("nan")},
                                    {"conditioning_scale": float("inf")}, {"resample": "cubic"}, {"regions": ("ear",)},
                                    {"strength": 0.0}, {"strength": 1.01}, {"strength": float("nan")},
                                    {"strength": 0.5, "num_inference_steps": 4, "tau": 3}, {"segment": 0},
                                    {"controlnet_every": 0}, {"overlap": -1},
                                    {"segment": 6, "overlap": 3}, {"segment": 6, "overlap": -1}, {"segment": "some"},
                                    {"segment": "auto", "overlap": -1}])  # fmt: skip
def test_bad_options_are_refused(avatar: Avatar, change: dict) -> None:
    with pytest.raises(PoseCrafterError):
        avatar.render(some_poses(1), **change)


def test_the_same_build_twice_is_nothing_to_do(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    before = (tiny_engine / "manifest.json").stat().st_mtime_ns
    result = build_engine(tiny_checkpoint, tiny_engine, TORCH)
    assert result.was_current and (tiny_engine / "manifest.json").stat().st_mtime_ns == before


def test_what_the_base_recommends_anew_reaches_an_engine_that_was_built_before(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    frames = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    tune(frames, some_poses(2), tmp_path / "a.ckpt", TuneOptions(base=str(base), frames=2, steps=1, precision="fp32"))
    build_engine(tmp_path / "a.ckpt", options=TORCH)
    settings = json.loads((base / "posecrafter.json").read_text())
    (base / "posecrafter.json").write_text(json.dumps({**settings, "strength": 0.5}))
    again = build_engine(tmp_path / "a.ckpt", options=TORCH)
    assert not again.was_current and again.folder.manifest["recommended"]["strength"] == 0.5


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

    def interrupt(stage: str, seconds_left: float | None) -> None:
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
