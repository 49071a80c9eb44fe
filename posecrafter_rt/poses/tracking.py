"""Choose one person among several, and follow them from frame to frame.

Layer 1: numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import BODY, CONFIDENCE_THRESHOLD, FACE, NUM_KEYPOINTS

# How far a person may move between two frames, relative to the longer side of their box; beyond it is somebody else.
_FARTHEST_STEP = 0.75
# Where somebody else was last seen is forgotten once anyone stands this close to it, relative to the same side.
_SAME_PLACE = 0.25
# A detector may find one person twice, the second time this close to the first; people side by side are farther apart.
_FOUND_TWICE = 0.05


def follow_person(
    frames: Sequence[np.ndarray], *, source: str, person: int | None = None, allow_missing: bool = False
) -> np.ndarray:
    """Pick one person in the first frame that has any, and follow them.

    In each following frame, the nearest person is the same one; nearness is the mean distance over the body and face
    points that both have. If any frame shows several people, somebody farther away than 0.75 of the person's own size
    (more after frames without them) is somebody else, and so is whoever stands where another was last seen while
    somebody is missing: the track ends rather than jumps. Somebody whom the detector has found twice is one person.
    Args:
        frames: per frame the people in it, (P, 134, 3) with P >= 0: x, y in pixels of one canvas, confidence.
        source: what the frames come from, for messages.
        person: index among the people of the first frame that has any; None takes the largest.
        allow_missing: a frame without the person is all zeros instead of an error.
    Returns: float32 (N, 134, 3).
    Raises: PoseError if nobody is in any frame, if there is no such person, or (unless allowed) if a frame does not
        show the person.
    """
    people = [frame[(frame[..., 2] > 0).any(axis=1)] if len(frame) else frame for frame in frames]
    counts = [len(frame) for frame in people]
    if not any(counts):
        raise PoseError(f"{source}: no person in any of {len(frames)} frames", hint="is the person in the picture?")
    first = next(index for index, count in enumerate(counts) if count)
    if first > 0 and not allow_missing:
        raise _missing(source, 0, counts[0])
    tracked = np.zeros((len(frames), NUM_KEYPOINTS, 3), np.float32)
    picked = _pick(people[first], person, source, first)
    tracked[first] = last = people[first][picked]
    others, seen = _without(people[first], _same(people[first], picked)), first
    farthest = np.inf if max(counts) == 1 else _FARTHEST_STEP
    for index in range(first + 1, len(frames)):
        free: Sequence[int] = range(counts[index])
        if index - seen > 1 or len(others) >= counts[index]:  # somebody is missing, so the nearest may be another
            free = _unclaimed(people[index], last, others)
        chosen = _nearest(people[index], free, last, farthest * (index - seen))
        if chosen is not None:
            tracked[index] = last = people[index][chosen]
            free, seen = _same(people[index], chosen), index
        elif not allow_missing:
            raise _missing(source, index, counts[index])
        others = _without(people[index], free) + [one for one in others if not _is_taken(one, people[index])]
    return tracked


def _pick(people: np.ndarray, person: int | None, source: str, frame: int) -> int:
    if person is None:
        return int(np.argmax([np.prod(_extent(one)) for one in people]))
    if not 0 <= person < len(people):
        raise PoseError(
            f"{source}: person {person} was asked for, but frame {frame} has {len(people)}",
            hint=f"persons are counted from 0; the last is {len(people) - 1}",
        )
    return person


def _same(people: np.ndarray, person: int) -> list[int]:
    """Return the person by every index under which the detector has found them."""
    closest = _FOUND_TWICE * max(_extent(people[person]))
    return [index for index, one in enumerate(people) if _distance(one, people[person]) <= closest]


def _without(people: np.ndarray, left_out: Sequence[int]) -> list[np.ndarray]:
    return [one for index, one in enumerate(people) if index not in left_out]


def _unclaimed(people: np.ndarray, last: np.ndarray, others: Sequence[np.ndarray]) -> Sequence[int]:
    """Return who is left once each of the others has taken the nearest one, unless that one is nearer to `last`."""
    free = list(range(len(people)))
    for other in others:
        claimed = _nearest(people, free, other)
        if claimed is not None and _distance(people[claimed], other) < _distance(people[claimed], last):
            free.remove(claimed)
    return free


def _is_taken(place: np.ndarray, people: np.ndarray) -> bool:
    return any(_distance(one, place) < _SAME_PLACE * max(_extent(place)) for one in people)


def _nearest(people: np.ndarray, free: Sequence[int], last: np.ndarray, farthest: float = _FARTHEST_STEP) -> int | None:
    """Return which one of the free people is nearest, at most `farthest` times their size away; None: nobody is."""
    distances = {index: _distance(people[index], last) for index in free}
    nearest = min(distances, key=distances.__getitem__, default=None)
    return nearest if nearest is not None and distances[nearest] <= farthest * max(_extent(last)) else None


def _usable(keypoints: np.ndarray) -> np.ndarray:
    usable = keypoints[:, 2] >= CONFIDENCE_THRESHOLD
    return usable if usable.any() else keypoints[:, 2] > 0


def _extent(keypoints: np.ndarray) -> np.ndarray:
    """Return width and height in pixels of the box around the usable points, at least 1 each."""
    return np.maximum(np.ptp(keypoints[_usable(keypoints), :2], axis=0), 1.0)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    usable, other_usable = _usable(one), _usable(other)
    shared = usable & other_usable
    shared[BODY.stop : FACE.start] = False
    shared[FACE.stop :] = False
    if shared.any():
        return float(np.linalg.norm(one[shared, :2] - other[shared, :2], axis=1).mean())
    return float(np.linalg.norm(one[usable, :2].mean(axis=0) - other[other_usable, :2].mean(axis=0)))


def _missing(source: str, frame: int, count: int) -> PoseError:
    others = f" ({count} other{'s' * (count != 1)} there)" if count else ""
    return PoseError(
        f"{source}: frame {frame} does not show the person{others}",
        hint="fill in short gaps: posecrafter-rt poses edit --fill 5; or read the file with read_openpose(…, "
        "allow_missing=True), and leave out the frames that are all zeros",
    )
