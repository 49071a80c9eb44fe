"""`render --segment`: killed at any moment, the same command goes on and gives the bytes of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.cli.main import app
from posecrafter_rt.framing import contact_sheet
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.tuning import TuneOptions, tune
from posecrafter_rt.video_io import VideoWriter, read_video

ROOT = Path(__file__).parents[2]
SIZE, COUNT, SEGMENTS = (32, 32), 14, 3
# Runs the command once for each moment, in a process of its own that kills itself (SIGKILL: nothing is cleaned up) at
# the n-th call of a function. Forked from one that has only imported what takes long to import.
VICTIMS = """
import json, os, pkgutil, signal, sys
import posecrafter_rt.rendering
from posecrafter_rt.cli.main import main

def die_at(target, moment):
    owner, name = target.rsplit(".", 1)
    original, calls = pkgutil.resolve_name(target), []
    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(pkgutil.resolve_name(owner), name, killed)

output, moments, sys.argv = sys.argv[1], json.loads(sys.argv[2]), ["posecrafter-rt", *sys.argv[3:]]
for target, call in moments:
    victim = os.fork()
    if not victim:
        die_at(target, call)
        main()
    status = os.waitpid(victim, 0)[1]
    with open(output + ".partial/state.json") as state:
        finished = len(json.load(state)["segments"])
    print(json.dumps([os.waitstatus_to_exitcode(status), finished, os.path.exists(output)]), flush=True)
"""
# Where each dies, and then: how many segments are finished, and whether the video is in its place.
MOMENTS = {
    "in the second segment": ("posecrafter_rt.avatar.render_clip", 2, 1, False),
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
    result = run(*command(workshop, workshop / "unbroken" / "out.mp4"))
    assert result.exit_code == 0, result.output
    assert f"{SEGMENTS} of 6 frames at most, 2 shared" in result.output
    assert sorted(path.name for path in (workshop / "unbroken").iterdir()) == ["out.mp4", "out.png", "out.report.json"]
    return workshop / "unbroken"


def test_kill_9_at_any_moment_and_the_same_command_gives_the_same_bytes(
    workshop: Path, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.mp4"
    moments = json.dumps([moment[:2] for moment in MOMENTS.values()])
    victims = subprocess.run(
        [sys.executable, "-c", VICTIMS, str(output), moments, *command(workshop, output)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)  # fmt: skip
    seen = [tuple(json.loads(line)) for line in victims.stdout.splitlines()]
    expected = [(-signal.SIGKILL, *moment[2:]) for moment in MOMENTS.values()]
    assert dict(zip(MOMENTS, seen, strict=False)) == dict(zip(MOMENTS, expected, strict=True)), victims.stderr
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


def interrupt(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    """Run a command that Ctrl-C ends when its video is begun."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", interrupted)
        return run(*arguments)


def test_an_interrupted_render_goes_on_only_with_the_same_options(
    workshop: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.mp4"
    result = interrupt(monkeypatch, *command(workshop, output))
    assert result.exit_code == 130 and "run the same command again" in result.stderr
    for change in (["--overlap", 1], ["--fps", 30], ["--range", "0:13"]):
        other = run(*command(workshop, output, *change))
        assert other.exit_code == 1 and "unfinished render" in other.output and "--force" in other.output, change
    again = run(*command(workshop, output))
    assert again.exit_code == 0 and f"{SEGMENTS} from an interrupted run" in again.output
    assert output.read_bytes() == (unbroken / "out.mp4").read_bytes()
    done = run(*command(workshop, output))
    assert done.exit_code == 1 and "exists already" in done.output


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


@pytest.mark.parametrize(("more", "named"), [(["--segment", 0], "segments of 0 frames"),
                                             (["--segment", 5], "give an overlap of 0 to 1"),
                                             (["--mode", "+selection"], "no key frame is common")])  # fmt: skip
def test_bad_segments_are_one_clear_line_and_write_nothing(
    workshop: Path, tmp_path: Path, more: list[object], named: str
) -> None:
    result = run(*command(workshop, tmp_path / "out.mp4", *more))
    assert result.exit_code == 1 and named in result.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())
