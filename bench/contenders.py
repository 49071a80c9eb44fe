"""What throughput.py compares: each loads a tuned person its own way and renders poses with a clock on every stage.

Bench: `run` is called in a process of its own for each run, which imports what its contender needs: rivals.py by those alone.
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


def load(job: Job) -> Render:
    """A contender, ready to render."""
    if job.method == "exact":
        return load_exact(job)
    from bench import rivals  # diffusers and what that imports, which `exact` may do without

    return rivals.load(job)


def run(job: Job) -> dict[str, Any]:
    """Load, warm up with a render of few steps, render; the frames go to `job.output`.

    Returns: startup_s (from the process's start: imports, loading and warm-up), seconds by stage, total_s, the process's
        peak memory after loading and after all, and the most that torch held of the GPU's at once.
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
