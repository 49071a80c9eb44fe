"""`Avatar`: an engine folder ready to render.

Layer 6: the Python API; `cli` and `serve` are thin around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from posecrafter_rt.machine import library_versions, peak_rss_bytes
from posecrafter_rt.method import DDIMSchedule, select_reference
from posecrafter_rt.models.loading import tokenize
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.cache import InversionCache
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.prepare import Tables, invert_reference, prepare_clip, prepare_tables
from posecrafter_rt.runtime.render import decode, render_clip
from posecrafter_rt.spec import Architecture

OnStep = Callable[[str, int, int], None]  # stage, step, steps


@dataclass
class RenderReport:
    """What a render did.

    reference_index: which training frame was inverted. inversion_cached: whether it was read from the cache.
    skipped_regions: frame, region and reason of every edit that was not made. seconds: wall time of each stage.
    """

    options: RenderOptions
    num_frames: int
    reference_index: int = 0
    inversion_cached: bool = False
    edited_regions: int = 0
    skipped_regions: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for report.json."""
        return {**vars(self), "options": vars(self.options)}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        self.peak_rss_bytes = peak_rss_bytes()


class Avatar:
    """A tuned person, loaded from an engine folder; a context manager.

    frames: (n, H, W, 3) uint8, the training frames; poses: their poses on a canvas of that size.
    last_report: of the latest render that ran to its end.
    """

    def __init__(self, folder: EngineFolder, engines: dict[str, Engine]) -> None:
        self.folder, self.engines = folder, engines
        manifest = folder.manifest
        self.schedule = DDIMSchedule.from_config(manifest["scheduler"])
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

    def render(self, poses: PoseSequence, options: RenderOptions | None = None, **changes: Any) -> np.ndarray:
        """Render the person in every pose.

        Args: poses: N target poses on any canvas. options, or single options by name: see `RenderOptions`.
        Returns: (N, H, W, 3) uint8 RGB.
        Raises: PoseError when no training pose shares a keypoint with a target; PoseCrafterError for bad options.
        """
        return np.stack(list(self.iter_render(poses, options, **changes)))

    def iter_render(
        self,
        poses: PoseSequence,
        options: RenderOptions | None = None,
        *,
        on_step: OnStep | None = None,
        **changes: Any,
    ) -> Iterator[np.ndarray]:
        """As `render`, yielding frames (H, W, 3) as they are decoded. on_step: told (stage, step, steps)."""
        options = replace(options or RenderOptions(), **changes).with_recommended(self.folder.manifest["recommended"])
        assert options.inversion_substeps is not None
        report = RenderReport(options, len(poses))
        target = transform_keypoints(poses, self.size)  # as the training frames were fitted
        told = on_step or (lambda stage, step, steps: None)
        num_steps = options.num_inference_steps - options.start_step
        with report.stage("prepare"):
            reference = select_reference(self.poses, target) if options.selects else 0
            report.reference_index = reference
            inversion = self.schedule.inversion_timesteps(
                options.num_inference_steps, options.inversion_substeps, options.start_step)  # fmt: skip
            source = self._prepare_tables(inversion, [self.prompt])
        with report.stage("invert"):
            told("inverting the reference", 0, num_steps)
            inverted = self._inverted_latents(reference, source, options, report)
        with report.stage("prepare"):
            clip = prepare_clip(self.engines, inverted, self.poses.keypoints[reference], target, options)
            if clip.plan is not None:
                report.skipped_regions = [skipped._asdict() for skipped in clip.plan.report]
                report.edited_regions = int((clip.plan.rects[..., 2] > clip.plan.rects[..., 0]).sum())
            timesteps = self.schedule.timesteps(options.num_inference_steps)
            tables = self._prepare_tables(timesteps, self._prompts(options))
        with report.stage("denoise"):
            latents = render_clip(self.engines, self.schedule, tables, clip, options,
                                  lambda step: told("denoising", step - options.start_step, num_steps))  # fmt: skip
        if options.inserts:
            latents = latents[1:]  # the inserted reference is never decoded
        frames = decode(self.engines, latents)
        for index in range(len(latents)):
            with report.stage("decode"):
                frame = next(frames)
            told("decoding", index + 1, len(latents))
            yield frame
        self.last_report = report

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
        return {
            **{name: manifest[name] for name in ("checkpoint", "base_hash", "backend", "precision", "norm_scope",
                                                 "scheduler", "size", "libraries")},
            "source_prompt": self.prompt, "frame": reference, "steps": options.num_inference_steps,
            "substeps": options.inversion_substeps,
            "end_timestep": int(self.schedule.timesteps(options.num_inference_steps)[options.start_step]),
            "conditioning_scale": options.conditioning_scale,
        }  # fmt: skip

    def _inverted_latents(self, reference: int, tables: Tables, options: RenderOptions, report: RenderReport) -> Tensor:
        cache, key = InversionCache(self.folder.inversions), self._inversion_key(reference, options)
        inverted = cache.load(key)
        report.inversion_cached = inverted is not None
        if inverted is None:
            with torch.no_grad():
                inverted = invert_reference(
                    self.engines, self.schedule, tables, self.frames[reference],
                    PoseSequence(self.poses.keypoints[[reference]], self.size), options)  # fmt: skip
            cache.save(key, inverted)
        if not torch.isfinite(inverted).all():
            raise PoseCrafterError("the inversion is not finite", "build the engine with --precision fp32")
        return inverted

    def close(self) -> None:
        """Let go of the networks."""
        self.engines = {}
        self._tables = {}

    def __enter__(self) -> Avatar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _provenance(manifest: dict[str, Any], backend: Backend) -> Iterator[tuple[str, str]]:
    """What an engine is bound to, as pairs: where it was built, and here."""
    yield manifest["device"]["name"], backend.device()["name"]
    yield f"posecrafter-rt {manifest['package']}", f"posecrafter-rt {__version__}"
    here = library_versions(backend.libraries)
    for name in backend.libraries:
        yield f"{name} {manifest['libraries'].get(name)}", f"{name} {here.get(name)}"
