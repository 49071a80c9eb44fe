"""`render --segment`: killed at any moment, the same command goes on and gives the bytes of an unbroken run."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from posecrafter_rt import avatar_networks
from posecrafter_rt.atomic import sha256_file
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.cli.main import app
from posecrafter_rt.engines.torch import TorchEngine
from posecrafter_rt.framing import contact_sheet
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.memory import KEPT_LENGTHS, USED_SHARE
from posecrafter_rt.runtime.partial import read_state
from posecrafter_rt.runtime.presets import PRESETS
from posecrafter_rt.tuning import TuneOptions, tune
from posecrafter_rt.video_io import VideoWriter, read_video
from tests.cli.kill_scripts import CHAOS, PAIR, VICTIMS
from tests.render_scripts import run_lines

SIZE, COUNT, SEGMENTS, SEED = (32, 32), 14, 3, 3
# Where each dies, and then: how many segments are finished, and whether the video is in its place.
MOMENTS = {
    "in the second segment": ("posecrafter_rt.avatar_render.render_clip", 2, 1, False),
    "while it is written": (
        "posecrafter_rt.runtime.partial.sha256_file",
        2,
        1,
        False,
    ),  # the first call checks the first
    "while the video is encoded": ("posecrafter_rt.video_io.VideoWriter._encode", 7, SEGMENTS, False),
    "when all is in its place": ("posecrafter_rt.runtime.partial.PartialRender.remove", 1, SEGMENTS, True),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def workshop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with poses of 14 frames and an engine tuned on the first three."""
    folder = tmp_path_factory.mktemp("workshop")
    rng = np.random.default_rng(0)
    points = rng.uniform(4, 28, (1, 134, 2)) + rng.normal(0, 1, (COUNT, 134, 2))
    poses = PoseSequence(np.concatenate([points, np.ones((COUNT, 134, 1))], -1).astype(np.float32), SIZE, 25.0)
    poses.save(folder / "poses.json")
    tune(rng.integers(0, 256, (3, *SIZE, 3), np.uint8), poses[:3], folder / "tuned.ckpt",
         TuneOptions(base=str(tiny_base), frames=3, steps=2, precision="fp32"))  # fmt: skip
    build_engine(folder / "tuned.ckpt", folder / "tuned.engine", BuildOptions("torch", "fp32"))
    return folder


def command(workshop: Path, output: Path, *more: object) -> list[str]:
    return [str(word) for word in ("render", workshop / "tuned.engine", "--poses", workshop / "poses.json", "-o", output,
                                   "--steps", 2, "--segment", 6, "--overlap", 2, *more)]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(workshop: Path) -> Path:
    return render_unbroken(workshop)


def render_unbroken(workshop: Path) -> Path:
    result = run(*command(workshop, workshop / "unbroken" / "out.mp4"))
    assert result.exit_code == 0, result.output
    assert f"{SEGMENTS} of 6 frames at most, 2 shared" in result.output
    assert sorted(path.name for path in (workshop / "unbroken").iterdir()) == ["out.mp4", "out.png", "out.report.json"]
    return workshop / "unbroken"


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_and_the_same_command_gives_the_same_bytes(
    workshop: Path, unbroken: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, backend: str
) -> None:
    if backend != "torch":
        pytest.importorskip(backend)
        folder = tmp_path_factory.mktemp(backend)
        shutil.copy(workshop / "poses.json", folder)
        build_engine(workshop / "tuned.ckpt", folder / "tuned.engine", BuildOptions(backend, "fp32"))
        workshop, unbroken = folder, render_unbroken(folder)
    output = tmp_path / "out.mp4"
    moments = json.dumps([moment[:2] for moment in MOMENTS.values()])
    seen, messages = run_lines([sys.executable, "-c", VICTIMS], output, moments, *command(workshop, output))
    expected = [[-signal.SIGKILL, *moment[2:]] for moment in MOMENTS.values()]
    assert dict(zip(MOMENTS, seen, strict=False)) == dict(zip(MOMENTS, expected, strict=True)), messages
    result = run(*command(workshop, output))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png", "out.report.json"]
    for name in ("out.mp4", "out.png"):
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes(), name
    report, whole = (json.loads((folder / "out.report.json").read_text()) for folder in (tmp_path, unbroken))
    assert report["num_resumed"] == SEGMENTS and whole["num_resumed"] == 0
    for name in ("num_frames", "num_segments", "reference_index", "edited_regions", "skipped_regions", "options"):
        assert report[name] == whole[name], name
    assert set(report["seconds"]) == {"prepare", "invert", "denoise", "decode"}


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_nothing_half_done_and_the_same_bytes(
    workshop: Path, unbroken: Path, tmp_path: Path, kills: int
) -> None:
    """At any instruction, of the interpreter or of a library: while a cache, a segment or the video is written, too."""
    output = tmp_path / "out.mp4"
    expected = {name: sha256_file(unbroken / name) for name in ("out.mp4", "out.png")}
    seen, messages = run_lines([sys.executable, "-c", CHAOS], SEED, kills, output, workshop / "tuned.engine" / "inversions",
                                *command(workshop, output))  # fmt: skip
    assert [status for status, *_ in seen].count(-signal.SIGKILL) == kills, messages
    assert [status for status, *_ in seen[:2]] == [0, 0], "these are not killed: they tell how long a run takes"
    for status, finished, hashes in seen:
        assert {name: hashes[name] for name in expected if name in hashes}.items() <= expected.items()
        assert set(hashes) == {*expected, "out.report.json"} if finished is None and hashes else status != 0
    if kills == 50:
        assert any(finished for _, finished, _ in seen), "no run was killed with segments finished"
    if seen[-1][1] is not None or not seen[-1][2]:
        result = run(*command(workshop, output))
        assert result.exit_code == 0, result.output
        assert {name: sha256_file(tmp_path / name) for name in expected} == expected
        json.loads((tmp_path / "out.report.json").read_text())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png", "out.report.json"]


def test_two_renders_by_one_avatar_at_once_do_not_disturb_each_other(
    workshop: Path, unbroken: Path, tmp_path: Path
) -> None:
    inversions = workshop / "tuned.engine" / "inversions"
    for file in inversions.iterdir():
        file.unlink()
    outputs = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    seen, messages = run_lines([sys.executable, "-c", PAIR], *outputs, *command(workshop, tmp_path / "later.mp4"))
    assert seen == [[0, 0]], messages
    for output in outputs:
        assert output.read_bytes() == (unbroken / "out.mp4").read_bytes()
    assert [file.suffix for file in inversions.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(("network", "moment"), [("unet", 3), ("vae_decoder", 5)])
def test_a_render_that_runs_out_of_memory_says_so_and_keeps_what_is_finished(
    workshop: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, moment: int
) -> None:
    """From the first call of a network for the second segment on: shorter segments, the same frame again and networks
    loaded anew do not help. Each segment takes 2 steps, and the first settles 4 frames.
    """
    output = tmp_path / "out.mp4"
    original, calls = TorchEngine.__call__, []

    def starved(engine: TorchEngine, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        is_inversion = network == "unet" and len(inputs.get("latents", ())) == 1
        if engine.spec.name == network and not is_inversion:
            calls.append(1)
            if len(calls) >= moment:
                torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space holds
        return original(engine, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "__call__", starved)
        result = run(*command(workshop, output))
    assert result.exit_code == 1 and result.stderr.count("error: memory ran out") == 1
    assert "hint: free some memory and run the same command again" in result.stderr
    state = read_state(tmp_path / "out.mp4.partial")
    assert state is not None and len(state["segments"]) == 1
    again = run(*command(workshop, output))
    assert again.exit_code == 0 and "1 from an interrupted run" in again.output
    assert output.read_bytes() == (unbroken / "out.mp4").read_bytes()


def test_a_render_that_ends_in_shorter_segments_says_so(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TorchEngine.__call__

    def starved(engine: TorchEngine, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if engine.spec.name == "unet" and len(inputs["latents"]) > 4:
            torch.empty(1 << 60, dtype=torch.uint8)
        return original(engine, **inputs)

    monkeypatch.setattr(TorchEngine, "__call__", starved)
    result = run(*command(workshop, tmp_path / "out.mp4"))
    assert result.exit_code == 0, result.output
    assert "from frame 0 on segments of 3 frames at most, 1 shared: memory ran out" in result.stdout
    assert "segment 3" in result.stdout  # among the approximations
    assert "7 of 3 frames at most, 1 shared" in result.stdout
    joint = ["render", workshop / "tuned.engine", "--poses", workshop / "poses.json", "--steps", 2]
    result = run(*joint, "-o", tmp_path / "joint.mp4")
    assert result.exit_code == 0 and "7 of 3 frames at most, 1 shared" in result.stdout
    calls: list[int] = []

    def starved_later(engine: TorchEngine, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if engine.spec.name == "unet" and len(inputs["latents"]) > 1:
            calls.append(1)
            if len(calls) > 2:  # the first segment's two steps
                return starved(engine, **inputs)
        return original(engine, **inputs)

    monkeypatch.setattr(TorchEngine, "__call__", starved_later)
    result = run(*command(workshop, tmp_path / "later.mp4"))
    report = json.loads((tmp_path / "later.report.json").read_text())
    assert report["segments"][:2] == [6, 3] and [*report["overlaps"][:2], report["overlaps"][-1]] == [2, 1, 0]
    assert f"{len(report['segments'])} of 6 frames at most, 1 to 2 shared" in result.stdout


def give_memory(monkeypatch: pytest.MonkeyPatch, workshop: Path, num_frames: int) -> None:
    """Let the system say that so much is free that segments of `num_frames` fit, no longer ones, nor twice that jointly."""
    with Avatar.load(workshop / "tuned.engine") as loaded:
        room = loaded.networks.room(loaded.resolve())
    free = (room.reserved + KEPT_LENGTHS * room.per_frame * (num_frames + 1.2)) / USED_SHARE
    monkeypatch.setattr(avatar_networks, "free_bytes", lambda device_type: int(free))


def test_automatic_segments_stay_as_they_were_chosen_when_a_render_is_resumed(
    workshop: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.mp4"
    automatic = command(workshop, output, "--segment", "auto")
    give_memory(monkeypatch, workshop, 6)
    result = interrupt(monkeypatch, *automatic)
    assert result.exit_code == 130
    give_memory(monkeypatch, workshop, 9)
    again = run(*automatic)
    assert again.exit_code == 0 and f"{SEGMENTS} of 6 frames at most, 2 shared; 6 frames fit, at" in again.output
    assert output.read_bytes() == (unbroken / "out.mp4").read_bytes()
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["options"]["segment"] == 6 and report["num_resumed"] == SEGMENTS
    assert report["segment_reason"].startswith("6 frames fit")
    assert run(*automatic, "--force").exit_code == 0
    assert json.loads((tmp_path / "out.report.json").read_text())["options"]["segment"] == COUNT  # it fits jointly


def test_a_joint_render_that_will_hardly_fit_is_announced(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give_memory(monkeypatch, workshop, 3)
    joint = ["render", workshop / "tuned.engine", "--poses", workshop / "poses.json", "--steps", 2]
    result = run(*joint, "-o", tmp_path / "a.mp4")
    assert result.exit_code == 0 and len(caplog.records) == 1 and "--segment auto" in caplog.text
    caplog.clear()
    result = run(*joint, "-o", tmp_path / "b.mp4", "--segment", "auto", "--overlap", 1)
    assert result.exit_code == 0 and not caplog.records and "of 3 frames at most, 1 shared" in result.output


def interrupt(
    monkeypatch: pytest.MonkeyPatch, *arguments: object, at: str = "posecrafter_rt.video_io.VideoWriter.write"
) -> Result:
    """Run a command that Ctrl-C ends at a call, by default when its video is begun."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(at, interrupted)
        return run(*arguments)


def test_an_interrupted_render_goes_on_only_with_the_same_options(
    workshop: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.mp4"
    result = interrupt(monkeypatch, *command(workshop, output))
    assert result.exit_code == 130 and "run the same command again to go on" in result.stderr
    for change in (["--overlap", 1], ["--fps", 30], ["--range", "0:13"]):
        other = run(*command(workshop, output, *change))
        assert other.exit_code == 1 and "unfinished render" in other.output and "--force" in other.output, change
    again = run(*command(workshop, output))
    assert again.exit_code == 0 and f"{SEGMENTS} from an interrupted run" in again.output
    assert output.read_bytes() == (unbroken / "out.mp4").read_bytes()
    done = run(*command(workshop, output))
    assert done.exit_code == 1 and "exists already" in done.output


@pytest.mark.parametrize("segment", [6, "auto"])
def test_whether_the_same_command_goes_on_is_told_by_what_is_finished(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment: object
) -> None:
    """Nothing is before the first segment is done, whatever was asked for; and then it is from the first moment on."""
    for moment, purpose in (
        ("posecrafter_rt.avatar.Avatar.load", "start over"),
        ("posecrafter_rt.avatar_render.render_clip", "start over"),
        ("posecrafter_rt.video_io.VideoWriter.write", "go on"),
        ("posecrafter_rt.avatar.Avatar.load", "go on"),
    ):
        result = interrupt(monkeypatch, *command(workshop, tmp_path / "out.mp4", "--segment", segment), at=moment)
        assert result.exit_code == 130
        assert result.stderr.endswith(f"run the same command again to {purpose}\n"), moment
        assert (tmp_path / "out.mp4.partial").exists() is (purpose == "go on")


def test_nothing_is_written_among_the_poses_that_it_is_made_from(workshop: Path, tmp_path: Path) -> None:
    """The report would be read as one of them by the next command."""
    shutil.copy(workshop / "poses.json", tmp_path)
    result = run(*command(workshop, tmp_path / "out.mp4", "--poses", tmp_path, "--force"))
    assert result.exit_code == 1 and "would lie among the poses that it is made from" in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["poses.json"]


def test_an_output_that_cannot_be_written_is_refused_before_the_engine_is_loaded(
    workshop: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "folder" / "out.mp4"
    result = run("render", tmp_path / "none.engine", "--poses", workshop / "poses.json", "-o", output)
    told = " ".join(result.output.split())
    assert result.exit_code == 1 and f"cannot write {output}: {tmp_path / 'file'} is no folder" in told
    assert "hint: choose a folder that you may write to" in told


@pytest.mark.parametrize(("given", "named"), [(("-o", "out.webm"), "out.webm is not the name of a video"),
                                              (("-o", "out.mp4", "--fps", "1e9"), "fps is 1000000000.0")])  # fmt: skip
def test_a_video_that_cannot_be_written_is_refused_before_the_engine_is_loaded(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("render", tmp_path / "none.engine", "--poses", workshop / "poses.json", *given)
    assert result.exit_code == 1 and named in result.output and not list(tmp_path.iterdir())


def test_a_frame_without_a_usable_point_goes_by_its_number_in_the_file(workshop: Path, tmp_path: Path) -> None:
    """Where the reference is selected by the poses; the mode that does not renders it, too."""
    poses = PoseSequence.load(workshop / "poses.json")
    poses.keypoints[5, :, 2] = 0.2
    poses.save(tmp_path / "poses.json")
    result = run(*command(workshop, tmp_path / "out.mp4", "--poses", tmp_path / "poses.json", "--range", "4:8"))
    assert result.exit_code == 1
    assert "poses.json does not show the person in 1 of 4 frames: 5" in " ".join(result.stderr.split())
    assert "keypoints count from confidence 0.3 on" in result.stderr
    result = run("render", workshop / "tuned.engine", "--poses", tmp_path / "poses.json", "--range", "4:8",
                 "--steps", 2, "--mode", "controlvideo", "-o", tmp_path / "out.mp4")  # fmt: skip
    assert result.exit_code == 0, result.output


def test_force_throws_another_unfinished_render_away(
    workshop: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.mp4"
    assert interrupt(monkeypatch, *command(workshop, output, "--overlap", 1)).exit_code == 130
    assert (tmp_path / "out.mp4.partial").exists()
    assert run(*command(workshop, output, "--force")).exit_code == 0
    assert output.read_bytes() == (unbroken / "out.mp4").read_bytes()
    assert not (tmp_path / "out.mp4.partial").exists()


def test_the_sheet_of_a_stream_is_that_of_all_its_frames(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which frames are picked, not how they are drawn: a sheet made of every frame is the same picture."""
    rows: list[list] = []
    monkeypatch.setattr(
        "posecrafter_rt.rendering.contact_sheet", lambda given: rows.append(given) or contact_sheet(given)
    )
    written: list[np.ndarray] = []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frame: written.append(frame.copy()) or write(self, frame))
    for output, more in ((tmp_path / "a.mp4", []), (tmp_path / "b.mp4", ["--segment", 20])):
        written.clear()
        assert run(*command(workshop, output, *more)).exit_code == 0
        (_, reference), (_, poses), (_, rendered) = rows.pop()
        assert len(rendered) == len(poses) == 8 and len(written) == COUNT
        whole = contact_sheet([("reference", reference), ("rendered", written)])
        assert np.array_equal(contact_sheet([("reference", reference), ("rendered", rendered)]), whole)
    assert len(read_video(tmp_path / "a.mp4")) == COUNT


def test_segments_of_no_number_are_bad_usage(workshop: Path, tmp_path: Path) -> None:
    result = run(*command(workshop, tmp_path / "out.mp4", "--segment", "some"))
    assert result.exit_code == 2 and "'some' is no number of frames" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "named"), [(["--segment", 0], "segments of 0 frames"),
                                             (["--segment", 5], "give an overlap of 0 to 1"),
                                             (["--mode", "+selection"], "no key frame is common")])  # fmt: skip
def test_bad_segments_are_one_clear_line_and_write_nothing(
    workshop: Path, tmp_path: Path, more: list[object], named: str
) -> None:
    result = run(*command(workshop, tmp_path / "out.mp4", *more))
    assert result.exit_code == 1 and named in result.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "exact"])
def test_a_preset_is_all_that_it_bundles(workshop: Path, tmp_path: Path, preset: str) -> None:
    result = run("render", workshop / "tuned.engine", "--poses", workshop / "poses.json", "--range", "0:2",
                 "-o", tmp_path / "out.mp4", "--preset", preset, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    used = json.loads(result.stdout)["options"]
    assert {name: used[name] for name in PRESETS[preset]} == PRESETS[preset]


def test_what_is_given_beside_a_preset_overrules_it(workshop: Path, tmp_path: Path) -> None:
    result = run("render", workshop / "tuned.engine", "--poses", workshop / "poses.json", "--range", "0:2",
                 "-o", tmp_path / "out.mp4", "--preset", "fast", "--sampler", "ddim", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    steps = PRESETS["fast"]["num_inference_steps"]
    for report in (json.loads(result.stdout), json.loads((tmp_path / "out.report.json").read_text())):
        assert (report["options"]["sampler"], report["options"]["num_inference_steps"]) == ("ddim", steps)
        assert report["approximations"] == {"num_inference_steps": steps}
