"""The part of a pose file that is worked on has to show the person.

Layer 1: numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import PoseSequence


def shown_poses(poses: PoseSequence, window: slice, source: Path | str) -> PoseSequence:
    """Those poses of a sequence, read with `allow_missing`, that a range names: these have to show the person.

    Args: source: what the poses are of, for messages, in which frames go by their numbers in it.
    Raises: PoseError where there is none, or some do not.
    """
    numbers = np.arange(len(poses))[window]
    if not len(numbers):
        named = f"{window.start or 0}:{'' if window.stop is None else window.stop}"
        raise PoseError(f"{source} has {len(poses)} poses, and {named} holds none of them",
                        f"frames are counted from 0; give START and END of 0 to {len(poses)}")  # fmt: skip
    missing = numbers[(poses.keypoints[window][..., 2] <= 0).all(axis=1)].tolist()
    if missing:
        raise PoseError(f"{source} does not show the person in {len(missing)} of {len(numbers)} frames: {abridged(missing)}",
                        "leave them out, --range START:END, or fill in short gaps: posecrafter-rt poses edit --fill 5")  # fmt: skip
    return poses[window]


def abridged(numbers: Sequence[int]) -> str:
    """The first ten of some numbers: `3, 4, 5`."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
