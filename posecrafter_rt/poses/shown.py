"""Check that the selected part of a pose file shows the person.

Layer 1: numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import PoseSequence


def shown_poses(poses: PoseSequence, window: slice, source: Path | str) -> PoseSequence:
    """Return the poses in a range of a sequence that was read with `allow_missing`: all of them must show the person.

    Args: source: what the poses are of, for messages; frames are numbered as in it.
    Raises: PoseError if the range is empty, or if a pose in it does not show the person.
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
    """Return the first ten numbers as text: `3, 4, 5`, with `, ...` if there are more."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
