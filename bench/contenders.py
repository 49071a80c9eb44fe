"""What throughput.py compares: each loads a tuned person its own way and renders poses with a clock on every stage.

Bench: `run` is called in a process of its own for each run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)

from bench.plain import Baseline, to_diffusers
from bench.runs import Stages, forget_inversions
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines.base import TORCH_DTYPES
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import PoseSequence

Render = Callable[[PoseSequence, int], tuple[np.ndarray, dict[str, float], int]]
"""(target, num_inference_steps) → frames (N, H, W, 3) uint8, seconds by stage, the most that torch allocated on the GPU."""

METHODS = {
    "exact": "exact",
    "published": "published",
    "plain": "plain",
    "diffusers": "diffusers, frame by frame",
    "compile": "plain, torch.compile",
}
"""What the command line calls each, and what the tables do."""
WARM_UP_STEPS = {"cpu": 1, "cuda": 3}
"""Of the render before the measured one. On a GPU a second step may still compile for, and a recorded graph replays from
the third on."""


@dataclass(frozen=True)
class Job:
    """One run. method: of METHODS' values; engine: what `exact` loads; precision: of the others' weights."""

    method: str
    checkpoint: Path
    engine: Path | None
    precision: str
    target: PoseSequence
    num_inference_steps: int
    output: Path


def gpu_peak_bytes() -> int:
    """The most that torch has had allocated on the GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def load_model(tuned: Checkpoint, job: Job) -> PoseModel:
    """The tuned networks in the job's precision, on the GPU where there is one."""
    return tuned.load_model(dtype=TORCH_DTYPES[job.precision]).to(device=torch_device())


def load_exact(job: Job) -> Render:
    """This runtime; its inversion cache emptied before each render."""
    assert job.engine is not None
    avatar = Avatar.load(job.engine)

    def render(target: PoseSequence, num_inference_steps: int) -> tuple[np.ndarray, dict[str, float], int]:
        forget_inversions(avatar)
        frames = avatar.render(target, num_inference_steps=num_inference_steps, inversion_substeps=1, strength=1.0)
        assert avatar.last_report is not None
        return frames, avatar.last_report.seconds, avatar.last_report.peak_gpu_bytes  # it counts each stage anew

    return render


def load_baseline(job: Job) -> Render:
    """ControlVideo's algorithm, or PoseCrafter as published."""
    tuned = Checkpoint.load(job.checkpoint)
    baseline = Baseline(load_model(tuned, job), tuned.metadata["prompt"])
    if job.method == METHODS["compile"]:
        networks = baseline.networks
        compiled: dict[str, Any] = {name: torch.compile(getattr(networks, name)) for name in ("unet", "controlnet")}
        baseline.networks = replace(networks, **compiled)
    algorithm = baseline.published if job.method == "published" else baseline.plain

    def render(target: PoseSequence, num_inference_steps: int) -> tuple[np.ndarray, dict[str, float], int]:
        rendered = algorithm(tuned.frames, tuned.poses, target, num_inference_steps)
        return rendered.frames, rendered.seconds, gpu_peak_bytes()

    return render


def load_diffusers(job: Job) -> Render:
    """diffusers' own pipeline on the tuned image networks, one frame after another from one noise: no clip, no person."""
    tuned = Checkpoint.load(job.checkpoint)
    model = load_model(tuned, job)
    pipeline: Any = StableDiffusionControlNetPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        unet=to_diffusers(model.unet, UNet2DConditionModel),
        controlnet=to_diffusers(model.controlnet, ControlNetModel),
        scheduler=DDIMScheduler.from_config(model.scheduler_config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).to(torch_device())  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def render(target: PoseSequence, num_inference_steps: int) -> tuple[np.ndarray, dict[str, float], int]:
        stages, frames = Stages(), []
        poses = transform_keypoints(target, tuned.frames.shape[1:3])
        pictures = torch.from_numpy(draw_poses(poses, poses.canvas)).permute(0, 3, 1, 2).float().div(255)
        for picture in pictures:
            with stages("denoise"):
                latents = pipeline(tuned.metadata["prompt"], image=picture[None], guidance_scale=1.0, output_type="latent",
                                   num_inference_steps=num_inference_steps, generator=torch.Generator().manual_seed(0),
                                   ).images  # fmt: skip
            with stages("decode"), torch.inference_mode():
                pixels = model.vae.decode(latents / model.vae.config["scaling_factor"], return_dict=False)[0].float()
                frame = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
                frames.append(frame[0].permute(1, 2, 0).cpu().numpy())
        return np.stack(frames), stages.seconds, gpu_peak_bytes()

    return render


def run(job: Job) -> dict[str, Any]:
    """Load, warm up with a render of few steps, render; the frames go to `job.output`.

    Returns: startup_s (loading and warm-up), seconds by stage, total_s, the process's peak memory after loading and after
        all, and the most that torch held of the GPU's at once.
    """
    load = {"exact": load_exact, METHODS["diffusers"]: load_diffusers}.get(job.method, load_baseline)
    start = time.perf_counter()
    render = load(job)
    loaded_peak = peak_rss_bytes()
    render(job.target, WARM_UP_STEPS[torch_device().type])
    ready = time.perf_counter()
    frames, seconds, gpu_bytes = render(job.target, job.num_inference_steps)
    total = time.perf_counter() - ready
    np.save(job.output, frames)
    return {
        "startup_s": ready - start,
        "seconds": seconds,
        "total_s": total,
        "loaded_peak_bytes": loaded_peak,
        "peak_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": gpu_bytes,
    }
