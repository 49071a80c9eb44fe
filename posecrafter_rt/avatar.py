"""`Avatar`: an engine folder ready to render.

Layer 6: the Python API; `cli` and `serve` are thin around it. The render loop is in `avatar_render`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from posecrafter_rt.avatar_networks import Networks, check_runs_here
from posecrafter_rt.avatar_once import KEPT, ComputedOnce
from posecrafter_rt.avatar_render import RenderedSegment, RenderSetup, SegmentRender
from posecrafter_rt.engine_training import read_training
from posecrafter_rt.engines import SAMPLED_AHEAD, Engine, Precision
from posecrafter_rt.engines.folder import EngineFolder, open_folder
from posecrafter_rt.errors import NotFinite, PoseCrafterError
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.method import DDIMSchedule, DPMSchedule, medoid_reference, select_reference
from posecrafter_rt.method.dpmpp import dpmpp_terms
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.ahead import Ahead
from posecrafter_rt.runtime.memory import LOAD_ADVICE, STREAM_ADVICE, choose_segment, explained, warn_unless_fits
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.presets import STREAM_PRESETS, bundle
from posecrafter_rt.runtime.progress import OnStep, ignore
from posecrafter_rt.runtime.recent import Recent
from posecrafter_rt.runtime.report import RenderReport, SegmentReport
from posecrafter_rt.runtime.segments import SegmentChoice, Split
from posecrafter_rt.runtime.stream import AvatarStream, StreamReference, sample_reference
from posecrafter_rt.runtime.stream_denoiser import Sampling
from posecrafter_rt.runtime.stream_options import StreamOptions


class Avatar:
    """A tuned person, loaded from an engine folder; a context manager.

    frames: (n, H, W, 3) uint8, the training frames; poses: their poses on a canvas of that size.
    last_report: the report of the latest render that ran to its end.
    """

    def __init__(self, folder: EngineFolder) -> None:
        self.folder, self.networks = folder, Networks(folder)
        manifest = folder.manifest
        multistep = DPMSchedule.from_config(manifest["scheduler"])
        singlestep = DDIMSchedule.from_config(manifest["scheduler"])
        self.schedules = {"ddim": singlestep, "dpmpp": multistep, "unipc": multistep}
        self.size: tuple[int, int] = tuple(manifest["size"])
        self.prompt: str = manifest["prompt"]
        self.frames, self.poses = read_training(folder.path)
        self.last_report: RenderReport | None = None
        self._once = ComputedOnce(self.networks, self.frames, self.poses)
        self._stream_references = Recent[tuple[StreamReference, Precision]](KEPT)

    @classmethod
    @explained(LOAD_ADVICE)
    def load(cls, path: str | Path) -> Avatar:
        """Verify and load an engine folder.

        Raises: EngineFolderError if it is damaged, was built on another device or by other versions of the package or
            its backend's libraries, or if its backend cannot run here; OutOfMemory.
        """
        folder = open_folder(path)
        check_runs_here(folder)
        avatar = cls(folder)
        avatar.networks.use(avatar.networks.built)
        return avatar

    @property
    def engines(self) -> dict[str, Engine]:
        """The loaded networks by name."""
        return self.networks.engines

    @property
    def has_small_decoder(self) -> bool:
        """Whether the engine has the small decoder (a few convolutions) in addition to the VAE's."""
        return self.networks.architecture.has_small_decoder

    def resolve(self, options: RenderOptions | None = None, *, preset: str = "exact", **changes: Any) -> RenderOptions:
        """Return `options`, overridden by the preset, then by `changes`; the base's recommendations replace None.

        Raises: PoseCrafterError for bad options, for options that need a network that the engine lacks, and for steps
            that would do nothing.
        """
        options = replace(options or RenderOptions(), **{**bundle(preset), **changes})
        self.networks.check(options)
        options = options.with_recommended(self.folder.manifest["recommended"])
        options.check_start(self.schedules[options.sampler])
        return options

    def render(self, poses: PoseSequence, options: RenderOptions | None = None, **changes: Any) -> np.ndarray:
        """Render the person in every pose.

        Args: poses: N target poses on any canvas. options, or single options by name: see `RenderOptions`. preset: a
            name of `PRESETS`, a bundle of options; options given by name override it.
        Returns: (N, H, W, 3) uint8 RGB.
        Raises: PoseError if no training pose shares a keypoint with a target; PoseCrafterError for bad options.
        """
        frames = np.empty((len(poses), *self.size, 3), np.uint8)
        with closing(self.iter_segments(poses, options, look_ahead=True, **changes)) as segments:
            for index, frame in enumerate(frame for segment in segments for frame in segment.frames):
                frames[index] = frame
        return frames

    def iter_render(
        self,
        poses: PoseSequence,
        options: RenderOptions | None = None,
        *,
        on_step: OnStep | None = None,
        **changes: Any,
    ) -> Iterator[np.ndarray]:
        """Render, and yield the frames (H, W, 3) as they are decoded. on_step: called with (stage, step, steps).

        With `segment` they come segment by segment, and memory does not grow with their number.
        """
        for segment in self.iter_segments(poses, options, on_step=on_step, **changes):
            yield from segment.frames

    def iter_segments(
        self,
        poses: PoseSequence,
        options: RenderOptions | None = None,
        *,
        choice: SegmentChoice | None = None,
        finished: Sequence[SegmentReport] = (),
        carried: Tensor | None = None,
        on_step: OnStep | None = None,
        look_ahead: bool = False,
        **changes: Any,
    ) -> Generator[RenderedSegment, None, None]:
        """Render, and yield segments. finished: reports of the first ones, which are not rendered again.

        carried: the latents that the last of those carried. Continuing from there gives the bytes of an unbroken run.
        choice: what `choose_segment` chose for the run that rendered them; None: it is called if `segment` is `auto`.
        look_ahead: sample the next segment in a thread while the frames of this one are taken, if the backend can. It
            changes no byte and no order. Until the iterator has ended or is closed, nothing else may use the avatar.
        """
        options, on_step = self.resolve(options, **changes), on_step or ignore
        self.schedules[options.sampler].warn_of_less_noise(options.num_inference_steps)
        target = transform_keypoints(poses, self.size)  # as the training frames were fitted
        if options.segment is None:
            warn_unless_fits(self.networks.room(options), len(target), options)
        elif options.segment == "auto":
            choice = choice or self.choose_segment(len(target), options)
            options = replace(options, segment=choice.segment, overlap=choice.overlap)
        segment_length = self.networks.checked_segment(len(target), options)
        split = Split(len(target), segment_length, options.overlap)
        report = RenderReport(options=options, precision=self.networks.built, num_frames=len(target),
                              num_resumed=len(finished), segment_reason=None if choice is None else choice.reason,
                              adjustments=[] if choice is None else choice.adjustments())  # fmt: skip
        for part in finished:
            report.add(part, split.settle(part.adjustments))
        with explained(options):
            inverted = self._prepare(target, options, report, on_step)
        setup = self._setup(target, report, inverted)
        is_ahead = look_ahead and self.folder.manifest["backend"] in SAMPLED_AHEAD
        with closing(Ahead(inverted.device if is_ahead else None)) as ahead:
            yield from SegmentRender(self.networks, setup, split, report, ahead, on_step).segments(carried)
        self.last_report = report

    @explained(STREAM_ADVICE)
    def stream(
        self, options: StreamOptions | None = None, *, preset: str = "balanced",
        calibration: PoseSequence | None = None, **changes: Any,
    ) -> AvatarStream:  # fmt: skip
        """Open a stream, which renders one frame for each pose as it comes: `AvatarStream.step`.

        The first stream with given options inverts and samples the reference; later ones share it. A frame of a stream
        attends only to the reference and to past frames, so it approximates the frame of a joint render.
        Args: options, or single options by name: see `StreamOptions`. preset: a name of `STREAM_PRESETS`, a bundle of
            options; options given by name override it. calibration: poses like those to come, on any canvas, by which
            the reference is chosen (Eq. 5); None: the training pose that is nearest to all others.
        Raises: PoseCrafterError for bad options, and if the checkpoint's GroupNorm takes statistics over a whole clip;
            OutOfMemory.
        """
        options = replace(options or StreamOptions(), **{**bundle(preset, STREAM_PRESETS), **changes})
        if self.folder.manifest["norm_scope"] != "frame":
            raise PoseCrafterError("this checkpoint cannot stream: its GroupNorm takes statistics over all frames together",
                                   "tune with norm_scope frame")  # fmt: skip
        target = None if calibration is None else transform_keypoints(calibration, self.size)
        index = medoid_reference(self.poses) if target is None else select_reference(self.poses, target)
        recommended = self.folder.manifest["recommended"]["strength"]
        render = self.resolve(options.as_render(recommended, self.has_small_decoder))
        self.networks.check(replace(render, unet_every=options.unet_every))
        report = RenderReport(options=render, precision=self.networks.built, num_frames=1, reference_index=index)
        return AvatarStream(*self._stream_networks(report), options, widen=partial(self._widened_networks, report))

    def _stream_networks(self, report: RenderReport) -> tuple[Mapping[str, Engine], StreamReference]:
        """Return the networks for streams with the report's options, and the reference that these streams share."""
        reference, precision = self._stream_reference(report)
        self.networks.use(precision)  # a render may have unloaded the networks, or changed their precision
        return self.engines, reference

    def _widened_networks(
        self, report: RenderReport, failed: StreamReference, let_go: Callable[[], None]
    ) -> tuple[Mapping[str, Engine], StreamReference]:
        """Widen the networks for all streams, after a frame with `failed` was not finite: `widen` of `AvatarStream`."""
        reference, precision = self._stream_reference(report)
        if reference is failed:  # else another stream has already widened it
            report.adjust(self.networks.widening("a frame of a stream", 0, precision))
            self._stream_references.forget((report.reference_index, report.options))
        let_go()
        return self._stream_networks(report)

    def _stream_reference(self, report: RenderReport) -> tuple[StreamReference, Precision]:
        """Return the sampled reference of streams with the same reference frame and options, and its precision."""
        return self._stream_references.get(
            (report.reference_index, report.options), lambda: self._sample_reference(report)
        )

    def _sample_reference(self, report: RenderReport) -> tuple[StreamReference, Precision]:
        """Sample the reference; return it and the precision used, which is widened if a number is not finite."""
        options, index = report.options, report.reference_index
        inverted = self._inverted_latents(report, ignore)
        schedule, start = self.schedules["dpmpp"], options.start_step
        assert isinstance(schedule, DPMSchedule)
        timesteps = schedule.timesteps(options.num_inference_steps)[start:]
        terms = dpmpp_terms(schedule, options.num_inference_steps, start_step=start)[start:]
        while True:
            precision, _ = self.networks.needed(report)
            self.networks.use(precision)
            tables = self._once.tables(timesteps, self._prompts(options))
            sampling = Sampling(tables, terms, options.conditioning_scale)
            try:
                return sample_reference(self.engines, sampling, inverted, self.poses.keypoints[index], self.size,
                                        options.decoder), precision  # fmt: skip
            except NotFinite:
                report.adjust(self.networks.widening("the reference of a stream", 0, precision))

    def choose_segment(self, num_frames: int, options: RenderOptions) -> SegmentChoice:
        """Choose the length of segments and their overlap for a clip of `num_frames`, by the memory that is free now.

        Raises: PoseCrafterError if the system does not say how much memory is free.
        """
        return choose_segment(self.networks.room(options), num_frames, options.overlap)

    def _prepare(self, target: PoseSequence, options: RenderOptions, report: RenderReport, told: OnStep) -> Tensor:
        """Choose and invert the reference, which all segments share; return its latents (4, h, w)."""
        with self.networks.on_device(), report.stage("prepare"):
            report.reference_index = select_reference(self.poses, target) if options.selects else 0
        with self.networks.on_device(), report.stage("invert"):
            return self._inverted_latents(report, told)

    def _setup(self, target: PoseSequence, report: RenderReport, inverted: Tensor) -> RenderSetup:
        """Return what `_prepare` has left for the segments. inverted: the reference's latents."""
        options, schedule = report.options, self.schedules[report.options.sampler]
        prepared = partial(self._once.prepared, report.reference_index, inverted,
                           schedule.timesteps(options.num_inference_steps), self._prompts(options))  # fmt: skip
        return RenderSetup(options, schedule, target, prepared)

    def _prompts(self, options: RenderOptions) -> list[str]:
        prompt = self.prompt if options.prompt is None else options.prompt
        return [prompt] if options.groups == 1 else ["", prompt]  # unconditional first

    def _inverted_latents(self, report: RenderReport, told: OnStep) -> Tensor:
        schedule = self.schedules[report.options.sampler]
        return self._once.inverted_latents(schedule, self.prompt, report,
                                           lambda *step: told("inverting the reference", *step))  # fmt: skip

    def close(self) -> None:
        """Unload the networks and free their memory; a later render loads them again."""
        self._once.forget()
        self._stream_references.clear()
        self.networks.release()

    def __enter__(self) -> Avatar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
