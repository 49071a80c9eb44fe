"""What a render did: counts, reasons and times, of a segment and of the whole.

Layer 5.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.method import EditPlan
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.presets import approximations
from posecrafter_rt.runtime.segments import Adjustment, Segment


@dataclass(kw_only=True)
class SegmentReport:
    """Of one segment.

    edited_regions, skipped_regions: of the frames that it settles; a skipped one is named by its frame in the clip, its
    region and the reason. adjustments: what had to change on the way. seconds: wall time of each stage. peak_gpu_bytes:
    the most that torch allocated on the GPU.
    """

    edited_regions: int = 0
    skipped_regions: list[dict[str, Any]] = field(default_factory=list)
    adjustments: list[Adjustment] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; a GPU's work counts where it was asked for, so it is waited for."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            self.peak_gpu_bytes = torch.cuda.max_memory_allocated()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peak_rss_bytes = peak_rss_bytes()

    def count_edits(self, plan: EditPlan, segment: Segment) -> None:
        """Add the edits of the frames that a segment settles: those that it shares with the next are the next's."""
        num_settled = segment.settled - segment.start
        rects = plan.rects[:num_settled]
        self.edited_regions += int((rects[..., 2] > rects[..., 0]).sum())
        self.skipped_regions += [
            {**skipped._asdict(), "frame": segment.start + skipped.frame}
            for skipped in plan.report
            if skipped.frame < num_settled
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values; seconds to the millisecond."""
        return {**vars(self), "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}


@dataclass(kw_only=True)
class RenderReport(SegmentReport):
    """Of a whole render: the sums over its segments, the largest memory, and what they have in common.

    segments: how many frames each of them rendered jointly; one: the clip was not split. num_resumed: how many of them
    an earlier, interrupted run had finished. segment_reason: how `segment="auto"` came to the number in `options`. reference_index: which training frame was
    inverted. inversion_cached: whether it was read from the cache.
    """

    options: RenderOptions
    num_frames: int
    segments: list[int] = field(default_factory=list)
    num_resumed: int = 0
    segment_reason: str | None = None
    reference_index: int = 0
    inversion_cached: bool = False

    @property
    def num_segments(self) -> int:
        """Of those that are done."""
        return len(self.segments)

    def add(self, part: SegmentReport, segment: Segment) -> None:
        """Take in a segment and its report."""
        self.segments.append(segment.stop - segment.start)
        self.edited_regions += part.edited_regions
        self.skipped_regions += part.skipped_regions
        self.adjustments += part.adjustments
        for name, value in part.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.peak_rss_bytes = max(self.peak_rss_bytes, part.peak_rss_bytes)
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, part.peak_gpu_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for report.json.

        claims_byte_equality: whether another run with the same options gives the same bytes. It does not once memory
        has decided how long segments are.
        """
        shortened = [adjustment["segment"] for adjustment in self.adjustments if "segment" in adjustment]
        longest = [self.options.segment, *shortened][-1] if self.num_segments > 1 else None
        return {**super().to_json(), "options": vars(self.options), "num_segments": self.num_segments,
                "claims_byte_equality": not shortened,
                "approximations": approximations(self.options, longest)}  # fmt: skip


def describe_adjustment(adjustment: Adjustment) -> str:
    """One line."""
    if "segment" in adjustment:
        change = f"segments of {adjustment['segment']} frames at most, {adjustment['overlap']} shared"
    else:
        change = f"networks in {adjustment['precision']}"
    return f"from frame {adjustment['frame']} on {change}: {adjustment['reason']}"
