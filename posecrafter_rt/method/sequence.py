"""Insertion: the reference pose goes before the target poses and becomes the key frame.

Layer 1: numpy and the keypoint layout.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence


def insert_reference(reference_pose: np.ndarray, target: PoseSequence) -> PoseSequence:
    """Put the reference pose first: (p_r, p'_1, ..., p'_N), key frame 0 (method step 3).

    Args:
        reference_pose: float (134, 3): x, y in pixels of the *target's* canvas, confidence 0..1. A pose from another
            canvas is scaled first (`PoseSequence.resized`).
        target: N poses.
    Returns: N + 1 poses on the target's canvas, at its fps; new arrays.
    Raises: PoseError if the pose is not one (134, 3) array of finite numbers.
    """
    pose = np.asarray(reference_pose, dtype=np.float32)
    if pose.shape != (NUM_KEYPOINTS, 3):
        raise PoseError(f"the reference pose has the shape {pose.shape}", hint=f"give one pose, ({NUM_KEYPOINTS}, 3)")
    return replace(target, keypoints=np.concatenate([pose[np.newaxis], target.keypoints]))
