"""Fit another person's movement to the proportions of the person who was tuned.

Layer 1: numpy; pure functions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.fit import shown_median
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, FACE, FEET, LEFT_HAND, RIGHT_HAND, PoseSequence
from posecrafter_rt.poses.layouts import NECK
from posecrafter_rt.poses.skeleton import (
    HEAD,
    JOINTS,
    LEFT_HIP,
    LEFT_WRIST,
    NOSE,
    PARENTS,
    RIGHT_HIP,
    RIGHT_WRIST,
    bone_lengths,
    fill_between,
    head_axes,
    split,
)

# The parts that a whole pose may be placed by, the steadiest first.
_ROOTS = {"neck": [NECK], "hips": [RIGHT_HIP, LEFT_HIP], "nose": [NOSE], "face": list(range(FACE.start, FACE.stop))}
_USUALLY = 0.5  # the first root that is seen in this share of the frames is taken
_SHORTEST_PX = 1.0
# Once their sizes are equal, two adults' bones differ by less. A larger difference means that one was seen end on.
_MOST_UNLIKE = 2.0
# The palm's bones of both hands: unlike a finger's, a fist does not shorten them.
_PALM = [hand.start + point for hand in (LEFT_HAND, RIGHT_HAND) for point in (1, 5, 9, 13, 17)]


class Ratios(NamedTuple):
    """How much larger the tuned person is than another, in pixels of both pictures.

    body: the ratio of all bones and the face together. bones: float64 (2, 134): the length of the bone from each
        keypoint to its parent, the tuned person's and the other's; 0 where either does not show it.
    face: the ratios across and down the face. hands: the ratio of both hands.
    """

    body: float
    bones: np.ndarray
    face: tuple[float, float]
    hands: float


class _Link(NamedTuple):
    """How a joint hangs on the nearest ancestor that is seen, in each of N frames."""

    source: np.ndarray  # (N, 2): where the ancestor is
    target: np.ndarray  # (N, 2): where it goes
    ratio: np.ndarray  # (N,): of the lengths of the bones between

    def place(self, points: np.ndarray) -> np.ndarray:
        """Return where places (N, 2) of the joint go."""
        return self.target + self.ratio[:, np.newaxis] * (points - self.source)


def retarget(poses: PoseSequence, person: PoseSequence) -> PoseSequence:
    """Give a movement the proportions and the place of another person.

    From the root outwards each bone keeps its direction in `poses`, and its length is multiplied by the ratio of the
    two median lengths, so a foreshortened bone stays so. The root's path is multiplied by the ratio of the bodies and
    moved so that its median is that of `person`. The face with eyes and ears is scaled about the nose, across and down
    by the ratios of its own median width and height; each hand is scaled about its wrist by the ratio of the palms.
    A ratio of more than twice, or less than half, that of the body means that one of the two was seen end on; it is
    clipped to that limit. What either never shows gets the body's ratio; a face first the head's, hands the forearms'.
    If a joint is missing, the next one hangs on the one before it. A missing root is placed by another root that is
    seen, at its usual distance, or else between its neighbours in time. All is in the plane: nobody is turned.
    Args:
        poses: N poses, the movement; any canvas.
        person: M poses of the tuned person, M at least 1: the more they move, the better their medians.
    Returns: N poses on the canvas of `person`, with the frame rate and confidences of `poses`; missing points stay so.
    Raises: PoseError if the two have no bone and no face in common, or nothing to place them by.
    """
    ratios = find_ratios(poses, person)
    points, seen = split(poses.keypoints)
    moved = points.copy()
    links = _hang(points, seen, _paths_of_root(poses, person, ratios.body), ratios)
    for joint, link in links.items():
        moved[:, joint] = link.place(points[:, joint])
    axes = head_axes(poses.keypoints)
    stretch = np.swapaxes(axes, 1, 2) @ (np.array(ratios.face)[:, np.newaxis] * axes)
    grow = np.tile(ratios.hands * np.eye(2), (len(poses), 1, 1))
    for joint, group, linear in (
        (NOSE, [*HEAD, *range(FACE.start, FACE.stop)], stretch),
        (LEFT_WRIST, range(LEFT_HAND.start, LEFT_HAND.stop), grow),
        (RIGHT_WRIST, range(RIGHT_HAND.start, RIGHT_HAND.stop), grow),
    ):
        moved[:, group] = _move_group(poses.keypoints, joint, list(group), links[joint], linear)
    keypoints = np.concatenate([moved, poses.keypoints[..., 2:]], axis=2)
    return PoseSequence(keypoints, person.canvas, poses.fps)


def find_ratios(poses: PoseSequence, person: PoseSequence) -> Ratios:
    """Return how much larger `person` is than the person in `poses`, part by part; see `retarget`.

    Raises: PoseError if they have no bone and no face in common.
    """
    measured = np.stack([np.concatenate([bone_lengths(shown.keypoints), _face_size(shown.keypoints)])
                         for shown in (person, poses)])  # fmt: skip
    lengths = np.where((measured >= _SHORTEST_PX).all(axis=0), measured, 0.0)  # NaN compares false
    bones, face = lengths[:, : len(PARENTS)], lengths[:, len(PARENTS) :]
    whole = bones[:, : FEET.stop].sum(axis=1) + face.sum(axis=1)
    if whole[1] == 0:
        raise PoseError(
            f"the {len(poses)} poses and the {len(person)} of the person show no bone and no face in common",
            hint="`poses preview` shows what each has; both need a part of the body, or the whole face",
        )
    body = float(whole[0] / whole[1])
    head = _ratio(bones[:, HEAD].sum(axis=1), body)
    forearms = _ratio(bones[:, [LEFT_WRIST, RIGHT_WRIST]].sum(axis=1), body)
    width, height = (float(_ratio(face[:, axis], body, unknown=float(head))) for axis in (0, 1))
    hands = float(_ratio(bones[:, _PALM].sum(axis=1), body, unknown=float(forearms)))
    return Ratios(body, bones, (width, height), hands)


def _ratio(lengths: np.ndarray, body: float, unknown: float | None = None) -> np.ndarray:
    """Return our lengths over theirs, from (2, ...), clipped to what bodies differ by.

    0 over 0 gives `unknown`, or `body` if that is None.
    """
    ours, theirs = lengths
    ratio = np.full(np.shape(theirs), body if unknown is None else unknown)
    np.divide(ours, theirs, out=ratio, where=theirs > 0)
    return np.clip(ratio, body / _MOST_UNLIKE, body * _MOST_UNLIKE)


def _face_size(keypoints: np.ndarray) -> np.ndarray:
    """Return the face's median width and height along the head's axes, float64 (2,); NaN if no frame shows it whole."""
    points, seen = split(keypoints)
    along = points[:, FACE] @ np.swapaxes(head_axes(keypoints), 1, 2)  # (N, 68, 2)
    is_whole = np.asarray(seen[:, FACE].all(axis=1))
    return shown_median(np.ptp(along, axis=1)[:, np.newaxis], is_whole[:, np.newaxis])[0]


def _paths_of_root(poses: PoseSequence, person: PoseSequence, body: float) -> tuple[np.ndarray, np.ndarray]:
    """Return where the root of each pose is, and where it goes, float64 (N, 2) each."""
    places, seen = _roots(poses.keypoints)
    other_places, other_seen = _roots(person.keypoints)
    shares = np.minimum(seen.mean(axis=0), other_seen.mean(axis=0))
    if not shares.any():
        raise PoseError(
            f"the {len(poses)} poses and the {len(person)} of the person have nothing in common to place them by",
            hint=f"both need one of: {', '.join(_ROOTS)}",
        )
    root = int(np.argmax(shares >= _USUALLY)) if shares.max() >= _USUALLY else int(np.argmax(shares))
    source = shown_median(places, seen)[root]
    target = shown_median(other_places, other_seen)[root]
    path = _path(places, seen, root)
    return path, target + body * (path - source)


def _roots(keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each possible root is, float64 (N, 4, 2), and whether it is seen, bool (N, 4)."""
    points, seen = split(keypoints)
    parts = _ROOTS.values()
    places = np.stack([points[:, part].mean(axis=1) for part in parts], axis=1)
    return places, np.stack([seen[:, part].all(axis=1) for part in parts], axis=1)


def _path(places: np.ndarray, seen: np.ndarray, root: int) -> np.ndarray:
    """Return where a root is in every frame, (N, 2): as seen, else by another root, else between its neighbours."""
    path, is_known = places[:, root].copy(), seen[:, root].copy()
    usual = shown_median(places[:, [root]] - places, seen[:, [root]] & seen)  # NaN if never seen together
    for other in np.flatnonzero(~np.isnan(usual[:, 0])):
        stands_in = seen[:, other] & ~is_known
        path[stands_in] = places[stands_in, other] + usual[other]
        is_known |= stands_in
    return fill_between(path, is_known)


def _hang(
    points: np.ndarray, seen: np.ndarray, root: tuple[np.ndarray, np.ndarray], ratios: Ratios
) -> dict[int, _Link]:
    """Return how each joint hangs on its ancestors; lengths of bones are summed over joints that are not seen."""
    # Per joint: where the nearest seen joint is (itself or an ancestor), where that goes, lengths (2, N) in between.
    upwards = {-1: (*root, np.zeros((2, len(points))))}
    links = {}
    for joint in JOINTS:
        source, target, between = upwards[PARENTS[joint]]
        lengths = between + ratios.bones[:, joint, np.newaxis]
        links[joint] = _Link(source, target, _ratio(lengths, ratios.body))
        is_seen, place = seen[:, joint], points[:, joint]
        upwards[joint] = (
            np.where(is_seen[:, np.newaxis], place, source),
            np.where(is_seen[:, np.newaxis], links[joint].place(place), target),
            np.where(is_seen, 0.0, lengths),
        )
    return links


def _move_group(keypoints: np.ndarray, joint: int, group: list[int], link: _Link, linear: np.ndarray) -> np.ndarray:
    """Move points with a joint and map them linearly about it, or about their own middle if it is not seen.

    Args: keypoints: (N, 134, 3). link: the joint's. linear: (N, 2, 2).
    Returns: float64 (N, points of the group, 2).
    """
    points = keypoints[:, group, :2].astype(np.float64)
    is_there = keypoints[:, group, 2:] > 0
    middle = (points * is_there).sum(axis=1) / np.maximum(is_there.sum(axis=1), 1)
    is_seen = keypoints[:, joint, 2:] >= CONFIDENCE_THRESHOLD
    pivot = np.where(is_seen, keypoints[:, joint, :2].astype(np.float64), middle)
    return link.place(pivot)[:, np.newaxis] + (points - pivot[:, np.newaxis]) @ np.swapaxes(linear, 1, 2)
