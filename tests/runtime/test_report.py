"""What a report counts in each stage, and how those of segments come together."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from posecrafter_rt.machine import return_freed_memory
from posecrafter_rt.runtime import memory
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.report import RenderReport, SegmentReport
from posecrafter_rt.runtime.segments import Segment

MB = 1_000_000


def whole(precision: str = "fp32", **named) -> RenderReport:
    options = RenderOptions(strength=1.0, inversion_substeps=1)
    return RenderReport(options=options, precision=precision, num_frames=9, **named)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be counted anew on Linux alone")
def test_each_stage_has_its_own_peak_and_a_second_report_too() -> None:
    reports = [SegmentReport(), SegmentReport()]
    with reports[0].stage("denoise"):
        memory = b"\1" * 400 * MB
    del memory
    return_freed_memory()
    for report in reports:
        with report.stage("decode"):
            pass
    first, second = reports
    assert list(first.rss_bytes) == ["denoise", "decode"] and list(first.seconds) == ["denoise", "decode"]
    assert first.rss_bytes["denoise"] - first.rss_bytes["decode"] > 200 * MB
    assert first.peak_rss_bytes == first.rss_bytes["denoise"] and second.peak_rss_bytes == second.rss_bytes["decode"]
    assert first.peak_rss_bytes - second.peak_rss_bytes > 200 * MB


def test_a_stage_that_comes_again_adds_its_time_and_keeps_the_larger_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    report, peaks = SegmentReport(), iter([3 * MB, 5 * MB, 4 * MB])
    monkeypatch.setattr("posecrafter_rt.runtime.report.count_peak_anew", lambda: True)
    monkeypatch.setattr("posecrafter_rt.runtime.report.counted_peak_bytes", lambda: next(peaks))
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("posecrafter_rt.runtime.report.time.perf_counter", lambda: next(clock))
    for _ in range(3):
        with report.stage("decode"):
            pass
    assert report.seconds == {"decode": 7.0} and report.rss_bytes == {"decode": 5 * MB}
    assert report.peak_rss_bytes == 5 * MB


def test_a_stage_of_a_gpu_counts_what_is_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays allocate nothing, so torch counts none of the memory that they write to."""
    memory._recorded_bytes.cache_clear()
    segments = [
        {"device": 0, "segment_pool_id": pool, "total_size": 9 * MB, "allocated_size": MB} for pool in ((0, 0), (0, 7))
    ]
    for name, told in (("is_initialized", True), ("reset_peak_memory_stats", None), ("max_memory_allocated", 3 * MB),
                       ("memory_snapshot", segments), ("memory_reserved", 18 * MB), ("memory_allocated", 2 * MB),
                       ("current_device", 0)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda told=told: told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    report = SegmentReport()
    with report.stage("denoise"):
        pass
    assert report.gpu_bytes == {"denoise": 11 * MB} and report.peak_gpu_bytes == 11 * MB


def test_where_nothing_can_be_counted_anew_stages_have_none_and_the_process_has_its_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("posecrafter_rt.runtime.report.count_peak_anew", lambda: False)
    report = SegmentReport()
    with report.stage("decode"):
        pass
    assert report.to_json()["rss_bytes"] == {"decode": None} and report.peak_rss_bytes > MB


def test_a_render_has_the_sums_and_the_largest_of_its_segments() -> None:
    report = whole()
    parts = [
        SegmentReport(seconds={"denoise": 1.0}, rss_bytes={"denoise": None}, peak_rss_bytes=9),
        SegmentReport(seconds={"denoise": 2.0, "decode": 1.0}, rss_bytes={"denoise": 5, "decode": 7},
                      gpu_bytes={"denoise": 4}, peak_rss_bytes=7, peak_gpu_bytes=4),
        SegmentReport(rss_bytes={"denoise": 3, "decode": None}, gpu_bytes={"denoise": 2}),
    ]  # fmt: skip
    for index, part in enumerate(parts):
        report.add(part, Segment(3 * index, 3 * index + 3, 3 * index + 3))
    assert report.seconds == {"denoise": 3.0, "decode": 1.0} and report.segments == [3, 3, 3]
    assert report.rss_bytes == {"denoise": 5, "decode": 7} and report.gpu_bytes == {"denoise": 4}
    assert (report.peak_rss_bytes, report.peak_gpu_bytes) == (9, 4)


@pytest.mark.parametrize(("frame", "marked", "named"), [(0, {"inversion": True}, {}), (0, {}, {"precision": "int8"}),
                                                        (3, {}, {"precision": "int8"})])  # fmt: skip
def test_what_was_float32_from_the_inversion_on_is_no_approximation(frame: int, marked: dict, named: dict) -> None:
    """Frames that are float32 from the first one on still begin with an inversion in 8 bits."""
    widened = {"frame": frame, "precision": "fp32", "reason": "it was not finite in int8", **marked}
    assert whole("int8", adjustments=[widened]).to_json()["approximations"] == named


@pytest.mark.parametrize(("change", "is_equal", "said"), [
    ({"segment": 4, "overlap": 1}, False, "segments of 4 frames at most, 1 shared"),
    ({"tokens_at_once": 512}, False, "convolutions, attention and feed-forward in parts of 512 tokens, exact to rounding"),
    ({"precision": "fp32"}, True, "networks in fp32"),
])  # fmt: skip
def test_an_adjustment_is_said_and_what_memory_decided_claims_no_equal_bytes(
    change: dict, is_equal: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    report, part = whole(), SegmentReport()
    with caplog.at_level(logging.WARNING):
        part.adjust({"frame": 3, "reason": "so it was", **change})
    assert caplog.messages == [f"from frame 3 on {said}: so it was"]
    report.add(part, Segment(0, 9, 9))
    assert report.to_json()["claims_byte_equality"] is is_equal
    assert report.to_json()["approximations"] == {}  # the clip is one segment: whatever was asked, that is exact


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_each_stage_has_its_own_peak_of_the_gpu() -> None:
    report = SegmentReport()
    kept = torch.zeros(MB, dtype=torch.uint8, device="cuda")
    with report.stage("denoise"):
        torch.zeros(400 * MB, dtype=torch.uint8, device="cuda")
    with report.stage("decode"):
        torch.zeros(8 * MB, dtype=torch.uint8, device="cuda")
    assert report.gpu_bytes["denoise"] - report.gpu_bytes["decode"] > 300 * MB and len(kept)
    assert report.peak_gpu_bytes == report.gpu_bytes["denoise"] >= 401 * MB > report.gpu_bytes["decode"] >= 9 * MB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_what_a_replay_writes_to_counts_in_its_stage() -> None:
    given, graph = torch.zeros(64 * MB, dtype=torch.uint8, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = (given + 1)[:1] + (given + 2)[:1]  # neither sum outlives the recording
    report, before = SegmentReport(), torch.cuda.memory_allocated()
    with report.stage("denoise"):
        graph.replay()
    assert report.gpu_bytes["denoise"] - before >= 64 * MB and result.item() == 3
