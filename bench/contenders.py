"""The contenders of throughput.py: each loads a tuned person in its own way and renders poses, timing every stage.

Bench: throughput.py calls `run` in a process of its own for each run. That process imports only what its contender
needs, so only the rivals import rivals.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.processes import STARTED
from bench.runs import forget_inversions
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines.device import torch_device
from posecrafter_rt.machine import peak_rss_bytes
from posecrafter_rt.poses.keypoints import PoseSequence

Render = Callable[[PoseSequence, int], tuple[np.ndarray, dict[str, float], int]]
"""(target, num_inference_steps) → frames (N, H, W, 3) uint8, seconds by stage, peak bytes on the GPU."""

METHODS = {
    "exact": "exact",
    "published": "published",
    "plain": "plain",
    "diffusers": "diffusers, frame by frame",
    "compile": "plain, torch.compile",
}
"""The name of each method on the command line, and its name in the tables."""
WARM_UP_STEPS = {"cpu": 2, "cuda": 3}
"""Steps of the warm-up render, by device type. A single one would do nothing and is refused. On a GPU the second step may
still be compiled for, and a recorded graph replays only from the third step on."""


@dataclass(frozen=True)
class Job:
    """One run.

    method: one of METHODS' values. engine: the engine that `exact` loads. precision: of the weights; for `exact` that
    of its engine.
    """

    method: str
    checkpoint: Path
    engine: Path | None
    precision: str
    target: PoseSequence
    num_inference_steps: int
    output: Path


def load_exact(job: Job) -> Render:
    """Load this runtime. Its inversion cache is emptied before each render."""
    assert job.engine is not None
    avatar = Avatar.load(job.engine)

    def render(target: PoseSequence, num_inference_steps: int) -> tuple[np.ndarray, dict[str, float], int]:
        forget_inversions(avatar)
        frames = avatar.render(target, num_inference_steps=num_inference_steps, inversion_substeps=1, strength=1.0)
        assert avatar.last_report is not None
        return frames, avatar.last_report.seconds, avatar.last_report.peak_gpu_bytes  # counted anew for each stage

    return render


def load(job: Job) -> Render:
    """Load a contender, ready to render."""
    if job.method == "exact":
        return load_exact(job)
    from bench import rivals  # imports diffusers, which `exact` may do without

    return rivals.load(job)


def run(job: Job) -> dict[str, Any]:
    """Load a contender, warm it up with a render of few steps, time one render, and save its frames to `job.output`.

    Returns: startup_s (from the process's start: imports, loading and warm-up), seconds by stage, total_s, the process's
        peak memory after loading and at the end, and the peak memory on the GPU: what torch allocated, and what
        recorded CUDA graphs hold.
    """
    render = load(job)
    loaded_peak = peak_rss_bytes()
    render(job.target, WARM_UP_STEPS[torch_device().type])
    ready = time.perf_counter()
    frames, seconds, gpu_bytes = render(job.target, job.num_inference_steps)
    total = time.perf_counter() - ready
    np.save(job.output, frames)
    return {
        "startup_s": ready - STARTED,
        "seconds": seconds,
        "total_s": total,
        "loaded_peak_bytes": loaded_peak,
        "peak_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": gpu_bytes,
    }
