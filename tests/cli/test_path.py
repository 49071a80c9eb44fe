"""The commands end to end on a tiny base: tune, build-engine, render, inspect; and what they say to bad input."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pkgutil
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.main import app
from posecrafter_rt.cli.output import NOT_KNOWN
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.video_io import read_video, write_png, write_video

SIZE = (32, 32)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def workshop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video, its poses, a checkpoint and an engine, all made by the commands."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "base").symlink_to(tiny_base)
    rng = np.random.default_rng(0)
    write_video(folder / "video.mp4", rng.integers(0, 256, (4, *SIZE, 3), np.uint8), 25.0)
    points = rng.uniform(4, 28, (1, 134, 2)) + rng.normal(0, 1, (4, 134, 2))
    PoseSequence(np.concatenate([points, np.ones((4, 134, 1))], -1).astype(np.float32), SIZE, 25.0).save(
        folder / "poses.json"
    )
    ok("tune", folder / "video.mp4", "--poses", folder / "poses.json", "-o", folder / "tuned.ckpt", "--base", tiny_base,
       "--frames", 3, "--steps", 2, "--precision", "fp32")  # fmt: skip
    ok("build-engine", folder / "tuned.ckpt", "--backend", "torch", "--precision", "fp32")
    return folder


def test_render_writes_video_sheet_and_report(workshop: Path, tmp_path: Path) -> None:
    report = json.loads(ok("render", workshop / "tuned.engine", "--poses", workshop / "poses.json", "-o", tmp_path / "out.mp4",
                           "--steps", 2, "--json").stdout)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png", "out.report.json"]
    assert len(read_video(tmp_path / "out.mp4").frames) == 4
    assert report == json.loads((tmp_path / "out.report.json").read_text())
    assert report["num_frames"] == 4 and report["engine"]["backend"] == "torch"
    again = run("render", workshop / "tuned.engine", "--poses", workshop / "poses.json", "-o", tmp_path / "out.mp4")
    assert again.exit_code == 1 and "exists already" in again.output and "--force" in again.output


def test_poses_that_do_not_say_their_canvas_are_tuned_on_with_the_videos(
    workshop: Path, tiny_base: Path, tmp_path: Path
) -> None:
    frames = json.loads((workshop / "poses.json").read_text())["frames"]
    (tmp_path / "openpose.json").write_text(json.dumps(frames))
    ok("tune", workshop / "video.mp4", "--poses", tmp_path / "openpose.json", "-o", tmp_path / "tuned.ckpt", "--base", tiny_base,
       "--frames", 3, "--steps", 0, "--precision", "fp32")  # fmt: skip
    tuned, expected = Checkpoint.load(tmp_path / "tuned.ckpt").poses, Checkpoint.load(workshop / "tuned.ckpt").poses
    assert tuned.canvas == expected.canvas == SIZE
    np.testing.assert_array_equal(tuned.keypoints, expected.keypoints)


def test_poses_that_cannot_be_tuned_on_are_refused_before_a_base_is_looked_for(workshop: Path, tmp_path: Path) -> None:
    """From a hub all its weights would be fetched first."""
    poses = PoseSequence.load(workshop / "poses.json")
    for index, frame in enumerate(read_video(workshop / "video.mp4").frames):
        write_png(tmp_path / "images" / f"{index}.png", frame)
    PoseSequence(poses.keypoints, (32, 64), 25.0).save(tmp_path / "wide.json")
    poses[:2].save(tmp_path / "two.json")
    poses.keypoints[1, :, 2] = 0.2
    poses.save(tmp_path / "faint.json")
    for video, given, message in (
        (workshop / "video.mp4", "wide.json", "are 32x32, of another shape than their poses' canvas of 32x64"),
        (tmp_path / "images", "two.json", "images has 4 frames but there are 2 poses"),
        (workshop / "video.mp4", "faint.json", "faint.json does not show the person in 1 of 4 frames: 1"),
    ):
        result = run("tune", video, "--poses", tmp_path / given, "-o", tmp_path / "o.ckpt", "--base", "no/such/base")
        assert result.exit_code == 1 and message in result.stderr.replace("\n", " "), result.output


def test_a_single_target_pose_renders(workshop: Path, tmp_path: Path) -> None:
    ok(
        "render",
        workshop / "tuned.engine",
        "--poses",
        workshop / "poses.json",
        "--range",
        "2:3",
        "-o",
        tmp_path / "o.mp4",
        "--steps",
        2,
    )
    assert len(read_video(tmp_path / "o.mp4").frames) == 1


def test_frames_that_a_range_leaves_out_need_not_show_the_person(
    workshop: Path, tiny_base: Path, tmp_path: Path
) -> None:
    poses = PoseSequence.load(workshop / "poses.json")
    keypoints = poses.keypoints.copy()
    keypoints[3] = 0
    PoseSequence(keypoints, SIZE, 25.0).save(tmp_path / "gap.json")
    poses[:3].save(tmp_path / "found.json")
    given = ["--poses", tmp_path / "gap.json"]
    for command in (
        ["render", workshop / "tuned.engine", *given, "-o", tmp_path / "o.mp4", "--steps", 2],
        ["tune", workshop / "video.mp4", *given, "-o", tmp_path / "o.ckpt", "--base", tiny_base, "--frames", 2,
         "--steps", 1, "--precision", "fp32"],
        ["eval", tmp_path / "o.mp4", workshop / "video.mp4", *given, "--rendered-poses", tmp_path / "found.json"],
    ):  # fmt: skip
        refused = run(*command, "--range", "1:4")
        assert refused.exit_code == 1, refused.output
        assert "gap.json does not show the person in 1 of 3 frames: 3" in refused.stderr.replace("\n", " ")
        ok(*command, "--range", "0:3")


def test_building_again_is_nothing_to_do(workshop: Path) -> None:
    result = ok("build-engine", workshop / "tuned.ckpt", "--backend", "torch", "--precision", "fp32", "--json")
    assert json.loads(result.stdout)["was_current"] is True


def test_a_later_build_of_the_kind_tells_the_time_left(workshop: Path, tmp_path: Path) -> None:
    result = ok("build-engine", workshop / "tuned.ckpt", "-o", tmp_path / "again.engine", "--backend", "torch",
                "--precision", "fp32")  # fmt: skip
    assert "loading the base, about" in result.stderr and "of memory" in result.stdout
    assert NOT_KNOWN not in result.stderr


def test_inspect_shows_engine_and_checkpoint(workshop: Path) -> None:
    assert "torch" in ok("inspect", workshop / "tuned.engine").output
    ok("inspect", workshop / "tuned.ckpt")


def test_eval_of_a_video_with_itself(workshop: Path) -> None:
    result = json.loads(ok("eval", workshop / "video.mp4", workshop / "video.mp4", "--json").stdout)
    assert result["ssim"] == pytest.approx(1.0)


HAS_TENSORRT = importlib.util.find_spec("tensorrt") is not None
BAD = [
    (["tune", "missing.mp4", "--poses", "poses.json", "-o", "new.ckpt"], 1, "missing.mp4"),
    (["tune", "video.mp4", "--poses", "missing.json", "-o", "new.ckpt"], 1, "missing.json"),
    (["tune", "torn.mp4", "--poses", "poses.json", "-o", "new.ckpt"], 1, "torn.mp4"),
    (["tune", "video.mp4", "--poses", "nan.json", "-o", "new.ckpt"], 1, "nan.json"),
    (["tune", "video.mp4", "--poses", "two.json", "-o", "new.ckpt"], 1, "4 frames but there are 2 poses"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", "new.ckpt", "--base", "no/such/base"], 1, "no/such/base"),
    # Before frames are counted, and weights looked for.
    (["tune", "video.mp4", "--poses", "two.json", "-o", "new.ckpt", "--base", "rescaled"], 1, "rescale_betas_zero_snr is set"),
    (["tune", "video.mp4", "--poses", "two.json", "-o", "new.ckpt", "--controlnet", "no/such/net"], 1, "no controlnet at no/such/net"),
    (["tune", "video.mp4", "--poses", "two.json", "-o", "new.ckpt", "--vae", "no/such/vae"], 1, "no vae at no/such/vae"),
    (["tune", "video.mp4", "--poses", "two.json", "-o", "new.ckpt", "--base", "base", "--size", "33x50"], 1,
     "size 33x50 does not fit the network"),
    (["tune", "video.mp4", "--poses", "two.json", "-o", "new.ckpt", "--norm-scope", "clips"], 1, "there is no norm_scope 'clips'"),
    (["tune", "video.mp4", "--poses", "two.json", "-o", "new.ckpt", "--controlvideo-weights", "tuned.ckpt", "no.pt"], 1,
     "there is no file no.pt"),
    (["build-engine", "tuned.ckpt", "-o", "new.engine", "--base", "rescaled"], 1, "rescale_betas_zero_snr is set"),
    (["tune", "video.mp4", "--poses", "poses.json", "--range", "9:3"], 2, "9:3"),
    (["tune", "video.mp4", "--poses", "poses.json", "--size", "big"], 2, "big"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", "tuned.ckpt"], 1, "exists already"),
    (["build-engine", "pickle.ckpt"], 1, "pickle"),
    (["build-engine", "torn.ckpt"], 1, "torn.ckpt"),
    (["build-engine", "tuned.ckpt", "--backend", "tensorrt"], 1,
     "tensorrt" if HAS_TENSORRT else "tensorrt is not installed: pip install 'tensorrt-cu13>="),
    (["build-engine", "tuned.ckpt", "--size", "33x32"], 1, "33x32"),
    (["render", "video.mp4", "--poses", "poses.json", "-o", "new.mp4"], 1, "not an engine folder"),
    (["render", "tuned.engine", "--poses", "empty.json", "-o", "new.mp4"], 1, "empty.json"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.mp4", "--mode", "magic"], 1, "magic"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.mp4", "--steps", "1"], 1, "no noise is left to remove"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.txt"], 1, "new.txt"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.mp4", "--range", "50:60"], 1,
     "poses.json has 4 poses, and 50:60 is not within them"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.mp4", "--range", "2:5"], 1,
     "poses.json has 4 poses, and 2:5 is not within them"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", "new.ckpt", "--range", "4:"], 1,
     "poses.json has 4 poses, and 4: is not within them"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", "new.ckpt", "--range", "2:5"], 1,
     "poses.json has 4 poses, and 2:5 is not within them"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", "new.ckpt", "--seed", str(1 << 63)], 1, "seed 9223372036854775808"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", "new.ckpt", "--base", "~nobody of this name/b"], 1,
     "no base model at ~nobody of this name/b"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", "new.ckpt", "--prompt", "\udce9"], 2, "is not UTF-8"),
    (["tune", "video.mp4", "--poses", "poses.json", "-o", ".", "--force"], 1, ". is a folder"),
    (["build-engine", "."], 1, "there is no checkpoint ."),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "."], 1, ". is a folder"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "tuned.engine", "--force"], 1, "tuned.engine is a folder"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.mp4", "--control-scale", "1e300"], 1, "scale 1e+300"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.mp4", "--range", "9" * 5000 + ":"], 2, "9999"),
    (["render", "tuned.engine", "--poses", "poses.json", "-o", "new.mp4", "--prompt", "\udce9"], 2, "is not UTF-8"),
    (["poses", "preview", "poses.json", "-o", "new.mp4", "--size", "1x4000"], 1, "cannot draw a pose at 1 x 4000 pixels"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "named"), BAD, ids=lambda value: " ".join(value)[:120] if isinstance(value, list) else None
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, named: str
) -> None:
    monkeypatch.chdir(workshop)
    _write_bad_files(workshop)
    before = sorted(path.name for path in workshop.iterdir())
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert named in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.count("error: ") == 1
    assert sorted(path.name for path in workshop.iterdir()) == before


@pytest.mark.parametrize("option", ["--base", "--controlnet", "--vae"])
def test_weights_that_are_tuned_are_not_replaced_even_by_force(workshop: Path, tmp_path: Path, option: str) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    given = [
        "tune",
        workshop / "video.mp4",
        "--poses",
        workshop / "poses.json",
        option,
        weights,
        "-o",
        weights,
        "--force",
    ]
    result = run(*given)
    assert result.exit_code == 1 and "is itself what it would be made from" in " ".join(result.output.split())
    assert weights.read_bytes() == b"weights"


def test_poses_that_are_called_as_the_report_will_be_are_not_replaced(workshop: Path, tmp_path: Path) -> None:
    poses = shutil.copy(workshop / "poses.json", tmp_path / "out.report.json")
    result = run("render", workshop / "tuned.engine", "--poses", poses, "-o", tmp_path / "out.mp4", "--force")
    assert result.exit_code == 1 and "is itself what it would be made from" in " ".join(result.output.split())
    assert poses.read_bytes() == (workshop / "poses.json").read_bytes() and not (tmp_path / "out.mp4").exists()


def _write_bad_files(folder: Path) -> None:
    import torch

    (folder / "torn.mp4").write_bytes((folder / "video.mp4").read_bytes()[:600])
    (folder / "torn.ckpt").write_bytes((folder / "tuned.ckpt").read_bytes()[:5000])
    torch.save({"weights": torch.zeros(2)}, folder / "pickle.ckpt")
    (folder / "rescaled" / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "rescaled" / "scheduler" / "scheduler_config.json").write_text('{"rescale_betas_zero_snr": true}')
    text = (folder / "poses.json").read_text()
    data = json.loads(text)
    (folder / "two.json").write_text(json.dumps({**data, "frames": data["frames"][:2]}))
    (folder / "empty.json").write_text(json.dumps({**data, "frames": []}))
    data["frames"][1]["people"][0]["pose_keypoints_2d"][0] = float("nan")
    (folder / "nan.json").write_text(json.dumps(data))


# Each command: what it writes, a function that it calls when part of its work is done, and its arguments.
COMMANDS = {
    "tune": ("a.ckpt", "posecrafter_rt.tuning._step", ["video.mp4", "--poses", "poses.json", "--frames", "3", "--steps", "3",
                                             "--precision", "fp32"]),
    "build-engine": ("a.engine", "posecrafter_rt.engines.torch.save_tensors", ["tuned.ckpt", "--backend", "torch", "--precision", "fp32"]),
    "render": ("a.mp4", "posecrafter_rt.rendering.VideoWriter.write", ["tuned.engine", "--poses", "poses.json", "--steps", "2"]),
}  # fmt: skip


def arguments_of(command: str, workshop: Path, output: Path) -> list[object]:
    given = [workshop / word if (workshop / word).exists() else word for word in COMMANDS[command][2]]
    return [command, *given, "-o", output, *(["--base", workshop / "base"] if command == "tune" else [])]


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_ctrl_c_leaves_nothing_half_done_and_the_same_command_finishes(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    output, target = tmp_path / COMMANDS[command][0], COMMANDS[command][1]
    original, calls = pkgutil.resolve_name(target), []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, interrupted)
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        result = run(*arguments_of(command, workshop, output))
        signal.signal(signal.SIGINT, inherited)
    assert result.exit_code == 130 and len(calls) == 2
    purpose = "go on" if command == "tune" else "start over"
    assert f"run the same command again to {purpose}" in result.stderr and "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == (["a.ckpt.partial"] if command == "tune" else [])
    ok(*arguments_of(command, workshop, output))
    assert output.exists() and not list(tmp_path.glob("*.partial"))


def test_a_tuning_that_chose_its_precision_goes_on_in_it_where_another_would_be_chosen(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, step = tmp_path / "a.ckpt", pkgutil.resolve_name("posecrafter_rt.tuning._step")
    command = ["tune", workshop / "video.mp4", "--poses", workshop / "poses.json", "-o", output, "--base", workshop / "base",
               "--frames", 3, "--steps", 2, "--device", "cpu"]  # fmt: skip

    def interrupted(*arguments: object) -> None:
        step(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("posecrafter_rt.tuning.cpu_gains_by_bf16", lambda: True)
        patch.setattr("posecrafter_rt.tuning._step", interrupted)
        assert run(*command).exit_code == 130
    monkeypatch.setattr("posecrafter_rt.tuning.cpu_gains_by_bf16", lambda: False)
    refused = run(*command, "--precision", "fp32")
    assert refused.exit_code == 1 and "give --precision bf16 to finish it" in refused.stderr
    assert json.loads(ok(*command, "--json").stdout)["precision"] == "bf16"


@pytest.mark.parametrize("options", [[], ["--no-resume"]])
def test_whether_a_tuning_goes_on_is_told_by_what_is_saved(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Nothing is until a base is loaded; and --no-resume would start over, whatever is."""
    output = tmp_path / "a.ckpt"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for moment, is_saved in (("load_base", False), ("_step", True), ("load_base", True), ("load_clip", True)):
        with monkeypatch.context() as patch:
            patch.setattr(f"posecrafter_rt.tuning.{moment}", interrupted)
            result = run(*arguments_of("tune", workshop, output), *options)
        purpose = "go on" if is_saved and not options else "start over"
        assert result.exit_code == 130 and result.stderr.endswith(f"run the same command again to {purpose}\n"), moment
        assert (tmp_path / "a.ckpt.partial").exists() is is_saved


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    output = tmp_path / COMMANDS[command][0]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run(*arguments_of(command, workshop, output))
    assert result.exit_code == 1, result.output
    assert result.stderr.count("error: no space left") == 1 and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
    ok(*arguments_of(command, workshop, output))
