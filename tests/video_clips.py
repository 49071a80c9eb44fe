"""Clips for tests of reading and writing videos, and how far two clips are apart."""

from __future__ import annotations

import numpy as np


def smooth(count: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """A drifting colour pattern, uint8 (count, H, W, 3)."""
    y, x = np.mgrid[: size[0], : size[1]]
    frames = [
        np.stack([128 + 110 * np.sin(x / 17 + y / 23 + c + frame / 5) for c in range(3)], axis=-1)
        for frame in range(count)
    ]
    return np.stack(frames).round().astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean()))
