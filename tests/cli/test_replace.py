"""`render --replace`: a stretch of a video is rendered from its own poses, and the rest is what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.main import app
from posecrafter_rt.evaluate.metrics import psnr
from posecrafter_rt.framing import contact_sheet
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.seams import draw_to_anchors
from posecrafter_rt.tuning import TuneOptions, load_clip, tune
from posecrafter_rt.video_io import VideoWriter, read_video, write_png, write_video

SIZE, FILMED, COUNT, START, STOP = (32, 32), (40, 48), 10, 3, 8


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def workshop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with me.mp4, which is wider than the engine's pictures, its poses and an engine tuned on it."""
    folder = tmp_path_factory.mktemp("workshop")
    y, x = np.mgrid[: FILMED[0], : FILMED[1]]
    waves = [[128 + 110 * np.sin(x / 9 + y / 13 + colour + index / 2) for colour in range(3)] for index in range(COUNT)]
    write_video(folder / "me.mp4", np.moveaxis(np.uint8(waves), 1, -1), 24.0)
    write_video(folder / "other.mp4", np.moveaxis(np.uint8(waves[::-1]), 1, -1), 24.0)
    rng = np.random.default_rng(0)
    points = rng.uniform((8, 4), (40, 36), (1, 134, 2)) + rng.normal(0, 1, (COUNT, 134, 2))
    poses = PoseSequence(np.concatenate([points, np.ones((COUNT, 134, 1))], -1), FILMED)
    poses.save(folder / "me.json")
    poses[START:STOP].save(folder / "stretch.json")
    frames, fitted = load_clip(folder / "me.mp4", poses, SIZE, slice(None))
    tune(frames, fitted, folder / "tuned.ckpt", TuneOptions(base=str(tiny_base), frames=3, steps=2, precision="fp32"))
    build_engine(folder / "tuned.ckpt", folder / "me.engine", BuildOptions("torch", "fp32"))
    return folder


def command(workshop: Path, output: Path, *more: object) -> list[object]:
    return ["render", workshop / "me.engine", "--poses", workshop / "me.json", "--video", workshop / "me.mp4",
            "--replace", f"{START}:{STOP}", "--steps", 2, "-o", output, *more]  # fmt: skip


@pytest.mark.parametrize("more", [(), ("--segment", 3, "--overlap", 1)])
def test_the_stretch_is_rendered_and_the_rest_is_untouched(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...]
) -> None:
    written: list[np.ndarray] = []
    rows: list[list] = []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frame: written.append(frame.copy()) or write(self, frame))
    monkeypatch.setattr(
        "posecrafter_rt.rendering.contact_sheet", lambda given: rows.append(given) or contact_sheet(given)
    )
    result = run(*command(workshop, tmp_path / "mended.mp4", *more, "--json"))
    assert result.exit_code == 0, result.output
    own = read_video(workshop / "me.mp4", size=SIZE).frames
    with Avatar.load(workshop / "me.engine") as avatar:
        split = {"segment": more[1], "overlap": more[3]} if more else {}
        poses = PoseSequence.load(workshop / "me.json")[START - 1 : STOP + 1]
        alone = avatar.render(poses, num_inference_steps=2, **split)
    rendered = list(draw_to_anchors(alone, STOP - START, own[START - 1], own[STOP]))
    assert not np.array_equal(rendered, alone[1:-1])
    np.testing.assert_array_equal(written, np.concatenate([own[:START], rendered, own[STOP:]]))
    decoded = read_video(tmp_path / "mended.mp4")
    assert len(decoded) == COUNT and decoded.fps == pytest.approx(24)
    for index in (*range(START), *range(STOP, COUNT)):
        assert psnr(decoded.frames[[index]], own[[index]]) > 30
    report = json.loads((tmp_path / "mended.report.json").read_text())
    assert report == json.loads(result.stdout)
    assert report["replaced"] == [START, STOP] and report["num_frames"] == STOP - START + 2
    assert report["num_segments"] == (3 if more else 1)
    (sheet,) = rows
    assert [name for name, _ in sheet] == ["reference", "poses", "replaced", "rendered"]
    np.testing.assert_array_equal(sheet[2][1], own[START:STOP])
    np.testing.assert_array_equal(sheet[3][1], rendered)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mended.mp4", "mended.png", "mended.report.json"]


def test_a_render_of_poses_alone_replaces_nothing(workshop: Path, tmp_path: Path) -> None:
    result = run("render", workshop / "me.engine", "--poses", workshop / "stretch.json", "--steps", 2,
                 "-o", tmp_path / "out.mp4", "--json")  # fmt: skip
    assert result.exit_code == 0 and json.loads(result.stdout)["replaced"] is None
    assert read_video(tmp_path / "out.mp4").fps == pytest.approx(25)


@pytest.mark.parametrize(("fps", "expected"), [(30.0, 30), (None, 25)])
def test_a_folder_of_images_has_the_rate_of_the_poses(
    workshop: Path, tmp_path: Path, fps: float | None, expected: float
) -> None:
    for number, frame in enumerate(read_video(workshop / "me.mp4").frames):
        write_png(tmp_path / "images" / f"{number:04}.png", frame)
    replace(PoseSequence.load(workshop / "me.json"), fps=fps).save(tmp_path / "me.json")
    result = run(*command(workshop, tmp_path / "mended.mp4", "--poses", tmp_path / "me.json",
                          "--video", tmp_path / "images"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert read_video(tmp_path / "mended.mp4").fps == pytest.approx(expected)


def test_an_interrupted_one_goes_on_only_with_the_same_stretch_of_the_same_video(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--segment", 3, "--overlap", 1)
    assert run(*command(workshop, tmp_path / "unbroken.mp4", *more)).exit_code == 0
    output = tmp_path / "mended.mp4"

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", interrupted)
        assert run(*command(workshop, output, *more)).exit_code == 130
    # Other poses, as many as before; the same poses, but other frames around them; the same frames at another rate.
    for change in (["--replace", "2:7"], ["--video", workshop / "other.mp4"], ["--fps", 12]):
        other = run(*command(workshop, output, *more, *change))
        assert other.exit_code == 1 and "unfinished render" in other.output, change
    again = run(*command(workshop, output, *more))
    assert again.exit_code == 0 and "3 from an interrupted run" in again.output
    assert f"frames {START} to {STOP - 1} of" in again.output
    for suffix in (".mp4", ".png"):
        assert output.with_suffix(suffix).read_bytes() == (tmp_path / "unbroken").with_suffix(suffix).read_bytes()


@pytest.mark.parametrize(("change", "code", "named"), [
    (["--poses", "stretch.json"], 1, "me.mp4 has 10 frames but there are 5 poses"),
    (["--replace", "8:11"], 1, "me.mp4 has 10 frames, and 8:11 is not within them"),
    (["--video", "none.mp4"], 1, "there is no file or folder"),
    (["--video", "me.json"], 1, "cannot be read as a video"),
    (["--replace", "5:5"], 2, "'5:5' holds no frame"),
    (["--replace", "6:4"], 2, "'6:4' holds no frame"),
    (["--range", "0:4"], 2, "--range does not go with --replace"),
])  # fmt: skip
def test_what_cannot_be_replaced_is_one_clear_line_and_writes_nothing(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], code: int, named: str
) -> None:
    monkeypatch.chdir(workshop)
    result = run(*command(Path("."), tmp_path / "mended.mp4", *change))
    assert result.exit_code == code and named in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "named"), [((0, 9), None), ((2,), "1 of 7 frames: 2"), ((4, 8, 9), "2 of 7 frames: 4, 8")]
)
def test_only_frames_that_are_rendered_have_to_show_the_person(
    workshop: Path, tmp_path: Path, missing: tuple[int, ...], named: str | None
) -> None:
    """Those of the stretch and the two beside it, to which it is drawn."""
    poses = PoseSequence.load(workshop / "me.json")
    keypoints = poses.keypoints.copy()
    keypoints[list(missing)] = 0
    PoseSequence(keypoints, poses.canvas).save(tmp_path / "gaps.json")
    result = run(*command(workshop, tmp_path / "mended.mp4", "--poses", tmp_path / "gaps.json"))
    if named is None:
        assert result.exit_code == 0, result.output
        assert len(read_video(tmp_path / "mended.mp4")) == COUNT
    else:
        assert result.exit_code == 1
        assert f"gaps.json does not show the person in {named}" in " ".join(result.output.split())
        assert "hint: choose a --replace" in result.output and "--range" not in result.output  # which is refused here
        assert [path.name for path in tmp_path.iterdir()] == ["gaps.json"]


@pytest.fixture(scope="module")
def bust(workshop: Path) -> Path:
    """An engine whose training frames show no face and no hands."""
    checkpoint = Checkpoint.load(workshop / "tuned.ckpt")
    checkpoint.poses.keypoints[:, 18:] = 0
    checkpoint.save(workshop / "bust.ckpt")
    return build_engine(workshop / "bust.ckpt", options=BuildOptions("torch", "fp32")).folder.path


@pytest.mark.parametrize("given", [("--range", "3:8"), ("--replace", "3:8", "--video", "me.mp4")])
def test_a_frame_that_shares_no_keypoint_with_training_goes_by_its_number_in_the_file(
    bust: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    monkeypatch.chdir(bust.parent)
    poses = PoseSequence.load("me.json")
    poses.keypoints[5, :18] = 0
    poses.save(tmp_path / "me.json")
    result = run("render", bust, "--poses", tmp_path / "me.json", "-o", tmp_path / "out.mp4", "--steps", 2, *given)
    assert result.exit_code == 1 and "target frame 5 shares no keypoint with any of the 3" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["me.json"]


@pytest.mark.parametrize("given", [("--replace", "3:8"), ("--video", "me.mp4")])
def test_which_frames_and_of_what_are_given_together(tmp_path: Path, given: tuple[str, str]) -> None:
    result = run("render", "me.engine", "--poses", "me.json", "-o", tmp_path / "mended.mp4", *given)
    assert result.exit_code == 2 and "give both" in result.output


def test_the_video_itself_is_never_overwritten(workshop: Path) -> None:
    before = (workshop / "me.mp4").read_bytes()
    result = run(*command(workshop, workshop / "me.mp4", "--force"))
    assert result.exit_code == 1 and "is itself what it would be made from" in " ".join(result.output.split())
    assert (workshop / "me.mp4").read_bytes() == before


def test_a_picture_is_not_replaced_by_the_contact_sheet_of_its_render(workshop: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    write_png(photo, read_video(workshop / "me.mp4").frames[0])
    PoseSequence.load(workshop / "me.json")[:1].save(tmp_path / "photo.json")
    before = photo.read_bytes()
    result = run("render", workshop / "me.engine", "--poses", tmp_path / "photo.json", "--video", photo,
                 "--replace", "0:1", "--steps", 2, "-o", tmp_path / "photo.mp4", "--force")  # fmt: skip
    assert result.exit_code == 1 and "photo.png is itself what it would be made from" in " ".join(result.output.split())
    assert photo.read_bytes() == before and not (tmp_path / "photo.mp4").exists()


def test_nothing_is_written_among_the_images_that_it_is_made_from(workshop: Path, tmp_path: Path) -> None:
    for number, frame in enumerate(read_video(workshop / "me.mp4").frames):
        write_png(tmp_path / f"{number:04}.png", frame)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    given = command(workshop, tmp_path / "0001.mp4", "--force")
    given[given.index(workshop / "me.mp4")] = tmp_path
    result = run(*given)
    assert result.exit_code == 1 and "would lie among the images that it is made from" in result.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
