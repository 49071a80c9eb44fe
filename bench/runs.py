"""What the long benchmarks share: a stage clock, synthetic poses, and how close two clips are.

Bench: imported by everything that renders. It imports no more than a render does, because that one's memory is
measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence


def wait_for_gpu() -> None:
    """Wait until the GPU has finished its work; return at once if none is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Stages:
    """Wall-clock seconds by stage, in the order of first use. It waits for a GPU before it reads the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wait_for_gpu()
        start = time.perf_counter()
        yield
        wait_for_gpu()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def forget_inversions(avatar: Avatar) -> None:
    """Empty an engine's inversion cache, so that the next render inverts its reference anew."""
    for file in avatar.folder.inversions.glob("*"):
        file.unlink()


def moving_person(num_frames: int, size: tuple[int, int], phase: float = 0.0) -> PoseSequence:
    """Return poses of a body that sways while its parts grow and shrink: smooth, deterministic, every keypoint seen.

    Args: size: (height, width) in pixels. phase: where in the movement it begins, in seconds; there are 25 frames a
    second.
    """
    rng = np.random.default_rng(0)
    height, width = size
    centres = np.concatenate([
        np.tile([0.5, 0.55], (24, 1)), np.tile([0.5, 0.25], (68, 1)), np.tile([0.3, 0.6], (21, 1)),
        np.tile([0.7, 0.6], (21, 1))])  # fmt: skip
    spread = np.concatenate([np.full(24, 0.25), np.full(68, 0.08), np.full(42, 0.05)])
    rest = centres + rng.uniform(-1, 1, (NUM_KEYPOINTS, 2)) * spread[:, None]
    time_s = phase + np.arange(num_frames)[:, None] / 25
    sway = np.stack([0.03 * np.sin(2 * time_s), 0.01 * np.cos(3 * time_s)], -1)
    wave = 1 + 0.1 * np.sin(4 * time_s)[..., None]
    points = centres + (rest - centres) * wave + sway
    keypoints = np.concatenate([points * (width, height), np.ones((num_frames, NUM_KEYPOINTS, 1))], -1)
    return PoseSequence(keypoints.astype(np.float32), size, 25.0)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 clips in dB; infinity if they are equal."""
    error = float(np.mean((first.astype(np.float64) - second) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def psnr_unless_equal(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return `psnr`, or None if the clips are equal, because JSON has no infinity."""
    quality = psnr(first, second)
    return quality if np.isfinite(quality) else None
