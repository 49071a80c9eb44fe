"""Scripted edits of a pose sequence: blink, turn the head, wave.

Layer 1: numpy; pure functions. Each edits a range of frames and leaves all others unchanged, bit for bit.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import DEFAULT_FPS, FACE, LEFT_HAND, RIGHT_HAND, PoseSequence
from posecrafter_rt.poses.shown import not_within, range_text
from posecrafter_rt.poses.skeleton import (
    CHIN,
    HEAD,
    LEFT_EAR,
    LEFT_ELBOW,
    LEFT_LIDS,
    LEFT_WRIST,
    NOSE,
    NOSE_TIP,
    RIGHT_EAR,
    RIGHT_ELBOW,
    RIGHT_LIDS,
    RIGHT_WRIST,
    head_axes,
    split,
)

Side = Literal["left", "right"]

MAX_TURN_DEGREES = 60.0  # beyond it half of the face would be hidden, which moving points cannot show
_EASED_SHARE = 1 / 3  # of a range is for easing in, and as much for easing out
_LOWER_LID_SHARE = 0.15  # of the gap is closed by the lower lid
_WAVES_PER_S = 1.5
_WAVE_RADIANS = np.radians(25)
_SHORTEST_PX = 1e-6
# A hanging forearm is raised on the outer side, even if it hangs a little inwards.
_INWARD_RADIANS = np.radians(120)
# Limits of a head's yaw before and after an edit: near 90 degrees a small error becomes a large angle.
_FARTHEST_YAW = (np.radians(60), np.radians(75))
_EAR_HIDDEN = np.radians(20)  # the yaw from which detectors no longer see the far ear

_UPPER, _LOWER = [1, 2], [5, 4]  # those of an eye's six points that meet when it closes
_ARMS = {
    "left": (LEFT_ELBOW, [LEFT_WRIST, *range(LEFT_HAND.start, LEFT_HAND.stop)], 1.0),
    "right": (RIGHT_ELBOW, [RIGHT_WRIST, *range(RIGHT_HAND.start, RIGHT_HAND.stop)], -1.0),
}

# Depth of the face's points in front of the axis that the head turns about, in half widths of the jaw, taken from the
# head that `embedded/people_head.py` draws without expression. Left and right are symmetric.
_JAW = (0.31, 0.44, 0.65, 0.84, 0.99, 1.12, 1.22, 1.26)
_CHIN = 1.28
_BROW = (1.14, 1.29, 1.40, 1.49, 1.54)
_NOSE_RIDGE = (1.58, 1.66, 1.76, 1.91)
_NOSTRILS = (1.68, 1.73, 1.74, 1.73, 1.68)
_RIGHT_EYE = (1.26, 1.31, 1.38, 1.44, 1.36, 1.30)
_LEFT_EYE = (1.44, 1.38, 1.31, 1.26, 1.30, 1.36)
_LIPS = (1.57, 1.62, 1.63, 1.64, 1.63, 1.62, 1.57, 1.61, 1.60, 1.60, 1.60, 1.61)
_INNER_LIPS = (1.60, 1.67, 1.68, 1.67, 1.60, 1.67, 1.68, 1.67)
_FACE_DEPTHS = (*_JAW, _CHIN, *_JAW[::-1], *_BROW, *_BROW[::-1], *_NOSE_RIDGE, *_NOSTRILS,
                *_RIGHT_EYE, *_LEFT_EYE, *_LIPS, *_INNER_LIPS)  # fmt: skip
# The outer corners of the eyes, and their distance from the middle of the face in the same unit.
_CORNERS = [RIGHT_LIDS.start, LEFT_LIDS.start + 3]
_CORNER_OFFSET = 0.63
_EAR_DEPTH = 0.16
_TURNED = [NOSE, *HEAD, *range(FACE.start, FACE.stop)]
_DEPTHS = np.array([_NOSE_RIDGE[-1], np.mean(_RIGHT_EYE), np.mean(_LEFT_EYE), _EAR_DEPTH, _EAR_DEPTH, *_FACE_DEPTHS])


def blink(poses: PoseSequence, frames: slice) -> PoseSequence:
    """Close both eyes and open them again.

    In each eye the points of the upper and the lower lid move towards each other until they meet; the upper ones move
    85 % of the way. Closing takes the first third of the range, opening the last. An eye that is not seen is left as
    it is.
    Args:
        poses: N poses.
        frames: START:END, without END; an open side means the start or end of `poses`. At 25 frames per second about 6
            frames suit a blink.
    Returns: N poses; frames outside the range are the same, bit for bit.
    Raises: PoseError if there are no such frames, or if none of them shows an eye with all its lids.
    """
    keypoints, chosen = _edited(poses, frames)
    closed = _eased(len(chosen))[:, np.newaxis, np.newaxis]
    has_eye = False
    for lids in (RIGHT_LIDS, LEFT_LIDS):
        points, seen = split(chosen[:, lids])
        is_whole = seen.all(axis=1)
        has_eye |= bool(is_whole.any())
        gap = points[:, _LOWER] - points[:, _UPPER]
        points[:, _UPPER] += closed * (1 - _LOWER_LID_SHARE) * gap
        points[:, _LOWER] -= closed * _LOWER_LID_SHARE * gap
        chosen[is_whole, lids, :2] = points[is_whole]
    _require(has_eye, chosen, frames, "eye with all its lids")
    return PoseSequence(keypoints, poses.canvas, poses.fps)


def turn_head(poses: PoseSequence, frames: slice, degrees: float) -> PoseSequence:
    """Turn the head in depth about the neck, and back: face, nose, eyes and ears.

    x' = x + u (cos(a + b) - cos a) + z (sin(a + b) - sin a)   across the head
    z is a point's depth in a mean face, scaled to this one. a is how far the head is turned already, judged by where
    the tip of the nose lies between the outer corners of the eyes. u = (x - z sin a) / cos a is where the point would
    be across the head if it were not turned. b grows to `degrees` over the first third of the range and falls to 0 over
    the last. If |a + b| is above 20 degrees and above |a|, the far ear is hidden: it becomes a missing point. Frames
    that do not show both eyes, nose and chin are left as they are.
    Args:
        poses: N poses.
        frames: START:END, without END; an open side means the start or end of `poses`.
        degrees: -60 to 60, positive towards the picture's right, which is the person's own left.
    Returns: N poses; frames outside the range are the same, bit for bit.
    Raises: PoseError if there are no such frames, if none of them shows a face, or if degrees are beyond 60.
    """
    if not abs(degrees) <= MAX_TURN_DEGREES:  # written so that NaN fails, too
        raise PoseError(f"a turn of {degrees:g} degrees", hint=f"give -{MAX_TURN_DEGREES:g} to {MAX_TURN_DEGREES:g}")
    keypoints, chosen = _edited(poses, frames)
    _, seen = split(chosen)
    needed = [NOSE_TIP, *range(CHIN.start, CHIN.stop), *range(RIGHT_LIDS.start, LEFT_LIDS.stop)]
    has_face = np.asarray(seen[:, needed].all(axis=1))
    _require(bool(has_face.any()), chosen, frames, "face with both eyes, nose and chin")
    turn = np.radians(degrees) * _eased(len(chosen))
    turned, hides = _turn_heads(chosen, turn)
    shows = has_face[:, np.newaxis] & (chosen[:, _TURNED, 2] > 0)
    chosen[:, _TURNED, :2] = np.where(shows[..., np.newaxis], turned, chosen[:, _TURNED, :2])
    for ear, is_hidden in zip((RIGHT_EAR, LEFT_EAR), hides, strict=True):
        chosen[is_hidden & has_face, ear] = 0
    return PoseSequence(keypoints, poses.canvas, poses.fps)


def wave(poses: PoseSequence, frames: slice, side: Side) -> PoseSequence:
    """Raise a forearm about its elbow, swing it to and fro, and lower it; wrist and hand move along.

    Over the first third of the range the forearm turns upright in the picture plane; over the last it turns back.
    Meanwhile it swings by 25 degrees to either side, 1.5 times per second; an unknown rate counts as 25 frames per
    second. Frames that do not show elbow and wrist are left as they are.
    Args:
        poses: N poses.
        frames: START:END, without END; an open side means the start or end of `poses`.
        side: "left" or "right", the person's own.
    Returns: N poses; frames outside the range are the same, bit for bit.
    Raises: PoseError if there are no such frames or side, or if none of the frames shows that elbow and wrist.
    """
    if side not in get_args(Side):
        raise PoseError(f"there is no side {side!r} to wave with", hint="give left or right, the person's own")
    elbow, moving, outwards = _ARMS[side]
    keypoints, chosen = _edited(poses, frames)
    points, seen = split(chosen)
    has_arm = seen[:, elbow] & seen[:, moving[0]]
    _require(bool(has_arm.any()), chosen, frames, f"{side} elbow with the wrist")
    forearm = points[has_arm, moving[0]] - points[has_arm, elbow]
    # The angle from upright, outwards. It is continuous at the opposite direction, where an arm hangs.
    bent = outwards * np.arctan2(forearm[:, 0], -forearm[:, 1])
    bent = np.unwrap(np.mod(bent + _INWARD_RADIANS, 2 * np.pi) - _INWARD_RADIANS)
    weight, beat = _eased(len(chosen))[has_arm], _beats(len(chosen), poses.fps)[has_arm]
    angle = weight * (_WAVE_RADIANS * beat - outwards * bent)
    centre = points[has_arm, elbow][:, np.newaxis]
    arm = (points[has_arm][:, moving] - centre) @ _turns(angle) + centre
    shows = chosen[has_arm][:, moving, 2:] > 0
    chosen[np.ix_(has_arm, moving, [0, 1])] = np.where(shows, arm, 0.0)
    return PoseSequence(keypoints, poses.canvas, poses.fps)


def _edited(poses: PoseSequence, frames: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of all keypoints, and a view of the chosen frames in it. Raises: PoseError for a bad range."""
    start, stop = frames.start or 0, len(poses) if frames.stop is None else frames.stop
    if frames.step not in (None, 1) or not 0 <= start < stop <= len(poses):
        raise PoseError(*not_within(f"there are {len(poses)} poses", frames, len(poses)))
    keypoints = poses.keypoints.copy()
    return keypoints, keypoints[start:stop]


def _require(is_there: bool, chosen: np.ndarray, frames: slice, part: str) -> None:
    """Raise PoseError, which names the part and the frames, unless `is_there`."""
    if not is_there:
        missing = f"no {part}" if chosen[..., 2].any() else "no person"
        raise PoseError(
            f"frames {range_text(frames)} show {missing}", "`posecrafter-rt poses preview` shows what there is"
        )


def _eased(num_frames: int) -> np.ndarray:
    """Return weights that rise smoothly to 1, stay there for a third of the frames, and fall: float64 (num_frames,).

    At least one is 1.
    """
    passed = np.arange(1, num_frames + 1) / (num_frames + 1)
    way = np.minimum(np.minimum(passed, 1 - passed) / _EASED_SHARE, 1.0)
    return way * way * (3 - 2 * way)


def _beats(num_frames: int, fps: float | None) -> np.ndarray:
    """Return a sine of whole periods, about 1.5 per second: float64 (num_frames,)."""
    periods = max(1, round(num_frames / (fps or DEFAULT_FPS) * _WAVES_PER_S))
    return np.sin(2 * np.pi * periods * np.arange(1, num_frames + 1) / (num_frames + 1))


def _turns(angles: np.ndarray) -> np.ndarray:
    """Return matrices (N, 2, 2) that rotate row vectors in pixels clockwise, as seen, by (N,) radians."""
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cosine, sine], axis=1), np.stack([-sine, cosine], axis=1)], axis=1)


def _turn_heads(keypoints: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn heads as `turn_head` describes.

    Args: keypoints: (N, 134, 3). turn: (N,) radians.
    Returns: the new places of the heads' points, float64 (N, 73, 2); whether the right and the left ear become hidden,
        bool (2, N).
    """
    across = head_axes(keypoints)[:, 0]  # (N, 2)
    points, _ = split(keypoints)
    x = np.einsum("npd,nd->np", points, across)
    corners, tip = x[:, _CORNERS], x[:, NOSE_TIP]
    # `level` and `aside` are the yaw's cosine and sine times `radius`, half of the jaw's width.
    level = np.maximum(np.abs(corners[:, 1] - corners[:, 0]) / (2 * _CORNER_OFFSET), _SHORTEST_PX)
    aside = (tip - corners.mean(axis=1)) / (_NOSE_RIDGE[-1] - _RIGHT_EYE[0])
    radius = np.hypot(level, aside)
    yaw = np.clip(np.arctan2(aside, level), -_FARTHEST_YAW[0], _FARTHEST_YAW[0])
    after = np.clip(yaw + turn, -_FARTHEST_YAW[1], _FARTHEST_YAW[1])
    axis = corners.mean(axis=1) - _RIGHT_EYE[0] * radius * np.sin(yaw)
    depth = _DEPTHS * radius[:, np.newaxis]  # (N, 73)
    # An ear that was seen stays visible if the head turns no further.
    is_hidden = (np.abs(after) > _EAR_HIDDEN) & (np.abs(after) > np.abs(yaw))
    hides = np.stack([is_hidden & (after < 0), is_hidden & (after > 0)])
    yaw, after = yaw[:, np.newaxis], after[:, np.newaxis]
    unturned = (x[:, _TURNED] - axis[:, np.newaxis] - depth * np.sin(yaw)) / np.cos(yaw)
    shift = unturned * (np.cos(after) - np.cos(yaw)) + depth * (np.sin(after) - np.sin(yaw))
    return points[:, _TURNED] + shift[..., np.newaxis] * across[:, np.newaxis], hides
