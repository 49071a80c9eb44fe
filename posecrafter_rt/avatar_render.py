"""The render loop over segments: denoise one, settle it, decode its frames, until the clip is done.

Layer 6: beside `avatar`, which makes a `SegmentRender` for each render. From the outside in, the loop is
`SegmentRender.segments` here, `runtime.render.render_clip` for the steps of one segment, and `walk` of `method.ddim`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.avatar_networks import Networks
from posecrafter_rt.errors import NotFinite, OutOfMemory
from posecrafter_rt.machine import return_freed_memory
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.ahead import Ahead, Sampled
from posecrafter_rt.runtime.memory import explained
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.prepare import Prepared, prepare_clip
from posecrafter_rt.runtime.progress import OnStep, naming_segment
from posecrafter_rt.runtime.render import blend, decode, render_clip
from posecrafter_rt.runtime.report import RenderReport, SegmentReport
from posecrafter_rt.runtime.segments import Adjustment, Segment, Split


@dataclass(frozen=True)
class RenderedSegment:
    """One segment of a render.

    frames: those it completes, (H, W, 3) uint8 RGB, decoded as they are taken; take all before the next segment.
    carried: (o, 4, h, w), the latents of the frames shared with the next segment, which blends them with its own.
    report: the report of this segment, complete once all frames are taken.
    """

    frames: Iterator[np.ndarray]
    carried: Tensor
    report: SegmentReport


@dataclass(frozen=True)
class RenderSetup:
    """What all segments of a render are made from.

    options: with nothing left to the base. schedule: their sampler's. target: all poses of the clip, on a canvas of the
    frame size. prepared: returns what no pose changes, as the networks that are loaded at the time compute it.
    """

    options: RenderOptions
    schedule: DDIMSchedule
    target: PoseSequence
    prepared: Callable[[], Prepared]


class SegmentRender:
    """Renders the segments of a clip, and adjusts itself when memory runs out or numbers overflow.

    networks: used, reloaded and closed as needed. split: the segments that are left. report: gets every segment's.
    ahead: samples the next segment meanwhile, if it is on. on_step: called with (stage, step, steps).
    """

    def __init__(
        self, networks: Networks, setup: RenderSetup, split: Split, report: RenderReport, ahead: Ahead, on_step: OnStep
    ) -> None:
        self.networks, self.setup, self.split, self.report = networks, setup, split, report
        self.ahead, self.on_step = ahead, on_step

    def segments(self, carried: Tensor | None) -> Generator[RenderedSegment, None, None]:
        """Render and yield the segments that are left. carried: the latents that the last one before them carried."""
        while self.split.num_left():
            latents, part = self._denoise_adjusting(carried)
            part.threads, self.networks.has_run = self.networks.threads, True
            segment = self.split.settle()
            num_settled = segment.settled - segment.start
            carried = latents[num_settled:].clone()
            if self.split.num_left():
                self.ahead.start(partial(self._denoise_ahead, self.split.upcoming()))
            frames = self._decode(latents[:num_settled], part)
            yield RenderedSegment(frames, carried, part)
            return_freed_memory()
            self.report.add(part, segment)

    def _denoise_adjusting(self, carried: Tensor | None) -> Sampled:
        """Return clean latents (F, 4, h, w) of the next segment, blended with the one before, and its report.

        If memory runs out, the segment is computed in smaller parts, which is exact to rounding. If that is not enough,
        it is shortened, which is an approximation. If its numbers overflow 16 or 8 bits, it is computed again in
        float32. Each change also holds for all segments that follow.
        Raises: OutOfMemory if no shorter segment is possible; PoseCrafterError if there is no wider type.
        """
        adjustments: list[Adjustment] = []
        networks, split, options = self.networks, self.split, self.setup.options
        while True:
            segment, part = split.upcoming(), SegmentReport(adjustments=adjustments)
            told = naming_segment(self.on_step, len(self.report.segments), split.num_left())
            precision, at_once = networks.needed(self.report, part)
            try:
                with explained(options):
                    networks.use(precision, at_once)
                    latents, done = self.ahead.take(told) or (self._denoise(segment, part, told), part)
                    if torch.isfinite(latents).all():  # once per segment only, because it waits for the GPU
                        # A shortened segment may settle fewer frames than the one before it has carried over.
                        shared = None if carried is None else carried[: segment.settled - segment.start]
                        return blend(shared, latents), done
            except OutOfMemory as error:
                num_frames = options.groups * (segment.stop - segment.start + options.inserts)
                mended = networks.dividing(num_frames, at_once, segment.start, str(error))
                if mended is None and options.inserts:
                    mended = split.shorten(str(error))
                if mended is None:
                    raise
                part.adjust(mended)
            else:
                what = f"the segment of frames {segment.start} to {segment.stop - 1}"
                part.adjust(networks.widening(what, segment.start, precision))
            networks.close()  # not in the handler: the exception's traceback keeps tensors alive

    def _denoise(self, segment: Segment, part: SegmentReport, told: OnStep) -> Tensor:
        """Return clean latents (F, 4, h, w) of a segment's target frames; pose embeddings and edits are freed."""
        setup, options, engines = self.setup, self.setup.options, self.networks.engines
        with self.networks.on_device(), part.stage("prepare"):
            prepared = setup.prepared()
            clip = prepare_clip(engines, prepared, setup.target[segment.start : segment.stop], options)
            if clip.plan is not None:
                part.count_edits(clip.plan, segment)
        num_steps = options.num_inference_steps - options.start_step
        with self.networks.on_device(), part.stage("denoise"):
            latents = render_clip(engines, setup.schedule, prepared.tables, clip, options,
                                  lambda step: told("denoising", step - options.start_step, num_steps))  # fmt: skip
        return latents[1:] if options.inserts else latents  # the inserted reference is never decoded

    def _denoise_ahead(self, segment: Segment, told: OnStep) -> Sampled:
        """Run `_denoise` in a thread, with a report of its own; nothing is adjusted here."""
        part = SegmentReport()
        with explained(self.setup.options):
            return self._denoise(segment, part, told), part

    def _decode(self, latents: Tensor, part: SegmentReport) -> Iterator[np.ndarray]:
        """Yield the frames (H, W, 3) uint8 of the segment that was settled last, from its latents (N, 4, h, w)."""
        told = naming_segment(self.on_step, len(self.report.segments), 1 + self.split.num_left())
        for index in range(len(latents)):
            with self.networks.on_device(), part.stage("decode"):
                number = self.split.start - len(latents) + index  # in the clip; split.start is past the settled segment
                frame = self._decode_adjusting(latents[index : index + 1], number, part)
            told("decoding", index + 1, len(latents))
            yield frame

    def _decode_adjusting(self, latents: Tensor, number: int, part: SegmentReport) -> np.ndarray:
        """Decode latents (1, 4, h, w) to frame `number` of the clip, (H, W, 3) uint8.

        Decoding needs the same memory in every segment. If memory runs out, the networks are unloaded, which frees what
        they hold for the segment's length; the frame is decoded again, and the remaining segments become shorter. If
        the numbers overflow 16 or 8 bits, this frame and all that follows are computed in float32. In both cases a
        segment sampled ahead is dropped first; after running out of memory, that alone is tried before any change.
        """
        networks, options, has_run_out = self.networks, self.setup.options, False
        while True:
            precision, at_once = networks.needed(self.report, part)
            try:
                with explained(options):
                    networks.use(precision, at_once)
                    return next(decode(networks.engines, latents, options.decoder))
            except OutOfMemory as error:
                if not self.ahead.give_up():
                    if has_run_out:
                        raise
                    has_run_out, shorter = True, self.split.shorten(str(error))
                    if shorter is not None:
                        part.adjust(shorter)
            except NotFinite:
                self.ahead.give_up()
                part.adjust(networks.widening(f"frame {number}", number, precision))
            networks.close()  # not in the handlers: see `_denoise_adjusting`
