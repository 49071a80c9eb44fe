"""Latency is measured of the real stream and server, and what a run came to by hand. No timing is judged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import gpu, stream_quality, throughput
from bench.flops import Counters, count_flops
from bench.latency import Targets, markdown, parse, targets_for
from bench.live import (
    Camera,
    Client,
    RunFailed,
    Shown,
    Trace,
    follow,
    measure_serve,
    measure_stream,
    serving,
    summarise,
)
from bench.report import RESULTS
from bench.runs import moving_person
from bench.stream_budget import BASES, count_base, frame_flops, memory_bytes
from bench.stream_budget import markdown as budget_markdown
from bench.throughput import find_engine
from bench.untrained import untrained_checkpoint
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.runtime.live import LiveOptions
from posecrafter_rt.runtime.options import Decoder
from posecrafter_rt.runtime.stream import AvatarStream
from posecrafter_rt.runtime.stream_options import StreamOptions
from posecrafter_rt.spec import Architecture

SIZE = (32, 32)


@dataclass(frozen=True)
class Patient(Camera):
    """Films until it has seen eight more frames, for a machine may be slow; a minute at most."""

    seen: list[int] = field(default_factory=list)

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose results count as frames."""

        def watched(*arguments: Any) -> Any:
            result = function(*arguments)
            if result is not None:
                self.seen.append(1)
            return result

        return watched

    def play(self, offer: Callable[[], None]) -> None:
        enough, until = len(self.seen) + 8, time.monotonic() + 60
        while len(self.seen) < enough and time.monotonic() < until:
            offer()
            time.sleep(1 / self.rate)


def patient_camera() -> Patient:
    return Patient(moving_person(8, SIZE, phase=1.0), rate=50, seconds=0)


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latency")
    untrained_checkpoint(str(tiny_base), num_frames=3).save(folder / "tuned.ckpt")
    return build_engine(folder / "tuned.ckpt", folder / "tuned.engine", BuildOptions("torch", "fp32")).folder.path


@pytest.fixture(scope="module")
def avatar(engine: Path) -> Iterator[Avatar]:
    with Avatar.load(engine) as avatar:
        yield avatar


def test_a_run_by_hand() -> None:
    """Poses at 0, 10, … 70 ms; pose 3 has no frame, and pose 4's came when pose 5 had been there for 15 ms."""
    offered = [number / 100 for number in range(8)]
    shown = [Shown(1, 0.014, False, 0.003), Shown(2, 0.024, True, 0.001), Shown(4, 0.065, False, 0.02),
             Shown(6, 0.071, False, 0.005)]  # fmt: skip
    result = summarise(Trace(offered, shown))
    assert (result["num_frames"], result["num_repeats"]) == (4, 1)
    assert (result["num_dropped"], result["num_poses"]) == (2, 6)
    assert result["fps"] == round(3 / 0.057, 2)
    assert result["latency_ms"]["p50"] == pytest.approx(7.5)  # of 4, 4, 25 and 11 ms
    assert result["frame_ms"] == pytest.approx({"p50": 4, "p95": 17.75, "p99": 19.55})  # of 3, 1, 20 and 5 ms
    assert result["jitter_ms"]["std"] == pytest.approx(np.std([31, -35]), abs=0.01)
    assert result["behind_ms"] == pytest.approx({"p50": 5, "p95": 18.5, "max": 20})  # of 0, 0, 20 and 10 ms
    assert result["num_overdue"] == 0
    # The last comes 9.5 ms after pose 6, 7.5 ms after a frame.
    later = [*shown[:2], Shown(4, 0.062, False, 0.02), Shown(5, 0.0695, False, 0.005)]
    assert summarise(Trace(offered, later))["num_overdue"] == 1
    with pytest.raises(RunFailed, match="3 frames"):
        summarise(Trace(offered, shown[:3]))


def test_a_camera_goes_there_and_back_by_the_clock() -> None:
    camera = Camera(moving_person(4, SIZE), rate=100, seconds=0.07)
    expected = [camera.poses.keypoints[number] for number in (0, 1, 2, 3, 2, 1, 0, 1)]
    assert all(np.array_equal(camera.pose(number), pose) for number, pose in enumerate(expected))
    calls: list[int] = []
    camera.play(lambda: calls.append(1))
    assert len(calls) == 7


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_frames_are_counted_under_the_poses_that_they_show(avatar: Avatar, is_pipelined: bool) -> None:
    """The frames that were shown are, by number, those of a stream that is given the same poses."""
    options = StreamOptions(steps=3, window=2, is_pipelined=is_pipelined, live=LiveOptions(still=0, jump=10))
    camera = patient_camera()
    frames: list[np.ndarray] = []
    given: list[np.ndarray] = []
    with avatar.stream(options) as stream:
        step = stream.step

        def watched(pose: np.ndarray | None) -> np.ndarray:
            assert pose is not None
            given.append(pose)
            frames.append(step(pose))
            return frames[-1]

        stream.step = camera.watch(watched)  # type: ignore[method-assign]
        trace = follow(stream, camera)
    numbers = [shown.number for shown in trace.shown]
    assert numbers == sorted(set(numbers))
    assert all(shown.at_s > trace.offered[shown.number] for shown in trace.shown)
    assert len(trace.shown) == len(frames) - 2 * is_pipelined >= 6
    for shown, pose in zip(trace.shown, given, strict=False):
        assert np.array_equal(camera.pose(shown.number), pose)
    with avatar.stream(replace(options, is_pipelined=False)) as stream:
        expected = [stream.step(camera.pose(number)).astype(int) for number in numbers]
    for ours, theirs in zip(frames[2 * is_pipelined :], expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1  # a batch rounds otherwise


def test_a_stream_is_measured_by_stages(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = patient_camera()
    monkeypatch.setattr(AvatarStream, "step", camera.watch(AvatarStream.step))
    row = measure_stream(avatar, StreamOptions(steps=2, window=2), camera)
    stages = row["stages_ms"]
    assert set(stages) == {"edit", "pose embedding", "controlnet", "unet", "decode", "the rest", "all"}
    assert all(value > 0 for value in stages.values())
    assert sum(stages.values()) == pytest.approx(2 * stages["all"], abs=0.1)
    assert row["first_frame_s"] > 0 and row["num_frames"] >= 4
    assert_frames_take_part_of_their_latency(row)


def assert_frames_take_part_of_their_latency(row: dict[str, Any]) -> None:
    """Each frame's step lies within its latency, so every percentile of the one is below the other's."""
    assert list(row["frame_ms"]) == ["p50", "p95", "p99"]
    assert all(0 < row["frame_ms"][rank] <= row["latency_ms"][rank] for rank in row["frame_ms"])


def test_a_server_is_measured_as_its_clients_see_it(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = patient_camera()
    monkeypatch.setattr(Client, "next_frame", camera.watch(Client.next_frame))
    row = measure_serve(engine, StreamOptions(steps=2, window=0, is_pipelined=True), camera)
    assert row["num_frames"] >= 4
    assert row["start_s"] > 0 and row["first_frame_s"] > 0
    assert_frames_take_part_of_their_latency(row)
    json.dumps(row)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="error: .*nothing"), serving(tmp_path / "nothing", StreamOptions()):
        pass


def test_an_engine_is_built_where_none_is_given(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "in_own_process", lambda function, *arguments: function(*arguments))
    options = parse(["--base", str(tiny_base), "--backend", "torch", "--precision", "fp32", "--quick"])
    engine = find_engine(options, tmp_path)
    with Avatar.load(engine) as avatar:
        assert avatar.size == SIZE
    assert find_engine(parse([str(engine)]), tmp_path / "elsewhere") == engine


def test_the_default_window_is_a_streams() -> None:
    assert parse([]).window == StreamOptions().window
    assert parse(gpu.PARTS["streams"][0][1:]).window == StreamOptions().window
    assert StreamOptions().window in stream_quality.WINDOWS


def test_targets_are_judged() -> None:
    targets = Targets("a base", steps=4, fps=20, p95_ms=150)
    row = {"fps": 20.4, "latency_ms": {"p95": 151.0}, "first_frame_s": 0.3, "num_overdue": 1, "num_frames": 9}
    assert list(targets.judge(row).values()) == [("20.4", True), ("151 ms", False), ("0.30 s", True), ("1 of 9", False)]


def test_targets_are_those_of_base_size_and_machine() -> None:
    cpu, gpu, hopper = {}, {"gpu": "NVIDIA GeForce RTX 3090"}, {"gpu": "NVIDIA H100 80GB HBM3"}
    small, large = {"base": "embedded", "size": [128, 160]}, {"base": "random-sd15", "size": [512, 512]}
    assert targets_for(small, cpu) is not None and targets_for(small, gpu) is None
    assert targets_for(large, cpu) is None
    assert [targets_for(large, facts).fps for facts in (gpu, hopper)] == [16, 40]  # type: ignore[union-attr]
    assert targets_for({**large, "base": "embedded"}, gpu) is None is targets_for({**small, "base": "random-sd15"}, cpu)


def test_markdown_tells_what_was_measured_and_what_was_not() -> None:
    times = {"p50": 31.2, "p95": 40.5, "p99": 51.0}
    row = {
        "way": "stream", "steps": 4, "is_pipelined": True, "open_s": 2.5, "first_frame_s": 0.2, "num_frames": 90,
        "num_repeats": 3, "num_dropped": 7, "num_poses": 97, "fps": 21.3, "latency_ms": times, "num_overdue": 0,
        "jitter_ms": {"std": 1.5, "p95": 3.0}, "behind_ms": {"p50": 0.0, "p95": 40.0, "max": 80.0},
        "stages_ms": {"edit": 1.0, "all": 40.0}, "frame_ms": {"p50": 24.1, "p95": 28.2, "p99": 30.3},
    }  # fmt: skip
    older = {name: value for name, value in row.items() if name != "frame_ms"} | {"is_pipelined": False}
    failed = {"way": "serve", "steps": 4, "is_pipelined": False, "error": "left out: websockets is not installed"}
    setup = {
        "base": "embedded",
        "size": [128, 160],
        "backend": "torch",
        "precision": "fp32",
        "window": 4,
        "decoder": "full",
        "rate": 25.0,
        "seconds": 20.0,
    }
    document = {
        "machine": {"processor": "one", "torch_threads": 2},
        "setup": setup,
        "load_s": 3.0,
        "rows": [row, older, failed],
    }
    text = markdown(document)
    assert "| stream, 4 steps, pipelined | 31.2 | 40.5 | 51.0 | 1.5 | 3.0 | 21.3 | 7 of 97 |" in text
    assert "| 0 of 90 | 3 | 24.1 | 28.2 | 30.3 |" in text and "| 0 of 90 | 3 |  |  |  |" in text
    assert "| serve, 4 steps | left out: websockets is not installed |" in text
    assert "| at least 20 frames/s | 21.3: met | 21.3: met |" in text
    assert "| stream, 4 steps, pipelined | 1.0 | 40.0 | 25.0 |" in text
    assert "Targets" not in markdown({**document, "rows": [failed]})
    text = markdown({**document, "machine": {"torch_threads": 64}})
    assert "on two cores are for 2 threads, not 64." in text and ": met" not in text


@pytest.mark.parametrize("window", [0, 3])
def test_a_stream_takes_the_memory_that_paper_says(avatar: Avatar, window: int) -> None:
    arch = Architecture.from_json(avatar.folder.manifest["architecture"])
    expected = memory_bytes(arch, 2, window, element_bytes=4)
    with avatar.stream(steps=2, window=window) as stream:
        own = stream._denoiser.temporal.values()
        assert sum(tensor.nbytes for tensor in own) == expected["stream"]
        shared = [tensor for tensors in stream.reference.memory.values() for tensor in tensors.values()]
        assert sum(tensor.nbytes for tensor in shared) == expected["avatar"]


@pytest.mark.parametrize(("steps", "window", "decoder"), [(1, 0, "full"), (2, 3, "small")])
def test_a_frame_computes_what_paper_says(
    avatar: Avatar, tiny_base: Path, steps: int, window: int, decoder: Decoder
) -> None:
    flops = frame_flops(Counters(tiny_base), SIZE, steps, window, decoder)
    pose = moving_person(1, SIZE).keypoints[0]
    with avatar.stream(steps=steps, window=window, decoder=decoder) as stream:
        assert count_flops(lambda: stream.step(pose)) == sum(flops.values()) - flops["edit"]  # which is counted by hand


def test_the_committed_budget_is_this_codes() -> None:
    """Its numbers follow from the networks, its tables and those of the document from its numbers."""
    committed = json.loads((RESULTS / "stream_budget.json").read_text())
    assert (RESULTS / "stream_budget.md").read_text() == budget_markdown(committed)
    real = committed["bases"]["Stable Diffusion 1.5"]
    assert count_base(*BASES["Stable Diffusion 1.5"]) == real
    # Five temporal layers at 64², 32² and 16², of 320, 640 and 1280 channels, in 16 bits.
    slot = 2 * 5 * 2 * (64**2 * 320 + 32**2 * 640 + 16**2 * 1280)
    memory = {(row["steps"], row["window"]): row for row in real["memory"]}
    assert memory[2, 4]["stream"] == 2 * (4 + 1) * slot == 458_752_000
    text = (RESULTS.parents[1] / "docs" / "streaming.md").read_text()
    for row in (memory[2, 4], memory[4, 8]):
        assert f"| {row['stream'] / 1e6:.1f} MB | {row['avatar'] / 1e6:.1f} MB |" in text
    for row in real["frames"]:
        total, (slow, *_, fast) = sum(row["flops"].values()), row["seconds"].values()
        assert (
            f"| {1e3 * slow:.1f} ms, {1 / slow:.1f} frames/s | {1e3 * fast:.1f} ms, {1 / fast:.0f} frames/s |" in text
        )
        assert row["steps"] != 2 or row["decoder"] == "small" or f"takes {total / 1e9:.0f} GFLOP" in text
