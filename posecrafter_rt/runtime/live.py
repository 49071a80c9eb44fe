"""How a stream treats the poses that it is given: nobody seen, the same pose again, a jump.

Layer 5: numpy and a clock; no networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import BODY, CONFIDENCE_THRESHOLD, NUM_KEYPOINTS, copied

MIN_SEEN = 3  # keypoints; fewer count as nobody


@dataclass(frozen=True)
class LiveOptions:
    """How a stream treats its poses. `still` and `jump` are fractions of the canvas's diagonal.

    hold_s: when nobody is seen, the last pose is held for this many seconds. Over the next ease_s it moves to the
        reference pose.
    still: a pose is a repeat if it shows the same keypoints as the last rendered pose and none has moved farther than
        this. Nothing is computed for a repeat, at most max_repeats times in a row. 0: every pose is rendered.
    jump: if the keypoints have moved farther than this on average since the last rendered pose, past frames are not
        attended to: they would smear into the new place.
    """

    hold_s: float = 0.7
    ease_s: float = 1.0
    still: float = 0.001
    max_repeats: int = 50
    jump: float = 0.1


class LivePose(NamedTuple):
    """The pose to render, float32 (134, 3).

    held: nobody was seen. is_repeat: nothing has moved since the last rendered pose. jumped: the person is elsewhere.
    """

    pose: np.ndarray
    held: bool
    is_repeat: bool
    jumped: bool


class PoseFollower:
    """Turns the poses of one stream, as they come, into the poses to render.

    Args: reference_pose: (134, 3) on `canvas` (height, width). clock: returns seconds and never goes back.
    """

    def __init__(
        self, reference_pose: np.ndarray, canvas: tuple[int, int], options: LiveOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.reference_pose = np.asarray(reference_pose, np.float32)
        self.options, self.clock = options, clock
        self.diagonal = float(np.hypot(*canvas))
        self.reset()

    def reset(self) -> None:
        """Forget all poses: the next one counts as the first."""
        self._rendered: np.ndarray | None = None  # the pose of the newest frame
        self._seen: np.ndarray | None = None  # the newest pose that showed somebody
        self._seen_at = self.clock()
        self._repeats = 0

    def next(self, pose: np.ndarray | None) -> LivePose:
        """Return what to render for a pose.

        Args: pose: float (134, 3) on the canvas; masked keypoints are not seen. None, or fewer than 3 keypoints seen:
            nobody is seen.
        Raises: PoseError for another shape, numbers that are not finite, and confidences outside 0 to 1.
        """
        pose = None if pose is None else _checked(pose)
        held = pose is None or int((pose[:, 2] >= CONFIDENCE_THRESHOLD).sum()) < MIN_SEEN
        if held:
            pose = self._eased()
        else:
            self._seen, self._seen_at = pose, self.clock()
        assert pose is not None
        before = self._rendered
        if before is not None and self._repeats < self.options.max_repeats and self._is_still(before, pose):
            self._repeats += 1
            return LivePose(before, held, True, False)
        self._repeats = 0
        self._rendered = pose
        jumped = before is not None and mean_distance(before, pose) > self.options.jump * self.diagonal
        return LivePose(pose, held, False, jumped)

    def _eased(self) -> np.ndarray:
        """Return the last pose that was seen, later a pose on the way from there to the reference pose."""
        if self._seen is None:
            return self.reference_pose
        share = (self.clock() - self._seen_at - self.options.hold_s) / max(self.options.ease_s, 1e-6)
        return ease(self._seen, self.reference_pose, share)

    def _is_still(self, before: np.ndarray, pose: np.ndarray) -> bool:
        seen, was_seen = (p[:, 2] >= CONFIDENCE_THRESHOLD for p in (pose, before))
        if self.options.still <= 0 or not np.array_equal(seen, was_seen):
            return False
        moved = np.linalg.norm(pose[seen, :2] - before[seen, :2], axis=1)
        return bool(moved.max(initial=0.0) <= self.options.still * self.diagonal)


def ease(start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
    """Return a pose between two others, with slow movement at both ends: `start` up to share 0, `end` from share 1 on.

    A keypoint that only one of them has does not move; it disappears or appears half-way.
    """
    share = min(max(share, 0.0), 1.0)
    weight = np.float32(share * share * (3 - 2 * share))
    has_start, has_end = (p[:, 2] >= CONFIDENCE_THRESHOLD for p in (start, end))
    pose = (start + weight * (end - start)).astype(np.float32)
    only_start, only_end = has_start & ~has_end, has_end & ~has_start
    pose[only_start] = start[only_start] if weight < 0.5 else 0
    pose[only_end] = end[only_end] if weight >= 0.5 else 0
    return pose


def mean_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean distance in pixels of the body keypoints that both poses show.

    If they share no body keypoint, all keypoints count; if they share none at all, the distance is infinite.
    """
    shared = (first[:, 2] >= CONFIDENCE_THRESHOLD) & (second[:, 2] >= CONFIDENCE_THRESHOLD)
    body = np.zeros(NUM_KEYPOINTS, bool)
    body[BODY] = shared[BODY]
    chosen = body if body.any() else shared
    if not chosen.any():
        return float("inf")
    return float(np.linalg.norm(first[chosen, :2] - second[chosen, :2], axis=1).mean())


def _checked(pose: np.ndarray) -> np.ndarray:
    pose = copied(pose)
    if pose.shape != (NUM_KEYPOINTS, 3):
        raise PoseError(f"a pose of shape {pose.shape}", f"give ({NUM_KEYPOINTS}, 3): x, y in pixels and confidence")
    if not np.isfinite(pose).all():
        raise PoseError("a pose holds NaN or infinity", "a missing keypoint has confidence 0")
    if not ((pose[:, 2] >= 0) & (pose[:, 2] <= 1)).all():
        raise PoseError("a confidence is not within 0 to 1", "clip it: a detector's scores may pass 1")
    return pose
