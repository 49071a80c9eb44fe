"""The contenders that are not this runtime: the published algorithms, and diffusers' pipeline.

Bench: imported by contenders.py in a rival's process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)

from bench.contenders import METHODS, Job, Render
from bench.plain import Baseline, Networks, to_diffusers
from bench.runs import Stages
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines.base import TORCH_DTYPES
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.poses.draw import draw_poses
from posecrafter_rt.poses.keypoints import PoseSequence


def gpu_peak_bytes() -> int:
    """Return the most that torch has had allocated on the GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def load_model(tuned: Checkpoint, job: Job) -> PoseModel:
    """Load the tuned networks in the job's precision, on the GPU if there is one."""
    return tuned.load_model(dtype=TORCH_DTYPES[job.precision]).to(device=torch_device())


def compile_denoisers(networks: Networks, backend: str | Callable[..., Any] = "inductor") -> Networks:
    """Return the same networks, with those that run at every step under torch.compile."""
    compiled: dict[str, Any] = {name: torch.compile(getattr(networks, name), backend=backend)
                                for name in ("unet", "controlnet")}  # fmt: skip
    return replace(networks, **compiled)


def load_baseline(job: Job) -> Render:
    """Load ControlVideo's algorithm, or PoseCrafter as published."""
    tuned = Checkpoint.load(job.checkpoint)
    baseline = Baseline(load_model(tuned, job), tuned.metadata["prompt"])
    if job.method == METHODS["compile"]:
        baseline.networks = compile_denoisers(baseline.networks)
    algorithm = baseline.published if job.method == "published" else baseline.plain

    def render(target: PoseSequence, num_inference_steps: int) -> tuple[np.ndarray, dict[str, float], int]:
        rendered = algorithm(tuned.frames, tuned.poses, target, num_inference_steps)
        return rendered.frames, rendered.seconds, gpu_peak_bytes()

    return render


def load_diffusers(job: Job) -> Render:
    """Load diffusers' pipeline with the tuned image networks. It renders each frame alone, from the same noise."""
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


def load(job: Job) -> Render:
    """Load the rival for the job's method, ready to render."""
    return load_diffusers(job) if job.method == METHODS["diffusers"] else load_baseline(job)
