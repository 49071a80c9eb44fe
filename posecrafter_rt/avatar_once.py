"""Compute once what all renders and streams of an avatar share: tables, reference latents and pose, the inversion.

Layer 6: beside `avatar`. What depends on the target poses is in `runtime.prepare.Clip`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.avatar_networks import WIDER, Networks
from posecrafter_rt.engines import Precision
from posecrafter_rt.method import DDIMSchedule
from posecrafter_rt.models.tokenizer import PromptTokenizer
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime.cache import InversionCache, inversion_key
from posecrafter_rt.runtime.denoiser import Tables
from posecrafter_rt.runtime.prepare import (
    Prepared,
    embed_poses,
    frame_latents,
    invert_reference,
    text_tables,
    time_tables,
)
from posecrafter_rt.runtime.recent import Recent
from posecrafter_rt.runtime.report import RenderReport

KEPT = 4  # results of each kind


class ComputedOnce:
    """Results that all renders and streams share. The last few of each kind are kept in memory, inversions on disk.

    frames, poses: the training frames and their poses; see `Avatar`.
    """

    def __init__(self, networks: Networks, frames: np.ndarray, poses: PoseSequence) -> None:
        self.networks, self.frames, self.poses = networks, frames, poses
        self.tokenizer = PromptTokenizer(networks.folder.path / "tokenizer", networks.architecture.text_tokens)
        self._time_tables = Recent[dict[str, Tensor]](KEPT)
        self._text_tables = Recent[dict[str, Tensor]](KEPT)
        self._embeddings = Recent[Tensor](KEPT)
        self._latents = Recent[Tensor](KEPT)

    def tables(self, timesteps: np.ndarray, prompts: list[str]) -> Tables:
        """Return the tables for int64 timesteps, noisiest first, and for one prompt per group."""
        engines, computed = self.networks.engines, self._computed_by()
        return Tables(
            self._time_tables.get((computed, timesteps.tobytes()), lambda: time_tables(engines, timesteps)),
            self._text_tables.get(
                (computed, *prompts), lambda: text_tables(engines, self.tokenizer(prompts))),
        )  # fmt: skip

    def _computed_by(self) -> tuple[Precision | None, tuple[int, ...]]:
        """Return what else the networks' outputs depend on besides their inputs: part of the keys of results."""
        return self.networks.precision, tuple(self.networks.threads)

    def prepared(self, reference: int, inverted_latents: Tensor, timesteps: np.ndarray, prompts: list[str]) -> Prepared:
        """Return what all segments of a render share, with the training frame of index `reference` as its reference."""
        tables, embedding = self.tables(timesteps, prompts), self._reference_embedding(reference)
        return Prepared(tables, inverted_latents, self.poses.keypoints[reference], embedding)

    def _reference_embedding(self, reference: int) -> Tensor:
        """Return the pose embedding of a training frame, (1, C, h, w)."""
        networks, poses = self.networks, PoseSequence(self.poses.keypoints[[reference]], self.poses.canvas)
        return self._embeddings.get((self._computed_by(), reference),
                                    lambda: embed_poses(networks.engines, poses, poses.canvas))  # fmt: skip

    def _reference_latents(self, reference: int) -> Tensor:
        """Return the latents of a training frame, (1, 4, h, w)."""
        return self._latents.get((self._computed_by(), reference),
                                 lambda: frame_latents(self.networks.engines, self.frames[reference]))  # fmt: skip

    def inverted_latents(
        self, schedule: DDIMSchedule, prompt: str, report: RenderReport, progress: Callable[[int, int], None]
    ) -> Tensor:
        """Return the inverted reference (4, h, w), from the cache or computed.

        If it is not finite in the engine's type, it is computed in float32, and the change is noted in the report. An
        inversion that is cached in float32 was once computed so for that reason, so the change is noted then, too.
        Args: schedule: the sampler's; prompt: the source prompt; report: the render's.
        """
        networks, options = self.networks, report.options
        cache, precision = InversionCache(networks.folder.inversions), networks.built
        keys = {name: inversion_key(networks.folder.manifest, schedule, options, precision=name,
                                    frame=report.reference_index, prompt=prompt, threads=networks.threads)
                for name in (precision, WIDER)}  # fmt: skip
        cached = {name: cache.load(key) for name, key in keys.items()}
        report.inversion_cached = any(inverted is not None for inverted in cached.values())
        while True:
            if report.inversion_cached:
                inverted = cached[precision]
            else:
                inverted = self._invert(schedule, prompt, precision, report, progress)
            if inverted is not None and torch.isfinite(inverted).all():
                break
            report.adjust({**networks.widening("the inversion", 0, precision), "inversion": True})
            precision = WIDER
        if not report.inversion_cached:
            cache.save(keys[precision], inverted)
        networks.use(*networks.needed(report))
        return inverted.to(networks.engines["unet"].device)

    @torch.no_grad()
    def _invert(
        self, schedule: DDIMSchedule, prompt: str, precision: Precision, report: RenderReport,
        progress: Callable[[int, int], None],
    ) -> Tensor:  # fmt: skip
        options, reference = report.options, report.reference_index
        self.networks.use(precision)
        assert options.inversion_substeps is not None
        timesteps = schedule.inversion_timesteps(
            options.num_inference_steps, options.inversion_substeps, options.start_step)  # fmt: skip
        tables, latents = self.tables(timesteps, [prompt]), self._reference_latents(reference)
        return invert_reference(
            self.networks.engines, schedule, tables, latents, self._reference_embedding(reference), options, progress)  # fmt: skip

    def forget(self) -> None:
        """Drop everything that is kept in memory."""
        for kept in (self._time_tables, self._text_tables, self._embeddings, self._latents):
            kept.clear()
