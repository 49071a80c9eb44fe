"""`render --segment`, starved of disk or of memory at random moments, over and over: nothing is lost, and the end is whole."""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posecrafter_rt.evaluate.metrics import psnr
from posecrafter_rt.runtime.report import describe_adjustment
from posecrafter_rt.video_io import read_video
from tests.cli.starving_scripts import STARVING
from tests.render_scripts import ALONE, FAITHFUL, refused_mount, run_lines
from tests.tiny import some_poses

COUNT, SEED = 14, 5
OPTIONS = ("--steps", 2, "--strength", 1, "--inversion-substeps", 1, "--segment", 6, "--overlap", 2)
OUTPUTS = {VIDEO := "out.mp4", SHEET := "out.png", REPORT := "out.report.json"}
# Of a process whose memory is gone, which some libraries do not bear; Python itself may then wait for a thread for ever. Such a
# run has said nothing, and still nothing may be lost.
DEATHS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGALRM)
ROUNDS = pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])


@dataclass
class Run:
    """See `STARVING`. done: where its outputs were moved to, if it was done."""

    way: list[Any]
    status: int
    said: str
    files: dict[str, str]
    state: dict[str, Any] | None
    done: Path
    errors: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.errors = [line for line in self.said.splitlines() if line.startswith(("error:", "hint:"))]
        self.segments: list[str] = self.state["segments"] if self.state else []

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.done / REPORT).read_text())
        return report


def render_starved(engine: Path, folder: Path, rounds: int, *ways: str) -> tuple[Run, list[list[Run]]]:
    """One render over and over: the unbroken run, and then those that it took each time until it was done, checked."""
    rendered, done = folder / "rendered", folder / "done"
    rendered.mkdir()
    done.mkdir()
    some_poses(COUNT).save(folder / "poses.json")
    alone = ALONE if "file system" in ways else ()
    lines, messages = run_lines([*alone, sys.executable, "-c", STARVING], SEED, rounds, ", ".join(ways), engine, rendered, done,
                                "--poses", folder / "poses.json", *OPTIONS, environment=FAITHFUL)  # fmt: skip
    unbroken, *runs = (Run(*line, done / str(number)) for number, line in enumerate(lines))
    assert unbroken.status == 0, (unbroken.said, messages)
    renders: list[list[Run]] = [[]]
    for run in runs:
        renders[-1].append(run)
        if run.status == 0:
            renders.append([])
    assert not renders.pop() and len(renders) == rounds, "with room a render is done"
    for render in renders:
        check(render, unbroken)
    return unbroken, renders


def check(render: list[Run], unbroken: Run) -> None:
    """What a run has finished the next one keeps; nothing lies about half done; the end has every frame, or the same bytes."""
    report, kept, is_staged = render[-1].report(), [], False
    exact = {name: unbroken.files[name] for name in (VIDEO, SHEET) if not report["adjustments"]}
    for run in render:
        assert run.status < 0 or "Traceback" not in run.said, (run.way, run.said)
        if run.status == 0:
            assert not run.errors and {name for name in run.files if "/" not in name} == OUTPUTS, run.way
            # What was only moved to its place has the report that it had.
            assert is_staged or report["num_resumed"] == len(kept), run.way
        else:
            assert run.segments[: len(kept)] == kept, run.way
        if run.status == 1:  # one line, and what to do; all segments are kept that came before the one in which it was
            begun = [0, *map(int, re.findall(r"segment (\d+) of", run.said))]
            assert len(run.segments) >= begun[-1] - 1, (run.way, run.said)
            assert [line.partition(":")[0] for line in run.errors] == ["error", "hint"], (run.way, run.said)
        for name, digest in run.files.items():
            check_file(run, unbroken, name)
            assert digest == exact.get(Path(name).name, digest), (run.way, name)
        kept, is_staged = run.segments, run.state is not None and run.state["staged"]
    assert len(read_video(render[-1].done / VIDEO)) == report["num_frames"] == COUNT


def check_file(run: Run, unbroken: Run, name: str) -> None:
    """Whole files under their own names: of the engine as they were, of segments as listed, or an output."""
    folder, _, file = name.rpartition("/")
    if folder.startswith("tiny.engine"):
        assert run.files[name] == unbroken.files.get(name), (run.way, name)
    elif folder == "out.mp4.partial" and file.startswith("segment-"):
        listed = [*run.segments, run.files[name]]  # the next one may be there, and not be listed yet
        assert run.files[name] == listed[int(Path(file).stem.removeprefix("segment-"))], (run.way, name)
    else:
        assert file in OUTPUTS or name == "out.mp4.partial/state.json", (run.way, name)


def check_adjusted(run: Run, whole: np.ndarray) -> None:
    """Of a render that memory has changed: segments as its report tells, and frames that are those of the person still."""
    report = run.report()
    adjustments, start, longest = list(report["adjustments"]), 0, 6
    for length, shared in zip(report["segments"], report["overlaps"], strict=True):
        while adjustments and adjustments[0]["frame"] == start:
            adjustment = adjustments.pop(0)
            assert adjustment["segment"] < longest and adjustment["reason"].startswith("memory ran out")
            assert describe_adjustment(adjustment) in run.said
            longest = adjustment["segment"]
        assert length <= longest
        start += length - shared
    assert start == COUNT and not adjustments and not report["claims_byte_equality"]
    assert report["approximations"]["segment"] == longest
    nearness = [psnr(*pair) for pair in zip(read_video(run.done / VIDEO).frames[:, None], whole[:, None], strict=True)]
    assert min(nearness) > 27, nearness  # dB: segments of one frame have 29.7, frames in another order 26, black ones 6


@ROUNDS
def test_a_render_from_which_the_disk_is_taken(tiny_engine: Path, tmp_path: Path, rounds: int) -> None:
    can_mount = refused_mount(tmp_path) is None  # else writes are refused by Python alone, the encoder's none
    ways = ["disk calls", "file system"][: 1 + can_mount]
    _, renders = render_starved(tiny_engine, tmp_path, rounds, *ways)
    failed = [run for render in renders for run in render if run.status]
    folder = tmp_path / "rendered"
    for run in failed:
        assert run.errors[0] == f"error: no space left to write {folder / VIDEO}", (run.way, run.said)
        assert run.errors[1].startswith(f"hint: free some space in {folder}"), (run.way, run.said)
    assert not any(render[-1].report()["adjustments"] for render in renders)
    assert len(failed) >= rounds // 3
    if rounds == 50:
        assert {len(run.segments) for run in failed} == {0, 1, 2, 3}
        assert any(run.state and run.state["staged"] for run in failed), "none failed while outputs were moved"


@ROUNDS
def test_a_render_from_which_memory_is_taken(tiny_engine: Path, tmp_path: Path, rounds: int) -> None:
    unbroken, renders = render_starved(tiny_engine, tmp_path, rounds, "network calls", "process")
    whole = read_video(unbroken.done / VIDEO).frames
    failed = [run for render in renders for run in render if run.status]
    died = [run for run in failed if run.status != 1]
    assert all(run.way[0] == "process" and -run.status in DEATHS for run in died), [
        (run.way, run.status) for run in died
    ]
    assert len(died) <= 2 + rounds / 10
    for run in failed:
        told = ("error: memory ran out", "error: encoding ")
        assert run in died or run.errors[0].startswith(told), (run.way, run.said)
    adjusted = [render[-1] for render in renders if render[-1].report()["adjustments"]]
    for run in adjusted:
        check_adjusted(run, whole)
    assert len(failed) + len(adjusted) >= rounds // 3
    if rounds == 50:
        assert {len(run.segments) for run in failed} == {0, 1, 2, 3} and adjusted
