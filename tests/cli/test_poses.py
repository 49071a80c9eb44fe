"""Tests of `poses extract` and `poses preview`.

Tests; no layer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.cli.poses import app
from posecrafter_rt.errors import OutputExists, PoseCrafterError, PoseError
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence
from posecrafter_rt.video_io import read_video, write_png, write_video
from tests.cli.conftest import PeakBytes

# One person, whose 33 pose points are where the picture is bright; nobody in a dark picture.
MEDIAPIPE = """
from types import SimpleNamespace as N
class Holistic:
    def __init__(self, model_complexity): pass
    def process(self, picture):
        points = [N(x=0.25 + i / 100, y=0.5, visibility=0.9) for i in range(33)]
        pose = N(landmark=points) if picture.mean() > 100 else None
        return N(pose_landmarks=pose, face_landmarks=None, left_hand_landmarks=None, right_hand_landmarks=None)
solutions = N(holistic=N(Holistic=Holistic))
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def python(tmp_path: Path) -> Path:
    library = tmp_path / "library"
    library.mkdir()
    (library / "mediapipe.py").write_text(MEDIAPIPE)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{library}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


def video(path: Path, *levels: int) -> Path:
    frames = np.zeros((len(levels), 48, 64, 3), np.uint8)
    frames[:] = np.array(levels, np.uint8)[:, None, None, None]
    write_video(path, frames, 25.0, force=False)
    return path


@pytest.fixture
def poses(tmp_path: Path) -> Path:
    keypoints = np.random.default_rng(3).random((5, NUM_KEYPOINTS, 3)) * [64, 48, 1]
    PoseSequence(keypoints, (48, 64), 12.5).save(tmp_path / "poses.json")
    return tmp_path / "poses.json"


def test_extract_writes_poses_and_reports(python: Path, tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", 200, 200, 0, 200)
    output = tmp_path / "out.json"
    result = run("extract", clip, "-o", output, "--detector", "mediapipe", "--python", python, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["frames"], record["height"], record["width"], record["fps"]) == (4, 48, 64, 25.0)
    assert record["detector"] == "mediapipe"
    assert record["usable"]["body"] == 0.75
    assert record["frames_without_person"] == [2]
    assert "warning: 1 of 4 frames do not show the person: 2" in result.stderr
    with pytest.raises(PoseError, match="frame 2 does not show the person"):
        PoseSequence.load(output)


def test_extract_does_not_start_if_it_could_not_save(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text("mine")
    result = run("extract", tmp_path / "none.mp4", "-o", output)
    assert isinstance(result.exception, OutputExists)
    assert output.read_text() == "mine"


def test_extract_does_not_start_where_it_could_not_save(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("extract", tmp_path / "none.mp4", "-o", tmp_path / "file" / "out.json")
    assert isinstance(result.exception, PoseCrafterError)
    assert f"out.json: {tmp_path / 'file'} is no folder" in str(result.exception)


def test_extract_warns_of_the_frames_that_a_render_refuses(python: Path, tmp_path: Path) -> None:
    """Whose points all lie below the confidence that counts."""
    library = tmp_path / "library" / "mediapipe.py"
    library.write_text(MEDIAPIPE.replace("visibility=0.9", "visibility=0.2 if picture.mean() < 150 else 0.9"))
    clip = video(tmp_path / "clip.mp4", 200, 120, 200)
    result = run("extract", clip, "-o", tmp_path / "out.json", "--detector", "mediapipe", "--python", python, "--json")
    assert json.loads(result.stdout)["frames_without_person"] == [1], result.output
    assert "warning: 1 of 3 frames do not show the person: 1" in result.stderr


def test_extract_prints_a_line_for_people(python: Path, tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", 200, 200)
    result = run("extract", clip, "-o", tmp_path / "out.json", "--detector", "mediapipe", "--python", python)
    assert result.exit_code == 0, result.output
    assert "2 frames, 64 x 48, detected by mediapipe" in result.stdout
    assert "body 100%, feet 67%, face 0%" in result.stdout
    assert "warning" not in result.stderr and "hint" not in result.stderr


def test_preview_as_video(poses: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    result = run("preview", poses, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    # The canvas, times the whole number that brings its short side to 512.
    assert json.loads(result.stdout) == {
        "output": str(output), "frames": 5, "height": 528, "width": 704, "fps": 12.5,
    }  # fmt: skip
    drawn = read_video(output)
    assert drawn.frames.shape == (5, 528, 704, 3)
    assert drawn.fps == pytest.approx(12.5)
    assert drawn.frames.max() > 200


def test_preview_beside_the_video(poses: Path, tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", *[200] * 6)
    output = tmp_path / "out.mp4"
    result = run("preview", poses, "-o", output, "--video", clip, "--size", "96x128", "--fps", "10")
    assert result.exit_code == 0, result.output
    drawn = read_video(output)
    assert drawn.frames.shape == (5, 96, 256, 3)
    assert drawn.fps == pytest.approx(10)
    assert abs(float(drawn.frames[:, :, :120].mean()) - 200) < 8
    assert drawn.frames[:, :, 136:].mean() < 100


def test_the_drawing_is_cut_as_the_video_is(tmp_path: Path) -> None:
    # A white column beside the centre, and a face point upon it; a square is cut out of the wide picture.
    frames = np.zeros((1, 48, 96, 3), np.uint8)
    frames[:, :, 60:64] = 255
    write_video(tmp_path / "clip.mp4", frames, 25.0)
    keypoints = np.zeros((1, NUM_KEYPOINTS, 3))
    keypoints[0, 30] = [61.5, 23.5, 1]
    PoseSequence(keypoints, (48, 96)).save(tmp_path / "poses.json")
    output = tmp_path / "out.mp4"
    result = run(
        "preview", tmp_path / "poses.json", "-o", output, "--video", tmp_path / "clip.mp4", "--size", "256x256"
    )
    assert result.exit_code == 0, result.output
    both = read_video(output).frames[0].astype(float).mean(axis=2)
    columns = np.arange(256)
    centres = [(half.sum(axis=0) * columns).sum() / half.sum() for half in (both[:, :256], both[:, 256:])]
    assert abs(centres[0] - centres[1]) < 2


def test_poses_of_another_shape_are_cut_as_a_render_cuts_them(tmp_path: Path) -> None:
    keypoints = np.zeros((1, NUM_KEYPOINTS, 3))
    keypoints[0, 30] = [61.5, 23.5, 1]  # 14 px beside the centre, in a picture of 48 x 96
    PoseSequence(keypoints, (48, 96)).save(tmp_path / "poses.json")
    result = run("preview", tmp_path / "poses.json", "-o", tmp_path / "out.mp4", "--size", "256x256")
    assert result.exit_code == 0, result.output
    drawn = read_video(tmp_path / "out.mp4").frames[0].astype(float).mean(axis=2)
    centre = (drawn.sum(axis=0) * np.arange(256)).sum() / drawn.sum()
    assert abs(centre - (127.5 + 14 * 256 / 48)) < 2


def test_preview_as_contact_sheet(poses: Path, tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", *[200] * 5)
    for extra, rows in ((), 1), (("--video", clip), 2):
        for size, height, width in (("48x64", 128, 171), ("150x200", 150, 200), ("480x640", 256, 341)):
            output = tmp_path / f"sheet{rows}of{size}.png"
            result = run("preview", poses, "-o", output, "--size", size, "--json", *extra)
            assert result.exit_code == 0, result.output
            told = json.loads(result.stdout)
            assert (told["height"], told["width"]) == (height, width)
            assert cv2.imread(str(output)).shape[:2] == ((height + 4) * rows, (width + 4) * 5)  # 4 px between them


@pytest.mark.parametrize("name", ["out.mp4", "out.png"])
def test_preview_decodes_the_video_as_it_draws(tmp_path: Path, peak_bytes: PeakBytes, name: str) -> None:
    levels = np.linspace(20, 220, 100).round().astype(int)
    keypoints = np.random.default_rng(3).random((100, NUM_KEYPOINTS, 3)) * [64, 48, 0.1]  # nothing that is drawn
    PoseSequence(keypoints, (48, 64), 25.0).save(tmp_path / "poses.json")
    clip = video(tmp_path / "clip.mp4", *levels)
    arguments = (
        "preview",
        tmp_path / "poses.json",
        "-o",
        tmp_path / name,
        "--video",
        clip,
        "--size",
        "128x160",
        "--force",
    )
    result, peak = peak_bytes(lambda: run(*arguments))
    assert result.exit_code == 0, result.output
    assert peak < 100 * 128 * 160 * 3
    if name == "out.mp4":
        shown = read_video(tmp_path / name).frames[:, 10:-10, 10:150].mean(axis=(1, 2, 3))
    else:
        levels = levels[[0, 14, 28, 42, 57, 71, 85, 99]]
        shown = cv2.imread(str(tmp_path / name))[64, 80 : 8 * 164 : 164].mean(axis=1)
    assert np.abs(shown - levels).max() < 4


def test_preview_shows_frames_without_the_person(tmp_path: Path) -> None:
    keypoints = np.ones((2, NUM_KEYPOINTS, 3)) * [30, 20, 1]
    keypoints[1] = 0
    PoseSequence(keypoints, (48, 64)).save(tmp_path / "poses.json")
    assert run("preview", tmp_path / "poses.json", "-o", tmp_path / "out.png").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.gif"], "neither .mp4 nor .png"),
        (["-o", "out.mp4", "--size", "0x5"], "is not a size"),
        (["-o", "out.mp4", "--size", "512"], "is not a size"),
        (["-o", "out.mp4", "--fps", "0"], "--fps"),
    ],
)
def test_bad_usage_exits_with_2(
    poses: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("preview", poses, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.fixture
def openpose(poses: Path, tmp_path: Path) -> Path:
    """The same poses as the OpenPose program writes them: a file for each frame, none of which tells of the picture."""
    folder = tmp_path / "openpose"
    folder.mkdir()
    for index, frame in enumerate(json.loads(poses.read_text())["frames"]):
        (folder / f"v_{index:012}_keypoints.json").write_text(json.dumps({"version": 1.3, **frame}))
    return folder


def test_preview_is_told_the_size_of_the_picture_or_has_it_from_the_video(openpose: Path, tmp_path: Path) -> None:
    refused = run("preview", openpose, "-o", tmp_path / "a.png")
    assert isinstance(refused.exception, PoseError) and "--canvas HEIGHTxWIDTH" in (refused.exception.hint or "")
    told = run("preview", openpose, "-o", tmp_path / "a.mp4", "--canvas", "48x64", "--json")
    assert json.loads(told.stdout)["height"] == 528, told.output
    clip = video(tmp_path / "clip.mp4", *[200] * 5)
    beside = run("preview", openpose, "-o", tmp_path / "b.mp4", "--video", clip, "--json")
    assert json.loads(beside.stdout)["height"] == 528, beside.output
    assert run("preview", openpose, "-o", tmp_path / "c.png", "--canvas", "48").exit_code == 2


def test_a_video_that_is_too_short_is_refused_before_anything_is_drawn(
    poses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.poses.draw.draw_pose", None)
    short = run("preview", poses, "-o", tmp_path / "out.mp4", "--video", video(tmp_path / "clip.mp4", 200, 200))
    assert isinstance(short.exception, PoseError)
    assert "has 2 frames, but there are 5 poses" in str(short.exception)


def test_preview_refusals(poses: Path, tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.mp4", 200, 200)
    short = run("preview", poses, "-o", tmp_path / "out.png", "--video", clip)
    assert isinstance(short.exception, PoseError)
    assert "has 2 frames, but there are 5 poses" in str(short.exception)
    (tmp_path / "out.png").write_text("mine")
    again = run("preview", poses, "-o", tmp_path / "out.png")
    assert isinstance(again.exception, OutputExists)
    assert run("preview", poses, "-o", tmp_path / "out.png", "--force").exit_code == 0


@pytest.mark.parametrize("command", ["extract", "preview"])
def test_the_video_that_is_read_is_not_replaced_even_by_force(poses: Path, tmp_path: Path, command: str) -> None:
    clip = video(tmp_path / "clip.mp4", 200, 200)
    before = clip.read_bytes()
    given = [clip] if command == "extract" else [poses, "--video", clip]
    result = run(command, *given, "-o", clip, "--force")
    assert isinstance(result.exception, OutputExists) and clip.read_bytes() == before


def test_a_preview_replaces_no_image_of_the_folder_that_is_read(poses: Path, tmp_path: Path) -> None:
    for index in range(5):
        write_png(tmp_path / "images" / f"{index}.png", np.full((48, 64, 3), 200, np.uint8))
    output = tmp_path / "images" / "0.png"
    before = output.read_bytes()
    result = run("preview", poses, "--video", tmp_path / "images", "-o", output, "--force")
    assert isinstance(result.exception, OutputExists) and output.read_bytes() == before


def test_a_sheet_does_not_lie_among_the_images_that_are_read(poses: Path, tmp_path: Path) -> None:
    """The next preview would take it for one of them."""
    for index in range(5):
        write_png(tmp_path / "images" / f"{index}.png", np.full((48, 64, 3), 200, np.uint8))
    given = ("preview", poses, "--video", tmp_path / "images", "--size", "48x64", "-o")
    result = run(*given, tmp_path / "images" / "look.png")
    assert isinstance(result.exception, OutputExists)
    assert "look.png would lie among the images that it is made from" in str(result.exception)
    assert run(*given, tmp_path / "images" / "look.mp4").exit_code == 0  # which is none


# A real process: handlers as at a terminal, which a job in the background does not inherit.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from posecrafter_rt.cli.main import main; main()\n"
)
# From its second picture on the detector says so, in a file, and takes its time.
SLOW = """
import pathlib, time
Quick = solutions.holistic.Holistic
class Slow(Quick):
    def process(self, picture):
        note = pathlib.Path(__file__).with_name("note")
        if note.exists():
            note.with_name("busy").touch()
            time.sleep(60)
        note.touch()
        return super().process(picture)
solutions.holistic.Holistic = Slow
"""


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def interrupt(process: subprocess.Popen[str], output: Path) -> None:
    """Ctrl-C, as a terminal sends it: to the command and all that it started. Then nothing is left, and one line tells."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.rstrip().endswith("interrupted; run the same command again to start over")
    assert not [path for path in output.parent.iterdir() if output.stem in path.name]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no detector of it goes on


def start(*arguments: object, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "TMPDIR": str(folder)})  # fmt: skip


def test_ctrl_c_ends_the_detection(python: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    with (library / "mediapipe.py").open("a") as file:
        file.write(SLOW)
    (tmp_path / "temporary").mkdir()
    clip, output = video(tmp_path / "clip.mp4", *[200] * 40), tmp_path / "out.json"
    process = start("poses", "extract", clip, "-o", output, "--detector", "mediapipe", "--python", python,
                    folder=tmp_path / "temporary")  # fmt: skip
    wait_for((library / "busy").exists, process)
    interrupt(process, output)
    assert not list((tmp_path / "temporary").iterdir())


def test_ctrl_c_ends_a_preview(tmp_path: Path) -> None:
    keypoints = np.random.default_rng(3).random((400, NUM_KEYPOINTS, 3)) * [64, 48, 1]
    PoseSequence(keypoints, (48, 64), 12.5).save(tmp_path / "poses.json")
    output = tmp_path / "drawn.mp4"
    process = start("poses", "preview", tmp_path / "poses.json", "-o", output, "--size", "2400x3200", folder=tmp_path)
    wait_for(lambda: any(tmp_path.glob(".drawn*")), process)
    interrupt(process, output)
