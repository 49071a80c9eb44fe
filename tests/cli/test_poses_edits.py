"""Tests of `poses retarget` and `poses edit`.

Tests; no layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from posecrafter_rt.checkpoint import REQUIRED_METADATA, Checkpoint
from posecrafter_rt.cli.poses import app
from posecrafter_rt.engine_training import REFERENCE_FILE
from posecrafter_rt.engines.folder import building
from posecrafter_rt.errors import CheckpointError, EngineFolderError, OutputExists, PoseError
from posecrafter_rt.poses.edit import blink, turn_head, wave
from posecrafter_rt.poses.fit import Similarity
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence
from posecrafter_rt.poses.retarget import find_ratios, retarget


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def somebody(num_frames: int = 20) -> PoseSequence:
    """Every point is seen, and drifts."""
    place = np.random.default_rng(3).uniform(10, 90, (NUM_KEYPOINTS, 2)).round(2)
    points = place + np.linspace(0, 5, num_frames).round(2)[:, np.newaxis, np.newaxis]
    return PoseSequence(np.concatenate([points, np.ones((*points.shape[:2], 1))], axis=2), (100, 120), 24.0)


@pytest.fixture
def me(tmp_path: Path) -> Path:
    somebody().save(tmp_path / "me.json")
    return tmp_path / "me.json"


@pytest.fixture
def dance(tmp_path: Path) -> Path:
    larger = Similarity(2.0, 30, 40).apply(somebody().keypoints)
    PoseSequence(larger, (300, 400), 12.5).save(tmp_path / "dance.json")
    return tmp_path / "dance.json"


@pytest.fixture
def openpose(me: Path, tmp_path: Path) -> Path:
    """My poses in a file that does not tell how large the picture is."""
    (tmp_path / "openpose.json").write_text(json.dumps(json.loads(me.read_text())["frames"]))
    return tmp_path / "openpose.json"


def test_a_canvas_is_written_into_a_file_that_has_none(openpose: Path, me: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run("edit", openpose, "-o", output, "--canvas", "100x120", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["changed_frames"] == []
    written, expected = PoseSequence.load(output), PoseSequence.load(me)
    assert written.canvas == (100, 120)
    np.testing.assert_array_equal(written.keypoints, expected.keypoints)


def test_a_dance_is_told_its_canvas(openpose: Path, me: Path, tmp_path: Path) -> None:
    result = run("retarget", openpose, "--to", me, "-o", tmp_path / "out.json", "--canvas", "100x120")
    assert result.exit_code == 0, result.output
    assert isinstance(run("retarget", openpose, "--to", me, "-o", tmp_path / "b.json").exception, PoseError)


def test_retarget_writes_what_the_function_gives(me: Path, dance: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "fitted.json"
    result = run("retarget", dance, "--to", me, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == {
        "output": str(output), "frames": 20, "height": 100, "width": 120, "fps": 12.5, "outside": 0.0,
        "scale": {"body": 0.5, "face_width": 0.5, "face_height": 0.5, "hands": 0.5},
    }  # fmt: skip
    fitted = PoseSequence.load(output)
    expected = retarget(PoseSequence.load(dance), PoseSequence.load(me))
    assert (fitted.canvas, fitted.fps) == ((100, 120), 12.5)
    assert np.abs(fitted.keypoints - expected.keypoints).max() < 0.006  # a file has two decimals
    assert np.abs(fitted.keypoints - somebody().keypoints).max() < 0.02


def test_retarget_prints_lines_for_people(me: Path, dance: Path, tmp_path: Path) -> None:
    result = run("retarget", dance, "--to", me, "-o", tmp_path / "fitted.json")
    assert result.exit_code == 0, result.output
    assert "20 frames, 120 x 100" in result.stdout
    assert "scaled by: body 0.5, face width 0.5, face height 0.5, hands 0.5" in result.stdout
    assert "outside" not in result.stdout


def test_retarget_says_how_much_lies_outside(me: Path, tmp_path: Path) -> None:
    keypoints = somebody().keypoints.copy()
    keypoints[:10, :, 0] += 500
    PoseSequence(keypoints, (100, 700)).save(tmp_path / "far.json")
    result = run("retarget", tmp_path / "far.json", "--to", me, "-o", tmp_path / "fitted.json")
    assert result.exit_code == 0, result.output
    assert "outside the picture: 100% of the usable points" in result.stdout


def write_tuned(folder: Path) -> PoseSequence:
    """Somebody's poses, in a tuned.ckpt and in a me.engine."""
    tuned = somebody(4)
    frames = np.zeros((4, *tuned.canvas, 3), np.uint8)
    metadata = {name: None for name in REQUIRED_METADATA}
    Checkpoint({}, frames, tuned, metadata).save(folder / "tuned.ckpt")
    with building(folder / "me.engine", {}) as staging:
        tensors = {"frames": torch.from_numpy(frames), "keypoints": torch.from_numpy(tuned.keypoints)}
        save_file(tensors, staging / REFERENCE_FILE)
    return tuned


def test_retarget_takes_a_checkpoint_or_an_engine(dance: Path, tmp_path: Path) -> None:
    expected = retarget(PoseSequence.load(dance), write_tuned(tmp_path))
    for name in ("tuned.ckpt", "me.engine"):
        output = tmp_path / f"{name}.json"
        result = run("retarget", dance, "--to", tmp_path / name, "-o", output)
        assert result.exit_code == 0, result.output
        assert np.abs(PoseSequence.load(output).keypoints - expected.keypoints).max() < 0.006


def test_retarget_takes_a_folder_of_pose_files(me: Path, dance: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(json.loads(me.read_text())["frames"]):
        frame |= {"canvas_width": 120, "canvas_height": 100}
        (folder / f"{index}.json").write_text(json.dumps(frame))
    result = run("retarget", dance, "--to", folder, "-o", tmp_path / "fitted.json", "--json")
    assert result.exit_code == 0, result.output
    expected = find_ratios(PoseSequence.load(dance), PoseSequence.load(folder))
    assert json.loads(result.stdout)["scale"]["body"] == round(expected.body, 4)


def test_retarget_refusals(me: Path, dance: Path, tmp_path: Path) -> None:
    output = tmp_path / "fitted.json"
    (tmp_path / "other.ckpt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    keypoints = somebody(1).keypoints.copy()
    keypoints[:, :92] = 0
    PoseSequence(keypoints, (100, 120)).save(tmp_path / "hands.json")
    for to, error, message in (
        (tmp_path / "none.json", PoseError, "no such file"),
        (tmp_path / "other.ckpt", CheckpointError, "no checkpoint"),
        (tmp_path / "empty", PoseError, "no .json file in this folder"),
        (tmp_path / "hands.json", PoseError, "no bone and no face in common"),
    ):
        result = run("retarget", dance, "--to", to, "-o", output)
        assert isinstance(result.exception, error) and message in str(result.exception)
    output.write_text("mine")
    assert isinstance(run("retarget", dance, "--to", me, "-o", output).exception, OutputExists)
    assert output.read_text() == "mine"
    assert run("retarget", dance, "--to", me, "-o", output, "--force").exit_code == 0
    assert len(PoseSequence.load(output)) == 20


def test_retarget_refuses_an_altered_engine(dance: Path, tmp_path: Path) -> None:
    with building(tmp_path / "me.engine", {}) as staging:
        (staging / REFERENCE_FILE).write_bytes(b"reference")
    (tmp_path / "me.engine" / REFERENCE_FILE).write_bytes(b"altered!!")
    result = run("retarget", dance, "--to", tmp_path / "me.engine", "-o", tmp_path / "fitted.json")
    assert isinstance(result.exception, EngineFolderError)


def test_edit_writes_what_the_functions_give(me: Path, tmp_path: Path) -> None:
    output = tmp_path / "edited.json"
    result = run("edit", me, "-o", output, "--blink", "2:5", "--turn-head", "-15.5@0:6", "--wave", "left@8:14",
                 "--wave", "right@:3", "--blink", "18:", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == {"output": str(output), "frames": 20, "height": 100, "width": 120, "fps": 24.0,
                      "changed_frames": [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 18, 19]}  # fmt: skip
    original, edited = PoseSequence.load(me), PoseSequence.load(output)
    expected = blink(blink(turn_head(original, slice(0, 6), -15.5), slice(2, 5)), slice(18, None))
    expected = wave(wave(expected, slice(8, 14), "left"), slice(None, 3), "right")
    assert np.abs(edited.keypoints - expected.keypoints).max() < 0.006
    same = [6, 7, 14, 15, 16, 17]
    assert np.array_equal(edited.keypoints[same], original.keypoints[same])


def test_edit_prints_a_line_for_people(me: Path, tmp_path: Path) -> None:
    result = run("edit", me, "-o", tmp_path / "edited.json", "--blink", "2:5")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith("20 frames, 120 x 100; 3 frames changed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to edit"),
        (["--blink", "5"], "'5' is not a range of frames"),
        (["--blink", "5:2"], "holds no frame"),
        (["--turn-head", "20"], "does not say which frames"),
        (["--turn-head", "far@2:5"], "'far' is no number of degrees"),
        (["--turn-head", "20@2"], "'2' is not a range of frames"),
        (["--wave", "2:5"], "does not say which frames"),
        (["--wave", "both@2:5"], "'both' is no side"),
    ],
)
def test_bad_usage_exits_with_2(me: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("edit", me, "-o", tmp_path / "edited.json", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "edited.json").exists()


def test_edit_refusals(me: Path, tmp_path: Path) -> None:
    output = tmp_path / "edited.json"
    for arguments, message in (
        (["--blink", "10:21"], "there are 20 poses, and 10:21 is not within them"),
        (["--turn-head", "80@2:5"], "a turn of 80 degrees"),
        (["--turn-head", "nan@2:5"], "a turn of nan degrees"),
    ):
        result = run("edit", me, "-o", output, *arguments)
        assert isinstance(result.exception, PoseError) and message in str(result.exception)
    assert not output.exists()
    output.write_text("mine")
    assert isinstance(run("edit", me, "-o", output, "--blink", "2:5").exception, OutputExists)
    assert output.read_text() == "mine"
    assert run("edit", me, "-o", output, "--blink", "2:5", "--force").exit_code == 0


def test_what_is_read_is_not_replaced_even_by_force(me: Path, dance: Path, tmp_path: Path) -> None:
    write_tuned(tmp_path)
    folder, tuned, engine = tmp_path / "frames", tmp_path / "tuned.ckpt", tmp_path / "me.engine"
    folder.mkdir()
    frame = json.loads(me.read_text())["frames"][0]
    for name in ("0.json", "1.JSON"):
        (folder / name).write_text(json.dumps(frame | {"canvas_width": 120, "canvas_height": 100}))
    for given, output in (
        (("edit", me, "--fill", 1), me),
        (("edit", folder, "--fill", 1), folder / "0.json"),
        (("retarget", dance, "--to", me), dance),
        (("retarget", dance, "--to", me), me),
        (("retarget", folder, "--to", me), folder / "1.JSON"),
        (("retarget", dance, "--to", folder), folder / "0.json"),
        (("retarget", dance, "--to", tuned), tuned),
        (("retarget", dance, "--to", engine), engine / REFERENCE_FILE),
    ):
        before = output.read_bytes()
        result = run(*given, "-o", output, "--force")
        assert isinstance(result.exception, OutputExists), given
        assert "is itself what it would be made from" in str(result.exception) and output.read_bytes() == before
        for _ in range(2):
            assert run(*given, "-o", folder / "out" / "new.json", "--force").exit_code == 0


def test_nothing_is_written_among_the_poses_that_are_read_or_into_an_engine(
    me: Path, dance: Path, tmp_path: Path
) -> None:
    """The next command would take it for one of the poses; an engine would count as altered."""
    write_tuned(tmp_path)
    folder, engine = tmp_path / "frames", tmp_path / "me.engine"
    folder.mkdir()
    frame = json.loads(me.read_text())["frames"][0]
    (folder / "0.json").write_text(json.dumps(frame | {"canvas_width": 120, "canvas_height": 100}))
    for given, output, where in (
        (("edit", folder, "--canvas", "100x120"), folder / "all.json", "among the poses that it is made from"),
        (("retarget", folder, "--to", me), folder / "x.json", "among the poses that it is made from"),
        (("retarget", dance, "--to", folder), folder / "x.json", "among the poses that it is made from"),
        (("retarget", dance, "--to", engine), engine / "x.json", "in the engine, which holds nothing else"),
        (("retarget", dance, "--to", engine), engine / "new" / "x.json", "in the engine, which holds nothing else"),
    ):
        result = run(*given, "-o", output, "--force")
        assert isinstance(result.exception, OutputExists), given
        assert f"{output} would lie {where}" in str(result.exception) and not output.exists()


def test_one_of_several_people_is_an_edit(tmp_path: Path) -> None:
    """`tune` and `serve` have no --person: this writes the file that they read."""
    two = [somebody(3), PoseSequence(Similarity(0.5, 0, 0).apply(somebody(3).keypoints), (100, 120))]
    for index, poses in enumerate(two):
        poses.save(tmp_path / f"{index}.json")
    written = [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)]
    for frame, other in zip(written[0]["frames"], written[1]["frames"], strict=True):
        frame["people"] += other["people"]
    (tmp_path / "two.json").write_text(json.dumps(written[0]))
    for index in (0, 1):
        result = run("edit", tmp_path / "two.json", "--person", index, "-o", tmp_path / f"me{index}.json", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["changed_frames"] == []
        expected = PoseSequence.load(tmp_path / f"{index}.json").keypoints
        np.testing.assert_array_equal(PoseSequence.load(tmp_path / f"me{index}.json").keypoints, expected)


def test_frames_without_the_person_stay_without(tmp_path: Path, me: Path) -> None:
    keypoints = somebody().keypoints.copy()
    keypoints[7] = 0
    PoseSequence(keypoints, (100, 120)).save(tmp_path / "gap.json")
    for command in (["edit", "--blink", "2:12"], ["retarget", "--to", me]):
        result = run(command[0], tmp_path / "gap.json", "-o", tmp_path / f"{command[0]}.json", *command[1:])
        assert result.exit_code == 0, result.output
        with pytest.raises(PoseError, match="frame 7 does not show the person"):
            PoseSequence.load(tmp_path / f"{command[0]}.json")
    assert run("edit", tmp_path / "gap.json", "-o", tmp_path / "filled.json", "--fill", 1).exit_code == 0
    assert len(PoseSequence.load(tmp_path / "filled.json")) == len(keypoints)
