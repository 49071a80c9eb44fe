"""The price of streaming is measured on what a stream gives, and the document's example runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import stream_quality
from bench.runs import moving_person
from bench.stream_quality import compare, grade, markdown, parse, stream_clip
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.runtime.live import LiveOptions
from posecrafter_rt.runtime.stream_options import StreamOptions

SIZE = (32, 32)
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "streaming.md"


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream_quality")
    untrained_checkpoint(str(tiny_base), num_frames=3).save(folder / "tuned.ckpt")
    return build_engine(folder / "tuned.ckpt", folder / "me.engine", BuildOptions("torch", "fp32")).folder.path


@pytest.fixture(scope="module")
def avatar(engine: Path) -> Iterator[Avatar]:
    with Avatar.load(engine) as avatar:
        yield avatar


def test_every_pose_has_its_frame_and_what_was_done_for_it(avatar: Avatar) -> None:
    target = moving_person(5, SIZE, phase=1.0)
    target.keypoints[3] = target.keypoints[2]
    target.keypoints[4, :, 0] += 12
    frames, notes = stream_clip(avatar, target, StreamOptions(steps=2, window=2))
    assert frames.shape == (5, 32, 32, 3) and np.array_equal(frames[3], frames[2])
    assert (notes["num_repeats"], notes["num_resets"]) == (1, 1) and notes["ms"] > 0
    again, _ = stream_clip(avatar, target, StreamOptions(steps=2, window=0))
    change = np.abs(frames.astype(int) - again).max(axis=(1, 2, 3))
    assert change[0] <= 1 < change[1]  # the first has no past to attend to, whatever the window; the sums are rounded


def test_a_clip_is_graded_against_both() -> None:
    truth = np.random.default_rng(0).integers(40, 200, (4, 16, 16, 3), np.uint8)
    row = grade(truth + np.uint8(1), truth, truth)
    assert row["psnr"] == row["psnr_to_offline"] == pytest.approx(48.13, abs=0.01)
    assert row["change"] == 1
    assert grade(truth[[0, 0, 0, 0]], truth, truth)["change"] == 0


def test_streams_are_compared_with_the_joint_render(avatar: Avatar) -> None:
    truth = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), np.uint8)
    streams = [StreamOptions(steps=2, window=window, live=LiveOptions(still=0, jump=10)) for window in (0, 2)]
    rows = compare(avatar, moving_person(6, SIZE, phase=1.0), truth, streams, offline_steps=2)
    joint, repeated, *streamed = rows
    assert joint["psnr_to_offline"] == 100 and repeated["change"] == 0
    assert [(row["window"], row["is_calibrated"]) for row in streamed] == [
        (0, False), (0, True), (2, False), (2, True)]  # fmt: skip
    assert all(10 < row["psnr_to_offline"] < 100 for row in streamed)
    facts = {"machine": {"processor": "one", "torch_threads": 1}, "engine": {"backend": "torch", "precision": "fp32"}}
    text = markdown({**facts, "num_frames": 6, "offline_steps": 2, "rows": rows})
    assert "| joint render |" in text and "| 2 steps, window 2, calibrated |" in text
    assert "one, 1 threads. Calibrated" in text
    facts["machine"]["commit"] = "0123abc+"
    named = markdown({**facts, "num_frames": 6, "offline_steps": 2, "rows": rows})
    assert "one, 1 threads, commit 0123abc+. Calibrated" in named


@pytest.mark.parametrize(("is_quick", "backend"), [(True, "torch"), (False, "auto")])
def test_a_quick_run_builds_what_takes_a_second(
    is_quick: bool, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BuildOptions] = []

    def build(checkpoint: Path, output: Path, options: BuildOptions) -> Any:
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(stream_quality, "build_engine", build)
    with pytest.raises(KeyboardInterrupt):
        stream_quality.run(None, tmp_path / "a.ckpt", [], 1, 2, is_quick)
    assert [options.backend for options in asked] == [backend]


@pytest.mark.parametrize("is_quick", [True, False])
def test_int8_is_built_where_it_is_asked_for(is_quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the backend that has it, in a quick run too; its result has a name of its own."""
    asked: list[BuildOptions] = []
    published: list[str] = []

    def build(checkpoint: Path, output: Path, options: BuildOptions) -> Any:
        asked.append(options)
        raise InterruptedError

    def run(*arguments: Any) -> Any:
        with pytest.raises(InterruptedError):
            run_whole(*arguments)
        return {"rows": []}

    run_whole = stream_quality.run
    monkeypatch.setattr(stream_quality, "build_engine", build)
    monkeypatch.setattr(stream_quality, "run", run)
    monkeypatch.setattr(stream_quality, "markdown", lambda document: "")
    monkeypatch.setattr(stream_quality, "publish", lambda name, *_: published.append(name))
    words = ["--checkpoint", str(tmp_path / "a.ckpt"), "--precision", "int8", *(["--quick"] if is_quick else [])]
    monkeypatch.setattr("sys.argv", ["stream_quality", *words])
    stream_quality.main()
    assert asked == [BuildOptions("auto", "int8")] and published == ["stream_quality-int8"]


def test_the_command_line_takes_an_engine_or_what_to_build(capsys: pytest.CaptureFixture[str]) -> None:
    plain = parse([])
    assert (plain.engine, plain.checkpoint, plain.precision, plain.quick) == (None, None, "auto", False)
    assert parse(["me.engine"]).engine == Path("me.engine")
    assert parse(["--checkpoint", "a.ckpt", "--precision", "int8"]).precision == "int8"
    with pytest.raises(SystemExit):
        parse(["me.engine", "--precision", "int8"])
    assert "of an engine that is built" in capsys.readouterr().err


def test_the_documents_example_runs(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL)[0]
    (tmp_path / "me.engine").symlink_to(engine)
    moving_person(4, (64, 48)).save(tmp_path / "poses.json")
    monkeypatch.chdir(tmp_path)
    shown: list[np.ndarray] = []
    exec(compile(example, str(DOCUMENTATION), "exec"), {"show": shown.append})
    assert "held=True" in capsys.readouterr().out
    assert len(shown) == 5 and all(frame.shape == (*SIZE, 3) and frame.dtype == np.uint8 for frame in shown)
