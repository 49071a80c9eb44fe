"""Rendering on a tiny base: modes, options, the cache of inversions, and refusals."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines.torch import TorchBackend
from posecrafter_rt.errors import OutOfMemory, PoseCrafterError, PoseError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime import render as render_module
from posecrafter_rt.runtime.options import MODES
from posecrafter_rt.runtime.presets import PRESETS
from posecrafter_rt.runtime.report import SegmentReport
from tests.tiny import SIZE, Watched, some_poses


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


def test_the_type_that_a_program_has_made_the_default_changes_nothing(tiny_engine: Path, tmp_path: Path) -> None:
    def render(folder: Path) -> np.ndarray:
        shutil.copytree(tiny_engine, folder, ignore=shutil.ignore_patterns("inversions"))
        with Avatar.load(folder) as avatar, avatar.stream(steps=1) as stream:
            frames = avatar.render(some_poses(2), num_inference_steps=2, inversion_substeps=1, guidance_scale=3.0)
            return np.concatenate([frames, stream.step(some_poses(1).keypoints[0])[None]])

    expected = render(tmp_path / "float32")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert np.array_equal(render(tmp_path / "bfloat16"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def calls_in_a_fork(call: Callable[[], Any]) -> tuple[str, str | None]:
    """Return message and hint of the PoseCrafterError that `call` raises in a forked process."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run() -> None:
        try:
            call()
        except PoseCrafterError as error:
            sending.send((str(error), error.hint))

    process = context.Process(target=run)
    process.start()
    sending.close()
    try:
        assert receiving.poll(20), "it hangs"  # it would for good: it waits for threads that it does not have
        return receiving.recv()
    finally:
        process.kill()
        process.join()


def test_an_avatar_and_its_streams_are_refused_in_a_forked_process_and_go_on_in_their_own(avatar: Avatar) -> None:
    pose, message = some_poses(1), f"{avatar.folder.path} was loaded before a fork"
    with avatar.stream(steps=1) as stream:
        for call in (lambda: avatar.render(pose), lambda: avatar.stream(steps=1)):
            assert calls_in_a_fork(call) == (message, "load it in each worker")
        message = "this stream was opened before a fork"
        assert calls_in_a_fork(lambda: stream.step(pose.keypoints[0])) == (message, "load its avatar in each worker")
        stream.step(pose.keypoints[0])
    avatar.render(pose, num_inference_steps=2)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_too_little_memory_to_load_an_avatar_or_to_open_a_stream_is_said_with_advice(
    tiny_engine: Path, avatar: Avatar, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(TorchBackend, "load", fail)
    with pytest.raises(OutOfMemory, match="^memory ran out") as caught:
        Avatar.load(tiny_engine)
    assert caught.value.hint == "free some memory, or build the engine with a --precision of fewer bits"
    monkeypatch.setattr("posecrafter_rt.avatar.sample_reference", fail)
    with pytest.raises(OutOfMemory, match="^memory ran out") as caught:
        avatar.stream()
    assert caught.value.hint == "free some memory, or open the stream with fewer steps or a smaller window"


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
    plain = avatar.render(poses, num_inference_steps=3)
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
        assert not np.array_equal(avatar.render(poses, **{"num_inference_steps": 3, **change}), plain), change


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


def test_every_stage_of_a_render_is_done_and_measured_on_the_gpu_of_the_networks(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And between two frames the program has its own. No GPU is needed: it is only asked for."""
    current, stage = list[str](), SegmentReport.stage
    stages: list[tuple[str, list[str]]] = []

    @contextmanager
    def made_current() -> Iterator[None]:
        current.append("theirs")
        yield
        current.pop()

    @contextmanager
    def noted(report: SegmentReport, name: str) -> Iterator[None]:
        stages.append((name, [*current]))
        with stage(report, name):
            yield
        stages.append((name, [*current]))

    monkeypatch.setattr(avatar.networks, "on_device", made_current)
    monkeypatch.setattr(SegmentReport, "stage", noted)
    for _ in avatar.iter_render(some_poses(2), num_inference_steps=2):
        assert current == []
    assert {name for name, _ in stages} == {"prepare", "invert", "denoise", "decode"}
    assert all(at == ["theirs"] for _, at in stages)


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
                                    {"tau": 1.5}, {"guidance_scale": 0.5}, {"inversion_substeps": 0}, {"guidance_scale": float("nan")},
                                    {"guidance_scale": float("inf")}, {"conditioning_scale": float("nan")},
                                    {"conditioning_scale": float("inf")}, {"resample": "cubic"}, {"regions": ("ear",)},
                                    {"strength": 0.0}, {"strength": 1.01}, {"strength": float("nan")},
                                    {"strength": 0.5, "num_inference_steps": 4, "tau": 3}, {"segment": 0},
                                    {"controlnet_every": 0}, {"unet_every": 0}, {"overlap": -1},
                                    {"segment": 6, "overlap": 3}, {"segment": 6, "overlap": -1}, {"segment": "some"},
                                    {"segment": "auto", "overlap": -1}])  # fmt: skip
def test_bad_options_are_refused(avatar: Avatar, change: dict) -> None:
    with pytest.raises(PoseCrafterError):
        avatar.render(some_poses(1), **change)


def test_what_are_no_poses_is_said_plainly(avatar: Avatar) -> None:
    with pytest.raises(PoseError, match="poses are a ndarray"):
        avatar.render(some_poses(2).keypoints)  # type: ignore[arg-type]


def test_an_engine_of_another_size_renders_at_that_size(tiny_checkpoint: Path, tmp_path: Path) -> None:
    build_engine(tiny_checkpoint, tmp_path / "e", BuildOptions("torch", "fp32", size=(48, 48)))
    with Avatar.load(tmp_path / "e") as avatar:
        assert avatar.render(some_poses(2), num_inference_steps=2).shape == (2, 48, 48, 3)


@pytest.mark.parametrize("change", [
    {"num_inference_steps": 1}, {"num_inference_steps": 2, "strength": 0.6}, {"num_inference_steps": 50, "strength": 0.01}])  # fmt: skip
def test_steps_that_would_do_nothing_are_refused(avatar: Avatar, change: dict[str, Any]) -> None:
    """The last step of leading spacing is at timestep 1: begun there, every frame would be the reference."""
    with pytest.raises(PoseCrafterError, match="start where no noise is left to remove") as caught:
        avatar.render(some_poses(2), **change)
    assert caught.value.hint == "give more steps, a larger strength, or the sampler dpmpp"
    avatar.resolve(**change, sampler="dpmpp")
    with pytest.raises(PoseCrafterError, match="2 denoising steps at strength 0.5 start where no noise is left"):
        avatar.folder.manifest["recommended"] = {"inversion_substeps": 1, "strength": 0.5}
        avatar.resolve(num_inference_steps=2)


def test_steps_that_start_at_much_less_noise_are_warned_of(avatar: Avatar, caplog: pytest.LogCaptureFixture) -> None:
    few = {"strength": 0.004, "inversion_substeps": 1}
    avatar.render(some_poses(1), num_inference_steps=500, **few)
    assert not caplog.records
    avatar.render(some_poses(1), num_inference_steps=501, **few)
    assert [record.getMessage() for record in caplog.records] == [
        "a schedule of 501 steps starts at timestep 501 of 1000, because timesteps are whole: fewer steps start at more noise"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize(
    "change", [{}, {"tau": 3}, {"guidance_scale": 3.0}, {"sampler": "dpmpp"}, {"sampler": "unipc"}]
)
def test_no_denoising_step_waits_for_the_gpu(avatar: Avatar, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    options, watched = {"num_inference_steps": 4, **change}, list[bool]()
    expected = avatar.render(some_poses(2), **options)  # compiles, and records what is replayed from then on
    render_clip = render_module.render_clip

    def strict(*arguments: object) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            watched.append(True)
            return render_clip(*arguments)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("posecrafter_rt.avatar_render.render_clip", strict)
    assert np.array_equal(avatar.render(some_poses(2), **options), expected) and watched
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):  # what it looks for is found
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
