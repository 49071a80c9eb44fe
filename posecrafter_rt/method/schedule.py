"""How long to tune: the number of steps for a clip of n frames (Eq. 20).

Layer 1: imports nothing but the errors.
"""

from __future__ import annotations

from posecrafter_rt.errors import VideoError


def tuning_steps(num_frames: int) -> int:
    """Return the number of optimiser steps for one-shot tuning on `num_frames` frames.

    round(100 + (n - 8) * 1900 / 92), at least 1 (Eq. 20, rebuilt from its end points: 8 frames take 100 steps and
    100 frames 2000; 32 frames then take 596, which fits the 12 minutes that the paper reports).
    Args:
        num_frames: training frames, at least 1.
    Returns: steps, at least 1.
    Raises: VideoError if there is no frame.
    """
    if num_frames < 1:
        raise VideoError(f"there are {num_frames} frames to tune on", hint="give a video of at least one frame")
    return max(1, round(100 + (num_frames - 8) * 1900 / 92))
