"""`Avatar`: an engine folder ready to render.

Layer 6: the Python API; `cli` and `serve` are thin around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from posecrafter_rt import __version__
from posecrafter_rt.building import read_reference
from posecrafter_rt.engines import Backend, Engine, get_backend
from posecrafter_rt.engines.folder import EngineFolder, open_folder, rebuild_hint
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.machine import library_versions, return_freed_memory
from posecrafter_rt.method import DDIMSchedule, DPMSchedule, select_reference
from posecrafter_rt.models.loading import tokenize
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.cache import InversionCache
from posecrafter_rt.runtime.memory import (
    Room,
    choose_segment,
    explained,
    frame_bytes,
    free_bytes,
    warn_unless_fits,
)
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.prepare import Tables, invert_reference, prepare_clip, prepare_tables
from posecrafter_rt.runtime.presets import bundle
from posecrafter_rt.runtime.render import blend, decode, render_clip
from posecrafter_rt.runtime.report import RenderReport, SegmentReport
from posecrafter_rt.runtime.segments import Segment, SegmentChoice, split_clip
from posecrafter_rt.spec import Architecture

OnStep = Callable[[str, int, int], None]  # stage, step, steps


@dataclass(frozen=True)
class RenderedSegment:
    """One segment of a render.

    frames: those that it settles, (H, W, 3) uint8 RGB, decoded as they are taken; take them all before the next segment.
    carried: (o, 4, h, w), the latents of the frames shared with the next segment, which that needs.
    report: of this segment, complete once the frames are taken.
    """

    frames: Iterator[np.ndarray]
    carried: Tensor
    report: SegmentReport


class Avatar:
    """A tuned person, loaded from an engine folder; a context manager.

    frames: (n, H, W, 3) uint8, the training frames; poses: their poses on a canvas of that size.
    last_report: of the latest render that ran to its end.
    """

    def __init__(self, folder: EngineFolder, engines: dict[str, Engine]) -> None:
        self.folder, self.engines = folder, engines
        manifest = folder.manifest
        self.schedules = {"ddim": DDIMSchedule.from_config(manifest["scheduler"]),
                          "dpmpp": DPMSchedule.from_config(manifest["scheduler"])}  # fmt: skip
        self.size: tuple[int, int] = tuple(manifest["size"])
        self.prompt: str = manifest["prompt"]
        self.frames, self.poses = read_reference(folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
        self.last_report: RenderReport | None = None
        self._tables: dict[tuple[Any, ...], Tables] = {}

    @classmethod
    def load(cls, path: str | Path) -> Avatar:
        """Verify and load an engine folder.

        Raises: EngineFolderError when it is damaged, was built on another processor or by other versions of the
            package or its backend's libraries, or when its backend cannot run here.
        """
        folder = open_folder(path)
        manifest = folder.manifest
        backend = get_backend(manifest["backend"])
        reason = backend.unsupported_reason(manifest["precision"])
        if reason is not None:
            raise EngineFolderError(f"{path} needs backend {backend.name}: {reason}", rebuild_hint(folder.path))
        for built, here in _provenance(manifest, backend):
            if built != here:
                raise EngineFolderError(f"{path} was built on {built}, this is {here}", rebuild_hint(folder.path))
        arch = Architecture.from_json(manifest["architecture"])
        return cls(folder, backend.load(folder.networks, arch, manifest["precision"], folder.compiled))

    def resolve(self, options: RenderOptions | None = None, *, preset: str = "exact", **changes: Any) -> RenderOptions:
        """Options with a preset's and then changes by name, and what they leave to the base as it recommends.

        Raises: PoseCrafterError for bad options.
        """
        options = replace(options or RenderOptions(), **{**bundle(preset), **changes})
        return options.with_recommended(self.folder.manifest["recommended"])

    def render(self, poses: PoseSequence, options: RenderOptions | None = None, **changes: Any) -> np.ndarray:
        """Render the person in every pose.

        Args: poses: N target poses on any canvas. options, or single options by name: see `RenderOptions`; preset: a
            name of `PRESETS`, a bundle of them that those given by name beside it overrule.
        Returns: (N, H, W, 3) uint8 RGB.
        Raises: PoseError when no training pose shares a keypoint with a target; PoseCrafterError for bad options.
        """
        frames = np.empty((len(poses), *self.size, 3), np.uint8)
        for index, frame in enumerate(self.iter_render(poses, options, **changes)):
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
        """As `render`, yielding frames (H, W, 3) as they are decoded. on_step: told (stage, step, steps).

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
        **changes: Any,
    ) -> Iterator[RenderedSegment]:
        """As `iter_render`, yielding segments. finished: reports of the first ones, not to be rendered again.

        carried: what the last of those carried; to go on from there gives what an unbroken run gives, bit for bit.
        choice: what `choose_segment` chose for the run that rendered them; None: it chooses, where it is asked to.
        """
        options = self.resolve(options, **changes)
        target = transform_keypoints(poses, self.size)  # as the training frames were fitted
        if options.segment is None:
            warn_unless_fits(self._room(options), len(target), options)
        elif options.segment == "auto":
            choice = choice or self.choose_segment(len(target), options)
            options = replace(options, segment=choice.segment)
        assert options.segment != "auto"
        segments = split_clip(len(target), options.segment, options.overlap)
        report = RenderReport(
            options=options, num_frames=len(target), num_segments=len(segments), num_resumed=len(finished),
            segment_reason=None if choice is None else choice.reason,
        )  # fmt: skip
        for part in finished:
            report.add(part)
        with explained(options):
            inverted, tables = self._prepare(target, options, report, on_step or _ignore)
        for index in range(len(finished), len(segments)):
            segment, part = segments[index], SegmentReport()
            told = _naming_segment(on_step or _ignore, index, len(segments))
            with explained(options):
                latents = self._denoise(target, segment, inverted, tables, report, part, told)
                latents = blend(carried, latents)
            num_settled = segment.settled - segment.start
            carried = latents[num_settled:].clone()
            yield RenderedSegment(self._decode(latents[:num_settled], options, part, told), carried, part)
            return_freed_memory()
            report.add(part)
        self.last_report = report

    def choose_segment(self, num_frames: int, options: RenderOptions) -> SegmentChoice:
        """Frames of a segment for a clip of so many, by the memory that is free now.

        Raises: PoseCrafterError where the system does not say how much that is.
        """
        return choose_segment(self._room(options), num_frames, options.overlap)

    def _room(self, options: RenderOptions) -> Room:
        manifest = self.folder.manifest
        reserved = sum(file.stat().st_size for file in self.folder.networks.rglob("*") if file.is_file())
        arch = Architecture.from_json(manifest["architecture"])
        groups = len(self._prompts(options))
        return Room(free_bytes(manifest["device"]["type"]), reserved, frame_bytes(arch, self.size, groups))

    def _prepare(
        self, target: PoseSequence, options: RenderOptions, report: RenderReport, told: OnStep
    ) -> tuple[Tensor, Tables]:
        """What all segments share: the inverted reference (4, h, w) and the tables of sampling."""
        with report.stage("prepare"):
            report.reference_index = select_reference(self.poses, target) if options.selects else 0
        with report.stage("invert"):
            inverted = self._inverted_latents(options, report, lambda *step: told("inverting the reference", *step))
        with report.stage("prepare"):
            timesteps = self.schedules[options.sampler].timesteps(options.num_inference_steps)
            return inverted, self._prepare_tables(timesteps, self._prompts(options))

    def _denoise(
        self, target: PoseSequence, segment: Segment, inverted: Tensor, tables: Tables,
        report: RenderReport, part: SegmentReport, told: OnStep,
    ) -> Tensor:  # fmt: skip
        """Clean latents (F, 4, h, w) of a segment's target frames; its pose embeddings and edits go when it returns."""
        options = report.options
        with part.stage("prepare"):
            reference_pose = self.poses.keypoints[report.reference_index]
            clip = prepare_clip(self.engines, inverted, reference_pose, target[segment.start : segment.stop], options)
            if clip.plan is not None:
                part.count_edits(clip.plan, segment)
        num_steps = options.num_inference_steps - options.start_step
        with part.stage("denoise"):
            latents = render_clip(self.engines, self.schedules[options.sampler], tables, clip, options,
                                  lambda step: told("denoising", step - options.start_step, num_steps))  # fmt: skip
        return latents[1:] if options.inserts else latents  # the inserted reference is never decoded

    def _decode(
        self, latents: Tensor, options: RenderOptions, part: SegmentReport, told: OnStep
    ) -> Iterator[np.ndarray]:
        frames = decode(self.engines, latents)
        for index in range(len(latents)):
            with part.stage("decode"), explained(options):
                frame = next(frames)
            told("decoding", index + 1, len(latents))
            yield frame

    def _prompts(self, options: RenderOptions) -> list[str]:
        prompt = self.prompt if options.prompt is None else options.prompt
        return [prompt] if options.guidance_scale == 1 else ["", prompt]  # unconditional first

    def _prepare_tables(self, timesteps: np.ndarray, prompts: list[str]) -> Tables:
        key = (timesteps.tobytes(), *prompts)
        if key not in self._tables:
            self._tables[key] = prepare_tables(self.engines, timesteps, tokenize(self.tokenizer, prompts))
        return self._tables[key]

    def _inversion_key(self, reference: int, options: RenderOptions) -> dict[str, Any]:
        """All that the inversion depends on, and nothing else (METHOD)."""
        manifest = self.folder.manifest
        assert options.inversion_substeps is not None
        steps = self.schedules[options.sampler].inversion_pairs(
            options.num_inference_steps, options.inversion_substeps, options.start_step).tolist()  # fmt: skip
        return {
            **{name: manifest[name] for name in ("checkpoint", "base_hash", "backend", "precision", "norm_scope",
                                                 "scheduler", "size", "libraries")},
            "loras": [[lora["sha256"], lora["scale"]] for lora in manifest.get("loras", [])],
            "source_prompt": self.prompt, "frame": reference, "steps": steps,
            "conditioning_scale": options.conditioning_scale,
        }  # fmt: skip

    def _inverted_latents(
        self, options: RenderOptions, report: RenderReport, progress: Callable[[int, int], None]
    ) -> Tensor:
        reference = report.reference_index
        cache, key = InversionCache(self.folder.inversions), self._inversion_key(reference, options)
        inverted = cache.load(key)
        report.inversion_cached = inverted is not None
        if inverted is not None:
            return inverted.to(self.engines["unet"].device)
        assert options.inversion_substeps is not None
        schedule = self.schedules[options.sampler]
        timesteps = schedule.inversion_timesteps(
            options.num_inference_steps, options.inversion_substeps, options.start_step)  # fmt: skip
        pose = PoseSequence(self.poses.keypoints[[reference]], self.size)
        with torch.no_grad():
            tables = self._prepare_tables(timesteps, [self.prompt])
            inverted = invert_reference(
                self.engines, schedule, tables, self.frames[reference], pose, options, progress)  # fmt: skip
        if not torch.isfinite(inverted).all():
            raise PoseCrafterError("the inversion is not finite", "build the engine with --precision fp32")
        cache.save(key, inverted)
        return inverted

    def close(self) -> None:
        """Let go of the networks."""
        self.engines = {}
        self._tables = {}

    def __enter__(self) -> Avatar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _ignore(stage: str, step: int, steps: int) -> None:
    """Nobody asked to be told."""


def _naming_segment(told: OnStep, index: int, count: int) -> OnStep:
    """Stages then say of which segment they are, where there are several."""
    return told if count == 1 else lambda stage, *step: told(f"segment {index + 1} of {count}: {stage}", *step)


def _provenance(manifest: dict[str, Any], backend: Backend) -> Iterator[tuple[str, str]]:
    """What an engine is bound to, as pairs: where it was built, and here."""
    yield manifest["device"]["name"], backend.device()["name"]
    yield f"posecrafter-rt {manifest['package']}", f"posecrafter-rt {__version__}"
    here = library_versions(backend.libraries)
    for name in backend.libraries:
        yield f"{name} {manifest['libraries'].get(name)}", f"{name} {here.get(name)}"
