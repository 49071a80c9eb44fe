"""A render as files: 10,000 frames in memory that stays flat, and nothing lost when memory or the disk runs out."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bench.runs import moving_person
from bench.untrained import untrained_checkpoint
from posecrafter_rt import atomic
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.errors import DiskFull, OutputExists, PoseCrafterError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.rendering import render_to_files
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.partial import PartialRender
from tests.render_scripts import ALONE, FAITHFUL, FULL, NOTED, STARVED, refused_mount, run_lines, run_script
from tests.tiny import some_poses

SIZE = (32, 32)
CHANGES = {"num_inference_steps": 1, "sampler": "dpmpp", "strength": 1.0, "inversion_substeps": 1, "segment": 26,
           "overlap": 2}  # fmt: skip
OPTIONS = json.dumps(CHANGES)
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendering")
    untrained_checkpoint(str(tiny_base), num_frames=3).save(folder / "tuned.ckpt")
    build_engine(folder / "tuned.ckpt", folder / "tuned.engine", BuildOptions("torch", "fp32"))
    return folder / "tuned.engine"


def assert_flat(peaks: list[int]) -> None:
    """Each segment's peak, from the third on, where the first two have warmed everything up: 3 % above the median at most.

    Below it some may lie further: a system that is short of memory takes back pages of files that are mapped.
    """
    settled = np.array(peaks[2:])
    figures = [round(peak / 1e6, 1) for peak in peaks]
    assert settled.max() / np.median(settled) - 1 <= TOLERANCE, figures
    assert settled[-1] / settled[0] - 1 <= TOLERANCE, figures


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=pytest.mark.slow)])
def test_the_peaks_of_segments_are_flat(engine: Path, tmp_path: Path, backend: str) -> None:
    """Of 13, all of 8 frames: of two lengths a backend may keep what it allocated for one beside the other's."""
    if backend != "torch":
        pytest.importorskip(backend)
        build_engine(engine.with_name("tuned.ckpt"), tmp_path / "other.engine", BuildOptions(backend, "fp32"))
        engine = tmp_path / "other.engine"
    moving_person(13 * 6 + 2, SIZE).save(tmp_path / "poses.json")
    options = json.dumps({**CHANGES, "segment": 8})
    report, *_ = run_script(NOTED, engine, tmp_path / "poses.json", tmp_path / "out.mp4", options)
    assert report["segments"] == [8] * 13 and len(report["segment_peaks"]) == 13
    assert_flat(report["segment_peaks"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_ten_thousand_frames_stream_in_memory_that_stays_flat(engine: Path, tmp_path: Path) -> None:
    """Flat: after the second segment nothing lies off the median by more than 3 %, and the last has not grown by that.

    Held as pictures, the frames alone would be 31 MB, a twentieth of what the process takes: the second condition sees
    that, the first would not.
    """
    num_frames = 10_000
    moving_person(num_frames, SIZE).save(tmp_path / "poses.json")
    options = json.dumps({**CHANGES, "segment": 50})
    report, segments, video = run_script(NOTED, engine, tmp_path / "poses.json", tmp_path / "out.mp4", options)
    assert len(segments) == report["num_segments"] == 209 and len(video) == report["num_frames"] == num_frames
    assert_flat(report["segment_peaks"])
    settled = np.array(segments[1:])
    spread, growth = np.abs(settled / np.median(settled) - 1).max(), settled[-1] / settled[0] - 1
    encoding = np.array(video[1000:])  # the encoder holds some frames of its own before the first comes out
    figures = {"MB": [round(value / 1e6, 1) for value in segments], "spread": spread, "growth": growth,
               "video MB": [encoding.min() / 1e6, encoding.max() / 1e6]}  # fmt: skip
    assert spread <= TOLERANCE and growth <= TOLERANCE, figures
    assert np.abs(encoding / np.median(encoding) - 1).max() <= TOLERANCE, figures
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == num_frames


@pytest.fixture(scope="module")
def unbroken(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with poses of 46 frames, and the three files of their render in two segments."""
    folder = tmp_path_factory.mktemp("unbroken")
    moving_person(46, SIZE).save(folder / "poses.json")
    report = render(engine, folder, folder / "out.mp4")
    assert report["num_segments"] == 2 and report["num_resumed"] == 0
    return folder


def render(engine: Path, poses: Path, video: Path) -> dict[str, Any]:
    with Avatar.load(engine) as avatar:
        return render_to_files(avatar, PoseSequence.load(poses / "poses.json"), video, RenderOptions(**CHANGES))


def finish(engine: Path, unbroken: Path, video: Path, num_finished: int) -> None:
    """After a failure nothing of its own lies in the video's place; the same call then goes on to the same bytes."""
    assert [path.name for path in video.parent.iterdir()] == ["out.mp4.partial"]
    assert render(engine, unbroken, video)["num_resumed"] == num_finished
    assert sorted(path.name for path in video.parent.iterdir()) == ["out.mp4", "out.png", "out.report.json"]
    for name in ("out.mp4", "out.png"):
        assert video.with_name(name).read_bytes() == (unbroken / name).read_bytes(), name


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
@pytest.mark.parametrize(("target", "moment", "error", "num_finished"), [
    ("posecrafter_rt.avatar_render.render_clip", 2, "OutOfMemory: memory ran out", 1),
    ("posecrafter_rt.video_io.VideoWriter._encode", 1, "VideoError: encoding", 2),
])  # fmt: skip
def test_nothing_is_lost_when_memory_runs_out(
    engine: Path, unbroken: Path, tmp_path: Path, target: str, moment: int, error: str, num_finished: int
) -> None:
    video = tmp_path / "out.mp4"
    name, message = run_script(STARVED, target, moment, 0, engine, unbroken / "poses.json", video, OPTIONS)
    assert f"{name}: {message}".startswith(error)
    finish(engine, unbroken, video, num_finished)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
def test_with_too_little_memory_for_a_segment_a_render_ends_in_shorter_ones(engine: Path, tmp_path: Path) -> None:
    """60 MB are too little for 100 frames jointly, and enough for half as many."""
    moving_person(100, SIZE).save(tmp_path / "poses.json")
    options = json.dumps({**CHANGES, "segment": 100})
    report = run_script(STARVED, "posecrafter_rt.avatar_render.render_clip", 1, 60_000_000, engine, tmp_path / "poses.json",
                        tmp_path / "out.mp4", options, environment=FAITHFUL)  # fmt: skip
    assert isinstance(report, dict), report
    assert max(report["segments"]) <= 50 and not report["claims_byte_equality"]
    assert report["adjustments"][0]["frame"] == 0 and "memory ran out" in report["adjustments"][0]["reason"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 100


@pytest.mark.parametrize(("begins", "suffix", "num_finished"), [
    (".segment-00001.", ".safetensors", 1), (".out.", ".mp4", 2), (".out.", ".png", 2), (".out.", ".json", 2)])  # fmt: skip
def test_nothing_is_lost_when_the_disk_is_full(
    engine: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    begins: str, suffix: str, num_finished: int,
) -> None:  # fmt: skip
    video, flush = tmp_path / "out.mp4", atomic.flush_to_disk

    def full(path: Path) -> None:
        if path.name.startswith(begins) and path.suffix == suffix:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "flush_to_disk", full)
        with pytest.raises(DiskFull) as caught:
            render(engine, unbroken, video)
    assert str(caught.value) == f"no space left to write {video}"
    assert caught.value.hint == f"free some space in {tmp_path}; the same command then goes on from what is finished"
    finish(engine, unbroken, video, num_finished)


def test_nothing_is_lost_when_a_real_file_system_is_full(engine: Path, unbroken: Path, tmp_path: Path) -> None:
    """In the first segment, in the second, or in the contact sheet: a segment takes 70 kB, the sheet 323."""
    folder, copied, limits = tmp_path / "mounted", tmp_path / "copied", {40: 0, 110: 1, 400: 2}
    folder.mkdir()
    copied.mkdir()
    if (reason := refused_mount(folder)) is not None:
        pytest.skip(reason)
    options = ("--steps", "1", "--sampler", "dpmpp", "--strength", "1", "--inversion-substeps", "1", "--segment", "26",
               "--overlap", "2")  # fmt: skip
    printed, _ = run_lines([*ALONE, sys.executable, "-c", FULL], folder, copied, json.dumps([*limits]), "render", engine,
                        "--poses", unbroken / "poses.json", *options)  # fmt: skip
    for (num_kb, num_finished), full, again in zip(limits.items(), printed[::2], printed[1::2], strict=True):
        assert_nothing_was_lost(full, again, folder, num_finished)
        report = json.loads((copied / str(num_kb) / "out.report.json").read_text())
        assert report["num_resumed"] == num_finished
        for name in ("out.mp4", "out.png"):
            assert (copied / str(num_kb) / name).read_bytes() == (unbroken / name).read_bytes(), (num_kb, name)


def assert_nothing_was_lost(full: list[Any], again: list[Any], folder: Path, num_finished: int) -> None:
    """The two runs that FULL prints for one limit."""
    (status, said, left), (status_again, _, whole) = full, again
    errors = [line for line in said.splitlines() if line.startswith(("error:", "hint:"))]
    assert status == 1 and errors[0] == f"error: no space left to write {folder / 'out.mp4'}", said
    assert len(errors) == 2 and "Traceback" not in said
    kept = [*(f"segment-{number:05d}.safetensors" for number in range(num_finished)), "state.json"]
    if num_finished == 2:
        kept.insert(0, "out.mp4")  # whole, and not in its place
    assert left == ([f"out.mp4.partial/{name}" for name in kept] if num_finished else [])
    assert status_again == 0 and whole == ["out.mp4", "out.png", "out.report.json"]


@pytest.mark.parametrize("name", ["state", "out", "the folder itself"])
def test_a_full_disk_is_told_by_the_name_that_was_given(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What was written to beside it is gone by then."""
    flush, mkdir = atomic.flush_to_disk, Path.mkdir

    def full(path: Path) -> None:
        if path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    def none(path: Path, *arguments: Any, **named: Any) -> None:
        if path.suffix == ".partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        mkdir(path, *arguments, **named)

    monkeypatch.setattr(atomic, "flush_to_disk", full)
    if name == "the folder itself":
        monkeypatch.setattr(Path, "mkdir", none)
    with pytest.raises(DiskFull) as caught:
        render_to_files(avatar, some_poses(3), tmp_path / "out.mp4", JOINTLY)
    assert str(caught.value) == f"no space left to write {tmp_path / 'out.mp4'}"
    assert caught.value.hint == f"free some space in {tmp_path}, or write elsewhere" and not list(tmp_path.iterdir())


JOINTLY = RenderOptions(**{**CHANGES, "segment": None})
IN_SEGMENTS = RenderOptions(**{**CHANGES, "segment": 6})


def test_the_report_names_eight_bits_as_an_approximation_and_loras_with_the_engine(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = render_to_files(avatar, some_poses(2), tmp_path / "plain.mp4", JOINTLY)
    assert plain["approximations"] == {"num_inference_steps": 1, "sampler": "dpmpp"}
    assert (plain["engine"]["precision"], plain["engine"]["loras"]) == ("fp32", [])
    loras = [{"file": "style.safetensors", "sha256": "0" * 64, "scale": 0.5}]
    monkeypatch.setitem(avatar.folder.manifest, "precision", "int8")
    monkeypatch.setitem(avatar.folder.manifest, "loras", loras)
    monkeypatch.setattr(avatar.networks, "precision", "int8")  # not loaded anew: torch has none
    render_to_files(avatar, some_poses(2), tmp_path / "out.mp4", JOINTLY)
    report = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert report["approximations"] == {**plain["approximations"], "precision": "int8"}
    assert report["engine"] == {**plain["engine"], "precision": "int8", "loras": loras}


@pytest.mark.parametrize("options", [JOINTLY, IN_SEGMENTS])
def test_another_full_disk_is_told_by_its_own_name(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: RenderOptions
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/cache")

    monkeypatch.setattr("posecrafter_rt.avatar_render.render_clip", full)
    with pytest.raises(OSError, match="/elsewhere/cache"):
        render_to_files(avatar, some_poses(9), tmp_path / "out.mp4", options)
    assert not list(tmp_path.iterdir())


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("options", [JOINTLY, IN_SEGMENTS])
def test_what_a_killed_render_had_moved_is_finished_by_itself_alone(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: RenderOptions
) -> None:
    """It dies when the three are in their places, and its folder is still there: nothing else may replace them."""
    poses, video = some_poses(9), tmp_path / "out.mp4"

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialRender, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            render_to_files(avatar, poses, video, options)
    before = files_in(tmp_path)
    assert sorted(before) == ["out.mp4", "out.png", "out.report.json"] and (tmp_path / "out.mp4.partial").exists()
    for other in (JOINTLY, IN_SEGMENTS):
        if other != options:
            with pytest.raises(OutputExists, match=r"out\.mp4 exists already"):
                render_to_files(avatar, poses, video, other)
    monkeypatch.setattr("posecrafter_rt.avatar_render.render_clip", killed)
    report = render_to_files(avatar, poses, video, options)
    assert report == json.loads(before["out.report.json"]) and files_in(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_second_joint_render_into_one_output_is_refused(avatar: Avatar, tmp_path: Path) -> None:
    poses, video, refused = some_poses(3), tmp_path / "out.mp4", []

    def told(step: int, steps: int, stage: str) -> None:
        with pytest.raises(PoseCrafterError, match="another process is rendering into") as caught:
            render_to_files(avatar, poses, video, JOINTLY, force=True)
        refused.append(caught.value)

    render_to_files(avatar, poses, video, JOINTLY, on_step=told)
    assert refused and len(list(tmp_path.iterdir())) == 3


def test_what_was_made_in_an_outputs_place_meanwhile_is_kept(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is the render, which force, or another place for that file, then finishes without any work."""
    poses, video = some_poses(3), tmp_path / "out.mp4"

    def told(step: int, steps: int, stage: str) -> None:
        (tmp_path / "out.png").write_bytes(b"mine")

    with pytest.raises(OutputExists, match=r"out\.png exists already"):
        render_to_files(avatar, poses, video, JOINTLY, on_step=told)
    assert files_in(tmp_path) == {"out.png": b"mine"}
    monkeypatch.setattr("posecrafter_rt.avatar_render.render_clip", None)
    with pytest.raises(OutputExists, match=r"out\.png exists already"):
        render_to_files(avatar, poses, video, JOINTLY)
    render_to_files(avatar, poses, video, JOINTLY, force=True)
    assert len(list(tmp_path.iterdir())) == 3 and files_in(tmp_path)["out.png"] != b"mine"


def test_the_video_may_be_named_by_a_string(avatar: Avatar, tmp_path: Path) -> None:
    render_to_files(avatar, some_poses(1), str(tmp_path / "out.mp4"), JOINTLY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png", "out.report.json"]


def test_an_interrupted_joint_render_leaves_nothing(avatar: Avatar, tmp_path: Path) -> None:
    def told(step: int, steps: int, stage: str) -> None:
        if stage == "decoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_to_files(avatar, some_poses(3), tmp_path / "out.mp4", JOINTLY, on_step=told)
    assert not list(tmp_path.iterdir())
