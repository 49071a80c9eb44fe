"""Tests of `eval`.

Tests; no layer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.cli import eval as evaluation
from posecrafter_rt.cli.main import app
from posecrafter_rt.evaluate.metrics import psnr, ssim
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.video_io import read_video, write_png, write_video
from tests.cli.conftest import PeakBytes


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def clips(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of pictures that differ by noise: 3 rendered ones, and 5 true ones of which 1 to 3 are the same."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 256, (5, 32, 48, 3), np.uint8)
    noisy = np.clip(truth[1:4] + random.normal(0, 10, (3, 32, 48, 3)), 0, 255).astype(np.uint8)
    for name, frames in (("rendered", noisy), ("truth", truth)):
        for index, frame in enumerate(frames):
            (tmp_path / name).mkdir(exist_ok=True)
            write_png(tmp_path / name / f"{index}.png", frame)
    return tmp_path / "rendered", tmp_path / "truth"


def test_json_holds_the_metrics_of_the_named_frames(clips: tuple[Path, Path]) -> None:
    result = run(*clips, "--range", "1:4", "--json")
    frames, truth = read_video(clips[0]).frames, read_video(clips[1]).frames[1:4]
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "frames": 3, "height": 32, "width": 48, "psnr": psnr(frames, truth), "ssim": ssim(frames, truth),
    }  # fmt: skip


def test_no_clip_is_held_in_memory(tmp_path: Path, peak_bytes: PeakBytes) -> None:
    frames = np.zeros((400, 48, 48, 3), np.uint8)
    write_video(tmp_path / "clip.mp4", frames, 25.0)
    result, peak = peak_bytes(lambda: run(tmp_path / "clip.mp4", tmp_path / "clip.mp4", "--json"))
    assert result.exit_code == 0 and json.loads(result.stdout)["frames"] == 400, result.output
    assert peak < frames.nbytes / 2


def test_the_table_is_for_reading(clips: tuple[Path, Path]) -> None:
    output = run(*clips, "--range", "1:4").stdout
    assert "dB" in output and "SSIM" in output and "3 of 32x48" in output


def test_clips_of_different_lengths_are_refused(clips: tuple[Path, Path]) -> None:
    result = run(*clips)
    assert result.exit_code == 1
    assert "has 3 frames" in result.stderr and "has 5" in result.stderr and "--range" in result.stderr


def test_a_clip_that_grows_after_it_was_counted_is_refused(
    clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = evaluation._count_pairs

    def grown(rendered: Path, truth: Path, window: slice) -> int:
        num_frames = count(rendered, truth, window)
        shutil.copy(rendered / "2.png", rendered / "3.png")
        return num_frames

    monkeypatch.setattr(evaluation, "_count_pairs", grown)
    result = run(*clips, "--range", "1:4")
    assert result.exit_code == 1 and "has changed since its frames were counted" in result.stderr


def test_a_truth_of_another_size_is_fitted(clips: tuple[Path, Path], tmp_path: Path) -> None:
    large = np.repeat(np.repeat(read_video(clips[0]).frames, 2, axis=1), 2, axis=2)
    write_video(tmp_path / "large.mp4", large, 25.0, force=False)
    result = run(clips[0], tmp_path / "large.mp4", "--json")
    assert json.loads(result.stdout)["height"] == 32


@pytest.mark.parametrize("bad", ["absent.mp4", "torn.mp4"])
def test_bad_videos_are_one_line(clips: tuple[Path, Path], tmp_path: Path, bad: str) -> None:
    (tmp_path / "torn.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    result = run(tmp_path / bad, clips[1])
    assert result.exit_code == 1
    assert bad in result.stderr and "Traceback" not in result.stderr


def test_a_bad_range_is_bad_usage(clips: tuple[Path, Path]) -> None:
    assert run(*clips, "--range", "4:1").exit_code == 2


def pose_file(path: Path, count: int, canvas: tuple[int, int]) -> Path:
    """A pose file whose body moves from frame to frame."""
    keypoints = np.zeros((count, 134, 3), np.float32)
    x = np.linspace(0.2, 0.5, count)[:, None] + np.linspace(0, 0.2, 18)
    keypoints[:, :18] = np.stack([x * canvas[1], np.full_like(x, 0.5 * canvas[0]), np.ones_like(x)], -1)
    PoseSequence(keypoints, canvas, 25.0).save(path)
    return path


def test_the_poses_error_is_relative_to_the_picture(clips: tuple[Path, Path], tmp_path: Path) -> None:
    target = pose_file(tmp_path / "target.json", 5, (64, 96))
    keypoints = PoseSequence.load(target).keypoints[1:4].copy()
    keypoints[:, :18, 0] += 9.6  # a tenth of the width, half of the squared coordinates
    PoseSequence(keypoints, (64, 96), 25.0).save(tmp_path / "found.json")
    arguments = (*clips, "--range", "1:4", "--poses", target, "--rendered-poses", tmp_path / "found.json")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mse_p"] == pytest.approx(0.1**2 / 2, rel=1e-3)
    assert "MSE-P" in run(*arguments).stdout


def test_rendered_poses_may_miss_the_person_in_a_frame(clips: tuple[Path, Path], tmp_path: Path) -> None:
    """As poses that are extracted on the way may."""
    target = pose_file(tmp_path / "target.json", 5, (32, 48))
    keypoints = PoseSequence.load(target).keypoints[1:4].copy()
    keypoints[1] = 0
    PoseSequence(keypoints, (32, 48), 25.0).save(tmp_path / "found.json")
    arguments = (*clips, "--range", "1:4", "--poses", target, "--rendered-poses", tmp_path / "found.json", "--json")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mse_p"] == 0


def test_poses_that_do_not_say_their_canvas_have_the_videos(clips: tuple[Path, Path], tmp_path: Path) -> None:
    target = pose_file(tmp_path / "target.json", 5, (32, 48))
    frames = json.loads(target.read_text())["frames"]
    target.write_text(json.dumps(frames))
    (tmp_path / "found.json").write_text(json.dumps(frames[1:4]))
    result = run(*clips, "--range", "1:4", "--poses", target, "--rendered-poses", tmp_path / "found.json", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["mse_p"] == 0


def test_poses_that_do_not_fit_are_refused(clips: tuple[Path, Path], tmp_path: Path) -> None:
    poses = pose_file(tmp_path / "poses.json", 5, (32, 48))
    result = run(*clips, "--range", "1:4", "--poses", poses, "--rendered-poses", poses)
    assert result.exit_code == 1 and "5 rendered poses" in result.stderr
    assert run(*clips, "--range", "1:4", "--rendered-poses", poses).exit_code == 2


@pytest.mark.parametrize(("true", "rendered", "told"), [
    (3, 2, "there are 2 rendered poses for 3 frames"), (5, None, "there are 5 true poses for 3 frames"),
    (5, 5, "there are 5 true poses for 3 frames"),
])  # fmt: skip
def test_poses_of_another_length_are_told_before_anything_is_measured(
    clips: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    true: int,
    rendered: int | None,
    told: str,
) -> None:
    monkeypatch.setattr("posecrafter_rt.cli.eval._measure", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr("posecrafter_rt.poses.extract.extract_poses", lambda *arguments: pytest.fail("extracted"))
    options: list[object] = ["--poses", pose_file(tmp_path / "true.json", true, (32, 48))]
    if rendered is not None:
        options += ["--rendered-poses", pose_file(tmp_path / "rendered.json", rendered, (32, 48))]
    result = run(clips[0], clips[0], *options)
    assert result.exit_code == 1 and told in " ".join(result.stderr.split())


def test_a_missing_pose_file_is_told_before_anything_is_measured(
    clips: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.cli.eval._measure", lambda *arguments: pytest.fail("measured"))
    for options in (("--poses", tmp_path / "no.json"),
                    ("--poses", pose_file(tmp_path / "a.json", 4, (32, 48)), "--rendered-poses", tmp_path / "no.json")):  # fmt: skip
        result = run(*clips, *options)
        assert result.exit_code == 1 and "no.json: there is no such file" in result.stderr


@pytest.mark.parametrize(("true", "rendered", "told"), [
    ((48, 32), (32, 48), "truth are 32x48, of another shape than their poses' canvas of 48x32"),
    ((32, 48), (48, 32), "rendered are 32x48, of another shape than their poses' canvas of 48x32"),
])  # fmt: skip
def test_poses_of_another_shape_than_their_frames_are_refused(
    clips: tuple[Path, Path], tmp_path: Path, true: tuple[int, int], rendered: tuple[int, int], told: str
) -> None:
    """As they are where a video was rotated after its poses were extracted."""
    poses = pose_file(tmp_path / "true.json", 5, true), pose_file(tmp_path / "rendered.json", 3, rendered)
    result = run(*clips, "--range", "1:4", "--poses", poses[0], "--rendered-poses", poses[1])
    assert result.exit_code == 1 and told in " ".join(result.stderr.split())


@pytest.mark.parametrize(("modules", "told"), [
    ({}, "no pose detector: dwpose: the Python package rtmlib does not import"),
    ({"mediapipe": "import types\nsolutions = types.SimpleNamespace(holistic=None)"}, "the pose detector does not start"),
])  # fmt: skip
def test_a_detector_that_cannot_run_is_told_with_options_of_this_command(
    clips: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: dict[str, str], told: str
) -> None:
    for name, source in {"rtmlib": "raise ImportError", "mediapipe": "raise ImportError", **modules}.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(
        "posecrafter_rt.cli.eval._measure", lambda *arguments: pytest.fail("measured before it is told")
    )
    result = run(*clips, "--range", "1:4", "--poses", pose_file(tmp_path / "true.json", 5, (32, 48)))
    assert result.exit_code == 1 and told in result.stderr
    assert f"hint: posecrafter-rt poses extract {clips[0]} -o r.json, " in result.stderr
    assert result.stderr.rstrip().endswith("then add --rendered-poses r.json")
