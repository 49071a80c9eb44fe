"""What a render did: counts, reasons, times and memory, per segment and in total.

Layer 5.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from posecrafter_rt.machine import count_peak_anew, counted_peak_bytes, peak_rss_bytes
from posecrafter_rt.method import EditPlan
from posecrafter_rt.runtime.memory import recorded_bytes
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.presets import approximations
from posecrafter_rt.runtime.segments import Adjustment, Segment

log = logging.getLogger(__name__)


class _Peaks:
    """The process's counters of peak memory. They restart when a stage begins while no other runs; stages that overlap
    in several threads share them.
    """

    def __init__(self) -> None:
        self.lock, self.num_stages, self.is_counted = Lock(), 0, False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self.lock:
            if self.num_stages == 0:
                self.is_counted = count_peak_anew()
                if torch.cuda.is_initialized():
                    torch.cuda.reset_peak_memory_stats()
            self.num_stages += 1
        try:
            yield
        finally:
            with self.lock:
                self.num_stages -= 1


_peaks = _Peaks()


@dataclass(kw_only=True)
class SegmentReport:
    """The report of one segment.

    edited_regions, skipped_regions: in the frames that it settles. A skipped region is given with its frame in the clip
    and the reason. adjustments: what had to change on the way. threads: how many threads torch computed with, if the
    engine's rounding depends on it; for a whole render each number once. seconds: wall time of each stage. rss_bytes:
    the process's largest resident memory in each stage; None if the system cannot restart that count (Linux can).
    gpu_bytes: the most that torch had allocated on the GPU in each stage, and what recorded CUDA graphs hold at its
    end; empty without a GPU. In the stage that records a graph, its memory may count twice. peak_rss_bytes,
    peak_gpu_bytes: the largest of those; for a stage without a count, the process's largest resident memory so far.
    """

    edited_regions: int = 0
    skipped_regions: list[dict[str, Any]] = field(default_factory=list)
    adjustments: list[Adjustment] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    rss_bytes: dict[str, int | None] = field(default_factory=dict)
    gpu_bytes: dict[str, int] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage's time and memory. It waits for the GPU, so work counts in the stage that asked for it.

        If stages of another thread overlap, their memory counts here, too. Their GPU work does not: it is in another
        stream.
        """
        with _peaks.shared():
            start = time.perf_counter()
            yield
            is_on_gpu = torch.cuda.is_initialized()
            if is_on_gpu:
                torch.cuda.current_stream().synchronize()
            seconds, peak = time.perf_counter() - start, counted_peak_bytes() if _peaks.is_counted else None
            gpu = {name: torch.cuda.max_memory_allocated() + recorded_bytes()} if is_on_gpu else {}
        self._take_in({name: seconds}, {name: peak}, gpu)
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes() if peak is None else peak)
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, *gpu.values(), 0)

    def _take_in(
        self, seconds: Mapping[str, float], rss_bytes: Mapping[str, int | None], gpu_bytes: Mapping[str, int]
    ) -> None:
        """Add stages' times, and keep the larger of their memory peaks and those that are here."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        for name, resident in rss_bytes.items():
            self.rss_bytes[name] = max(self.rss_bytes.get(name), resident, key=lambda peak: peak or 0)
        for name, allocated in gpu_bytes.items():
            self.gpu_bytes[name] = max(self.gpu_bytes.get(name, 0), allocated)

    def adjust(self, adjustment: Adjustment) -> None:
        """Note what has to change, and log it in one line."""
        self.adjustments.append(adjustment)
        log.warning("%s", describe_adjustment(adjustment))

    def count_edits(self, plan: EditPlan, segment: Segment) -> None:
        """Add the edits of the frames that a segment settles. Frames shared with the next segment count there."""
        num_settled = segment.settled - segment.start
        rects = plan.rects[:num_settled]
        self.edited_regions += int((rects[..., 2] > rects[..., 0]).sum())
        self.skipped_regions += [
            {**skipped._asdict(), "frame": segment.start + skipped.frame}
            for skipped in plan.report
            if skipped.frame < num_settled
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with seconds rounded to the millisecond."""
        return {**vars(self), "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}


@dataclass(kw_only=True)
class RenderReport(SegmentReport):
    """The report of a whole render: sums over its segments, the largest memory, and what they have in common.

    precision: the one the engine was built in. segments: how many frames each segment rendered jointly; a single entry
    means that the clip was not split. overlaps: how many of those each shared with the next. segment_peaks: each one's
    largest resident memory. num_resumed: how many segments an earlier, interrupted run had finished. segment_reason:
    how `segment="auto"` came to the number in `options`. reference_index: which training frame was inverted.
    inversion_cached: whether the inversion was read from the cache.
    """

    options: RenderOptions
    precision: str
    num_frames: int
    segments: list[int] = field(default_factory=list)
    overlaps: list[int] = field(default_factory=list)
    segment_peaks: list[int] = field(default_factory=list)
    num_resumed: int = 0
    segment_reason: str | None = None
    reference_index: int = 0
    inversion_cached: bool = False

    @property
    def num_segments(self) -> int:
        """How many segments are done."""
        return len(self.segments)

    def add(self, part: SegmentReport, segment: Segment) -> None:
        """Add a segment and its report."""
        self.segments.append(segment.stop - segment.start)
        self.overlaps.append(segment.stop - segment.settled)
        self.segment_peaks.append(part.peak_rss_bytes)
        self.edited_regions += part.edited_regions
        self.skipped_regions += part.skipped_regions
        self.adjustments += part.adjustments
        self.threads = sorted({*self.threads, *part.threads})
        self._take_in(part.seconds, part.rss_bytes, part.gpu_bytes)
        self.peak_rss_bytes = max(self.peak_rss_bytes, part.peak_rss_bytes)
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, part.peak_gpu_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for report.json.

        claims_byte_equality: whether another run with the `options` given here, where `segment` is what `auto` became,
        gives the same bytes. It does not if segments became shorter when memory ran out, nor if memory decided how much
        of one is computed at once (which only changes rounding), nor if a render was resumed with another number of
        threads.
        """
        by_memory = any("segment" in adjustment or "tokens_at_once" in adjustment for adjustment in self.adjustments)
        shortened = [adjustment["segment"] for adjustment in self.adjustments if "segment" in adjustment]
        longest = [self.options.segment, *shortened][-1] if self.num_segments > 1 else None
        # If only frames are done in a wider type, from the first one on or not, they still begin with this inversion.
        throughout = [adjustment["precision"] for adjustment in self.adjustments if "inversion" in adjustment]
        return {**super().to_json(), "options": vars(self.options), "num_segments": self.num_segments,
                "claims_byte_equality": not by_memory and len(self.threads) < 2,
                "approximations": approximations(self.options, longest, [self.precision, *throughout][-1])}  # fmt: skip


def describe_adjustment(adjustment: Adjustment) -> str:
    """Describe an adjustment in one line."""
    if "segment" in adjustment:
        change = f"segments of {adjustment['segment']} frames at most, {adjustment['overlap']} shared"
    elif "tokens_at_once" in adjustment:
        change = f"convolutions, attention and feed-forward in parts of {adjustment['tokens_at_once']} tokens, exact to rounding"
    else:
        change = f"networks in {adjustment['precision']}"
    return f"from frame {adjustment['frame']} on {change}: {adjustment['reason']}"
