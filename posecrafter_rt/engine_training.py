"""Write and read the training frames and poses that an engine carries; a render takes one frame as its reference.

Layer 6: beside `avatar`, which then need not import what `building` imports.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.framing import have_one_shape, resize_to, size_text, transform_keypoints
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.tensor_file import save_tensors

REFERENCE_FILE = "reference.safetensors"


def choose_size(wanted: tuple[int, int] | None, tuned: tuple[int, int]) -> tuple[int, int]:
    """Return an engine's (height, width): the one that is wanted, or that of tuning.

    Raises: ShapeError for another shape than that of tuning. Training frames were cut to that shape, but target poses
        are fitted from their own canvas: cut again, the reference would be larger than the targets of the same video.
    """
    size = tuned if wanted is None else wanted
    if not have_one_shape(size, tuned):
        raise ShapeError(f"an engine of {size_text(size)} has another shape than the frames of tuning, {size_text(tuned)}",
                         f"tune with --size {size_text(size)}, or build for a size of tuning's shape")  # fmt: skip
    return size


def write_training(folder: Path, frames: np.ndarray, poses: PoseSequence, size: tuple[int, int]) -> None:
    """Fit frames (n, H, W, 3) uint8 and their poses to the engine's (height, width), and write them to its folder."""
    tensors = {"frames": resize_to(frames, size), "keypoints": transform_keypoints(poses, size).keypoints}
    save_tensors({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / REFERENCE_FILE)


def read_training(folder: Path) -> tuple[np.ndarray, PoseSequence]:
    """Return the training frames (n, H, W, 3) uint8 and their poses, at the engine's size."""
    tensors = load_file(folder / REFERENCE_FILE)
    frames = tensors["frames"].numpy()
    return frames, PoseSequence(tensors["keypoints"].numpy(), frames.shape[1:3])
