"""A segment sampled in a thread while the one before is decoded, for real, on a CPU: nothing but the time it takes may differ.

The tiny engine of the torch backend, which does not do so by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines import SAMPLED_AHEAD
from posecrafter_rt.engines.torch import TorchEngine
from posecrafter_rt.errors import OutOfMemory, PoseCrafterError
from posecrafter_rt.rendering import render_to_files
from posecrafter_rt.runtime.ahead import THREAD, Ahead, Sampled
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.progress import OnStep, ignore
from posecrafter_rt.runtime.report import SegmentReport
from tests.tiny import break_off, some_poses

POSES = some_poses(13)
STEPS = 2
CHANGES: dict[str, Any] = {"num_inference_steps": STEPS, "segment": 6, "overlap": 2}  # three segments
CPU = torch.device("cpu")
PATIENCE_S = 60.0  # of a thread that waits for another: only a failure takes so long

Calls = list[tuple[str, bool]]  # of networks, in order: the name, and whether it was in the thread


def is_ahead() -> bool:
    return threading.current_thread().name.startswith(THREAD)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


@pytest.fixture
def overlapped(avatar: Avatar, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inversion is cached, too."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU networks of the torch backend share the memory of their recordings")
    avatar.render(POSES, **CHANGES)
    monkeypatch.setattr("posecrafter_rt.avatar.SAMPLED_AHEAD", ("torch",))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """watch(before): every call of a network is noted, after `before(name, calls until then)`; the notes, as they grow."""
    original = TorchEngine.__call__

    def watch(before: Callable[[str, Calls], None] = lambda name, calls: None) -> Calls:
        calls: Calls = []

        def watched(engine: TorchEngine, **inputs: Tensor) -> dict[str, Tensor]:
            before(engine.spec.name, calls)
            calls.append((engine.spec.name, is_ahead()))
            return original(engine, **inputs)

        monkeypatch.setattr(TorchEngine, "__call__", watched)
        return calls

    return watch


def render(avatar: Avatar, look_ahead: bool) -> tuple[np.ndarray, dict[str, Any], list[Any]]:
    """Frames; the report without times and memory, and those of the segments; the steps that are told."""
    told: list[Any] = []
    frames, parts = [], []
    segments = avatar.iter_segments(POSES, look_ahead=look_ahead, on_step=lambda *step: told.append(step), **CHANGES)
    for segment in segments:
        frames += list(segment.frames)
        parts.append(comparable(segment.report))
    assert avatar.last_report is not None
    return np.stack(frames), {**comparable(avatar.last_report), "parts": parts}, told


def comparable(report: SegmentReport) -> dict[str, Any]:
    measured = {"seconds", "rss_bytes", "gpu_bytes", "peak_rss_bytes", "peak_gpu_bytes", "segment_peaks"}
    assert report.seconds and report.peak_rss_bytes > 0
    return {name: value for name, value in report.to_json().items() if name not in measured}


def assert_same(first: tuple[np.ndarray, Any, Any], second: tuple[np.ndarray, Any, Any]) -> None:
    assert np.array_equal(first[0], second[0]) and first[1:] == second[1:]


def count(calls: Calls, name: str, *, ahead: bool) -> int:
    return calls.count((name, ahead))


def test_frames_reports_and_steps_are_what_they_are_without(
    avatar: Avatar, overlapped: None, watch: Callable[..., Calls]
) -> None:
    calls = watch()
    without = render(avatar, look_ahead=False)
    assert not any(is_ahead for _, is_ahead in calls)
    calls.clear()
    assert_same(render(avatar, look_ahead=True), without)
    for name in ("unet", "controlnet"):
        assert (count(calls, name, ahead=False), count(calls, name, ahead=True)) == (STEPS, 2 * STEPS)
    assert (count(calls, "vae_decoder", ahead=False), count(calls, "vae_decoder", ahead=True)) == (len(POSES), 0)
    assert np.array_equal(avatar.render(POSES, **CHANGES), without[0])


def test_the_next_segment_is_sampled_before_the_first_frame_is_there_and_no_other(
    avatar: Avatar, overlapped: None, watch: Callable[..., Calls]
) -> None:
    """The decoder waits for the thread to be through with its segment: in one thread that would never come."""
    sampled = threading.Event()

    def before(name: str, calls: Calls) -> None:
        if name == "unet" and count(calls, "unet", ahead=True) == STEPS - 1:
            sampled.set()
        if name == "vae_decoder":
            assert sampled.wait(PATIENCE_S)
            assert count(calls, "unet", ahead=True) <= STEPS

    calls = watch(before)
    with closing(avatar.iter_segments(POSES, look_ahead=True, **CHANGES)) as segments:
        first = next(segments)
        assert len(list(first.frames)) == 3
        assert count(calls, "unet", ahead=False) == STEPS
    assert count(calls, "unet", ahead=True) == STEPS


def test_no_backend_but_those_that_say_so_looks_ahead(avatar: Avatar, watch: Callable[..., Calls]) -> None:
    assert SAMPLED_AHEAD == ("tensorrt",)
    calls = watch()
    avatar.render(POSES, **CHANGES)
    assert calls and not any(is_ahead for _, is_ahead in calls)


def test_an_error_in_decoding_surfaces_where_it_would(
    avatar: Avatar, overlapped: None, watch: Callable[..., Calls]
) -> None:
    def breaks(name: str, calls: Calls) -> None:
        if name == "vae_decoder" and count(calls, "vae_decoder", ahead=False) == 5:
            raise ValueError("broken")

    whole = avatar.render(POSES, **CHANGES)
    for look_ahead in (False, True):
        watch(breaks)
        frames: list[np.ndarray] = []
        with (
            pytest.raises(ValueError, match="broken"),
            closing(avatar.iter_segments(POSES, look_ahead=look_ahead, **CHANGES)) as segments,
        ):
            for segment in segments:
                frames.extend(segment.frames)
        assert not threads()
        assert np.array_equal(np.stack(frames), whole[: len(frames)]) and len(frames) >= 4
    watch()
    assert np.array_equal(avatar.render(POSES, **CHANGES), whole)


def test_an_error_in_sampling_surfaces_after_the_frames_of_the_segment_before(
    avatar: Avatar, overlapped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that are not finite: this engine runs in float32, so there is no wider type."""
    original, seen = TorchEngine.__call__, []
    for look_ahead in (False, True):
        calls: list[int] = []

        def spoiled(engine: TorchEngine, calls: list[int] = calls, **inputs: Tensor) -> dict[str, Tensor]:
            outputs = original(engine, **inputs)
            if engine.spec.name == "unet":
                calls.append(1)
                if len(calls) > STEPS:  # the second segment
                    return {name: tensor * float("nan") for name, tensor in outputs.items()}
            return outputs

        monkeypatch.setattr(TorchEngine, "__call__", spoiled)
        segments, frames = avatar.iter_segments(POSES, look_ahead=look_ahead, **CHANGES), 0
        with pytest.raises(PoseCrafterError, match="not finite in fp32") as caught:
            for segment in segments:
                frames += len(list(segment.frames))
        seen.append((str(caught.value), frames))
    assert seen[0] == seen[1] and seen[0][1] == 3


def run_out(times: int, name: str, is_due: Callable[[Calls], bool]) -> Callable[[str, Calls], None]:
    """So many calls of a network that are due run out of memory."""
    left = [times]

    def before(called: str, calls: Calls) -> None:
        if called == name and left[0] and is_due(calls):
            left[0] -= 1
            torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space holds

    return before


def test_memory_that_does_not_hold_both_is_enough_for_one_after_the_other(
    avatar: Avatar, overlapped: None, watch: Callable[..., Calls]
) -> None:
    """Whichever runs out: it is done once more alone, nothing is adjusted, and nothing is sampled ahead any more."""
    without = render(avatar, look_ahead=False)
    for name in ("unet", "vae_decoder"):
        calls = watch(run_out(1, name, lambda calls, name=name: name == "vae_decoder" or is_ahead()))
        assert_same_but_for_steps(render(avatar, look_ahead=True), without)
        assert not without[1]["adjustments"]
        assert count(calls, "unet", ahead=True) <= STEPS  # of the second segment
        assert count(calls, "unet", ahead=False) == 3 * STEPS


def assert_same_but_for_steps(first: tuple[np.ndarray, Any, Any], second: tuple[np.ndarray, Any, Any]) -> None:
    """Those of what was begun in the thread and done once more may have been told twice."""
    assert_same((*first[:2], None), (*second[:2], None))


def test_memory_that_runs_out_in_decoding_all_the_same_shortens_what_is_left_as_without(
    avatar: Avatar, overlapped: None, watch: Callable[..., Calls]
) -> None:
    def is_third_frame(calls: Calls) -> bool:
        return count(calls, "vae_decoder", ahead=False) == 2

    watch(run_out(1, "vae_decoder", is_third_frame))
    without = render(avatar, look_ahead=False)
    assert [adjustment["frame"] for adjustment in without[1]["adjustments"]] == [3]
    watch(run_out(2, "vae_decoder", is_third_frame))  # beside the next segment, and alone
    assert_same(render(avatar, look_ahead=True), without)


def test_an_iterator_that_is_closed_early_leaves_no_thread(
    avatar: Avatar, overlapped: None, watch: Callable[..., Calls]
) -> None:
    whole = avatar.render(POSES, **CHANGES)
    calls = watch()
    segments = avatar.iter_segments(POSES, look_ahead=True, **CHANGES)
    first = next(segments)
    next(first.frames)
    assert threads()
    segments.close()
    assert not threads() and count(calls, "unet", ahead=True) <= STEPS
    assert np.array_equal(avatar.render(POSES, **CHANGES), whole)


@pytest.mark.parametrize("after", [1, 2])
def test_a_render_that_is_broken_off_and_resumed_has_the_bytes_of_one_without(
    avatar: Avatar, overlapped: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
) -> None:
    options = RenderOptions(**CHANGES)
    with monkeypatch.context() as patch:
        patch.setattr("posecrafter_rt.avatar.SAMPLED_AHEAD", ())
        render_to_files(avatar, POSES, tmp_path / "whole.mp4", options)
    break_off(avatar, POSES, tmp_path / "broken.mp4", options, after=after)
    assert not threads()
    resumed = render_to_files(avatar, POSES, tmp_path / "broken.mp4", options)
    assert resumed["num_resumed"] == after
    assert (tmp_path / "broken.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_an_interruption_while_a_step_is_told_ends_the_thread(avatar: Avatar, overlapped: None, tmp_path: Path) -> None:
    """Steps of the thread's segment are told here, when it is taken: what the listener raises, an interruption among it, comes
    as ever.
    """
    options = RenderOptions(**CHANGES)

    def told(step: int, steps: int, stage: str) -> None:
        assert not is_ahead()
        if stage == "segment 2 of 3: denoising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_to_files(avatar, POSES, tmp_path / "broken.mp4", options, on_step=told)
    assert not threads()
    assert render_to_files(avatar, POSES, tmp_path / "broken.mp4", options)["num_resumed"] == 1


# ---- without an avatar ----


def sampled(told: OnStep) -> Sampled:
    for step in range(3):
        told("denoising", step, 3)
    return torch.ones(2, 4, 3, 3), SegmentReport(edited_regions=7)


def test_steps_and_the_result_come_where_it_is_taken() -> None:
    told: list[Any] = []
    with closing(Ahead(CPU)) as ahead:
        assert ahead.take(ignore) is None
        for _ in range(2):
            ahead.start(sampled)
            taken = ahead.take(lambda *step: told.append((step, is_ahead())))
            assert taken is not None and taken[1].edited_regions == 7 and ahead.take(ignore) is None
    assert told == 2 * [(("denoising", step, 3), False) for step in range(3)]


def test_what_is_given_up_ends_at_its_next_step_and_nothing_follows() -> None:
    told, begun = threading.Event(), list[int]()

    def endless(step: OnStep) -> Sampled:
        while True:
            step("denoising", len(begun), 0)
            begun.append(1)
            told.set()

    with closing(Ahead(CPU)) as ahead:
        assert not ahead.give_up()
    with closing(Ahead(CPU)) as ahead:
        ahead.start(endless)
        assert told.wait(PATIENCE_S) and ahead.give_up()
        ended = len(begun)
        ahead.start(endless)
        assert ahead.take(ignore) is None and len(begun) == ended and not ahead.give_up()


def test_errors_come_where_it_is_taken_but_for_memory_that_may_suffice_for_one() -> None:
    def fails(error: BaseException) -> Callable[[OnStep], Sampled]:
        def sample(told: OnStep) -> Sampled:
            raise error

        return sample

    with closing(Ahead(CPU)) as ahead:
        ahead.start(fails(PoseCrafterError("no")))
        with pytest.raises(PoseCrafterError, match="no"):
            ahead.take(ignore)
        ahead.start(fails(OutOfMemory("no memory")))
        assert ahead.take(ignore) is None
        ahead.start(sampled)
        assert ahead.take(ignore) is None


def test_where_nothing_may_be_ahead_nothing_is_begun() -> None:
    with closing(Ahead(None)) as ahead:
        ahead.start(sampled)
        assert not threads() and ahead.take(ignore) is None


def test_stages_that_overlap_share_the_count_of_memory_that_each_alone_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = []

    def begin() -> bool:
        begun.append(1)
        return True

    monkeypatch.setattr("posecrafter_rt.runtime.report.count_peak_anew", begin)
    first, second = SegmentReport(), SegmentReport()
    with first.stage("denoise"), second.stage("decode"):
        pass
    assert len(begun) == 1
    with pytest.raises(ValueError, match="no"), first.stage("denoise"):
        raise ValueError("no")
    with second.stage("decode"):
        pass
    assert len(begun) == 3 and first.peak_rss_bytes > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_on_a_gpu_the_thread_sees_what_was_computed_before_and_is_waited_for() -> None:
    """Each side is given far more work than its processor waits for: without the events the sums would be of garbage."""
    device = torch.device("cuda", torch.cuda.current_device())
    with closing(Ahead(device)) as ahead:
        for number in range(4):
            given = torch.zeros(1 << 24, device=device)
            for _ in range(200):
                given += 1

            def sample(told: OnStep, given: Tensor = given) -> Sampled:
                assert torch.cuda.current_stream(device) != torch.cuda.default_stream(device)
                latents = given.clone()
                for _ in range(200):
                    latents += 1
                return latents, SegmentReport()

            ahead.start(sample)
            beside = torch.full((1 << 24,), float(number), device=device)
            taken = ahead.take(ignore)
            assert taken is not None
            assert (taken[0] == 400).all() and (beside == number).all()
