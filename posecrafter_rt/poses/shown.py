"""Check that a range lies within a pose file, and that its frames show the person.

Layer 1: numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import PoseSequence


def shown_poses(
    poses: PoseSequence,
    window: slice,
    source: Path | str,
    *,
    instead: str = "leave them out, --range START:END",
    least: float = 0.0,
) -> PoseSequence:
    """Return the poses in a range of a sequence that was read with `allow_missing`: all of them must show the person.

    Args:
        source: what the poses are of, for messages; frames are numbered as in it.
        instead: how other frames are chosen, for the hint.
        least: the lowest confidence of a point that shows the person; 0: any above 0.
    Raises: PoseError if the range is empty or ends beyond the sequence, or if a pose in it does not show the person.
    """
    numbers = np.arange(len(poses))[window]
    if not len(numbers) or (window.stop or 0) > len(poses):
        raise PoseError(*not_within(f"{source} has {len(poses)} poses", window, len(poses)))
    confidences = poses.keypoints[window][..., 2]
    missing = numbers[((confidences <= 0) | (confidences < least)).all(axis=1)].tolist()
    if missing:
        counted = f"; keypoints count from confidence {least} on" if least else ""
        raise PoseError(f"{source} does not show the person in {len(missing)} of {len(numbers)} frames: {abridged(missing)}",
                        f"{instead}, or fill in short gaps: posecrafter-rt poses edit --fill 5{counted}")  # fmt: skip
    return poses[window]


def not_within(counted: str, window: slice, count: int) -> tuple[str, str]:
    """Return the message and the hint for a range that is not one of `count` frames. counted: that many, as text."""
    hint = f"frames are counted from 0; give START and END of 0 to {count}"
    return f"{counted}, and {range_text(window)} is not within them", hint


def range_text(window: slice) -> str:
    """Return a range as it is written on the command line."""
    sides = ["" if side is None else str(side) for side in (window.start, window.stop)]
    return ":".join(sides) + ("" if window.step is None else f":{window.step}")


def abridged(numbers: Sequence[int]) -> str:
    """Return the first ten numbers as text: `3, 4, 5`, with `, ...` if there are more."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
