"""Fitting another person's movement: what is given back, what has whose measure, and who is only partly seen.

Tests; no layer.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.fit import Similarity
from posecrafter_rt.poses.keypoints import FACE, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND, PoseSequence
from posecrafter_rt.poses.retarget import find_ratios, retarget
from posecrafter_rt.poses.skeleton import HEAD, JOINTS, PARENTS, bone_lengths, head_axes

CANVAS = (512, 512)
BONES = [joint for joint in JOINTS if PARENTS[joint] >= 0]
FACE_POINTS = [*HEAD, *range(FACE.start, FACE.stop)]
A_FEW = settings(deadline=None, max_examples=30)
UPPER_BODY = [0, 1, 2, 5, *HEAD, *range(FACE.start, FACE.stop)]


def rest_pose() -> np.ndarray:
    """Somebody who stands with arms held away, (134, 2)."""
    body = [(256, 100), (256, 160), (205, 160), (170, 230), (180, 300), (307, 160), (345, 230), (390, 280), (228, 310),
            (222, 390), (215, 470), (284, 310), (290, 390), (297, 470), (243, 88), (269, 88), (228, 94),
            (284, 94)]  # fmt: skip
    feet = [(315, 485), (322, 482), (293, 480), (197, 485), (190, 482), (219, 480)]
    rng = np.random.default_rng(7)
    face = np.stack([rng.uniform(226, 286, 68), rng.uniform(75, 100, 68)], axis=1)
    face[6:11] = [(240, 138), (248, 142), (256, 144), (264, 142), (272, 138)]
    hand = np.array([(0, 0), *((9 * b * (f - 2) / 2, 9 * b) for f in range(5) for b in (1, 2, 3, 4))])
    return np.concatenate([body, feet, face, hand + (390, 280), hand + (180, 300)])


def moving(seed: int, num_frames: int = 9, build: np.ndarray | None = None, fps: float = 25.0) -> PoseSequence:
    """Somebody whose every joint bends and whose bones come nearer and go, and who walks; all is seen.

    build: (134,) factors of the bones' lengths; else 1.
    """
    rng = np.random.default_rng(seed)
    rest, factors = rest_pose(), np.ones(NUM_KEYPOINTS) if build is None else build
    points = np.zeros((num_frames, NUM_KEYPOINTS, 2))
    points[:, 1] = rest[1] + np.cumsum(rng.uniform(-4, 6, (num_frames, 2)), axis=0)
    turn = rng.uniform(-0.5, 0.5, (num_frames, NUM_KEYPOINTS))
    nearness = rng.uniform(0.6, 1.0, (num_frames, NUM_KEYPOINTS))
    for group in (FACE_POINTS, range(LEFT_HAND.start, LEFT_HAND.stop), range(RIGHT_HAND.start, RIGHT_HAND.stop)):
        turn[:, group] = turn[:, [group[0]]]
    for part in (HEAD, range(FACE.start, FACE.stop)):
        nearness[:, part] = 1.0
    for joint in (*BONES, *HEAD, *range(FACE.start, NUM_KEYPOINTS)):
        bone = (rest[joint] - rest[PARENTS[joint]]) * factors[joint]
        cosine, sine = np.cos(turn[:, joint]), np.sin(turn[:, joint])
        turned = np.stack([cosine * bone[0] - sine * bone[1], sine * bone[0] + cosine * bone[1]], axis=1)
        points[:, joint] = points[:, PARENTS[joint]] + nearness[:, [joint]] * turned
    keypoints = np.concatenate([points, np.ones((num_frames, NUM_KEYPOINTS, 1))], axis=2)
    return PoseSequence(keypoints, CANVAS, fps)


def somebody_else(seed: int) -> PoseSequence:
    """Other proportions, another movement, another camera."""
    build = 1.7 * np.random.default_rng(seed).uniform(0.8, 1.25, NUM_KEYPOINTS)
    build[FACE_POINTS] = build[FACE.start]
    return moving(seed + 1, num_frames=14, build=build, fps=30.0)


def hidden(poses: PoseSequence, seed: int) -> PoseSequence:
    """The same with a fifth of the points missing, and a fifth hardly seen."""
    keypoints = poses.keypoints.copy()
    chance = np.random.default_rng(seed).random(keypoints.shape[:2])
    keypoints[..., 2] = np.select([chance < 0.2, chance < 0.4], [0, 0.2], 0.9)
    return PoseSequence(keypoints, poses.canvas, poses.fps)


def only(poses: PoseSequence, points: list[int]) -> PoseSequence:
    keypoints = np.zeros_like(poses.keypoints)
    keypoints[:, points] = poses.keypoints[:, points]
    return PoseSequence(keypoints, poses.canvas, poses.fps)


def moved(poses: PoseSequence, scale: float, shift: tuple[float, float]) -> PoseSequence:
    return PoseSequence(Similarity(scale, *shift).apply(poses.keypoints), (720, 1280), 30.0)


def face_size(poses: PoseSequence) -> np.ndarray:
    along = poses.keypoints[:, FACE, :2] @ head_axes(poses.keypoints).swapaxes(1, 2)
    return np.median(np.ptp(along, axis=1), axis=0)


@A_FEW
@given(st.integers(0, 999), st.booleans())
def test_ones_own_poses_come_back(seed: int, is_hidden: bool) -> None:
    me = hidden(moving(seed), seed) if is_hidden else moving(seed)
    back = retarget(me, me)
    assert np.abs(back.keypoints - me.keypoints).max() <= 1e-4


@A_FEW
@given(st.integers(0, 999), st.floats(0.2, 5), st.floats(-300, 300), st.floats(-300, 300), st.booleans())
def test_a_larger_picture_of_oneself_elsewhere_comes_back(
    seed: int, scale: float, shift_x: float, shift_y: float, is_hidden: bool
) -> None:
    me = hidden(moving(seed), seed) if is_hidden else moving(seed)
    back = retarget(moved(me, scale, (shift_x, shift_y)), me)
    assert back.canvas == me.canvas and back.fps == 30.0
    assert np.abs(back.keypoints - me.keypoints).max() <= 2e-3


@A_FEW
@given(st.integers(0, 999))
def test_lengths_are_the_tuned_persons_and_directions_the_others(seed: int) -> None:
    me, other = moving(seed), somebody_else(seed)
    fitted = retarget(other, me)
    ours, theirs = bone_lengths(fitted.keypoints), bone_lengths(me.keypoints)
    assert np.allclose(ours[BONES], theirs[BONES], rtol=1e-4)
    assert np.allclose(face_size(fitted), face_size(me), rtol=1e-4)
    assert np.allclose(np.median(fitted.keypoints[:, 1], axis=0), np.median(me.keypoints[:, 1], axis=0), atol=1e-3)
    before, after = (
        poses.keypoints[:, BONES, :2] - poses.keypoints[:, [PARENTS[joint] for joint in BONES], :2]
        for poses in (other, fitted)
    )
    cross = before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]
    lengths = np.linalg.norm(before, axis=2) * np.linalg.norm(after, axis=2)
    assert np.abs(cross / lengths).max() < 1e-3 and ((before * after).sum(axis=2) > 0).all()


def test_both_palms_together_have_the_tuned_persons_size() -> None:
    me, other = moving(3), somebody_else(3)
    palms = [hand.start + point for hand in (LEFT_HAND, RIGHT_HAND) for point in (1, 5, 9, 13, 17)]
    ours, theirs = (bone_lengths(poses.keypoints)[palms].sum() for poses in (retarget(other, me), me))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_what_is_not_seen_stays_so_and_confidences_stay() -> None:
    me, other = hidden(moving(1), 1), hidden(somebody_else(1), 2)
    keypoints = other.keypoints.copy()
    keypoints[4] = 0  # a frame without anybody
    other = PoseSequence(keypoints, other.canvas, other.fps)
    fitted = retarget(other, me)
    assert np.array_equal(fitted.keypoints[..., 2], other.keypoints[..., 2])
    assert not fitted.keypoints[other.keypoints[..., 2] == 0].any()
    assert (fitted.canvas, fitted.fps, len(fitted)) == (me.canvas, other.fps, len(other))


def test_a_walk_is_as_long_as_the_body_is_large() -> None:
    me = moving(5)
    other = moved(me, 2.0, (50, 60))
    keypoints = other.keypoints.copy()
    keypoints[..., 0] += np.arange(len(other))[:, np.newaxis] * 20
    path = retarget(PoseSequence(keypoints, other.canvas), me).keypoints[:, 1, 0] - me.keypoints[:, 1, 0]
    assert np.allclose(np.diff(path), 10, atol=1e-3)


def test_a_wrist_without_its_elbow_is_where_it_would_be() -> None:
    build = np.ones(NUM_KEYPOINTS)
    build[[3, 4]] = 1.4  # arms alone are longer, both bones alike, so that no elbow is needed to know it
    me, other = moving(1), moving(2, build=build)
    keypoints = other.keypoints.copy()
    keypoints[3, 3] = 0
    whole, lacking = retarget(other, me), retarget(PoseSequence(keypoints, CANVAS), me)
    ratio = find_ratios(PoseSequence(keypoints, CANVAS), me)
    arm = ratio.bones[:, [3, 4]].sum(axis=1)
    shoulder, wrist = keypoints[3, 2, :2], keypoints[3, 4, :2]
    expected = lacking.keypoints[3, 2, :2] + arm[0] / arm[1] * (wrist - shoulder)
    assert np.allclose(lacking.keypoints[3, 4, :2], expected, atol=1e-3)
    assert np.linalg.norm(lacking.keypoints[3, 4, :2] - whole.keypoints[3, 4, :2]) < 10
    hand = lacking.keypoints[3, RIGHT_HAND, :2] - lacking.keypoints[3, 4, :2]
    assert np.allclose(hand, ratio.hands * (keypoints[3, RIGHT_HAND, :2] - wrist), atol=1e-3)


def test_a_neck_that_is_lost_for_a_while_does_not_make_one_jump() -> None:
    me, other = moving(1), somebody_else(1)
    keypoints = other.keypoints.copy()
    keypoints[..., :2] = keypoints[:1, :, :2] + np.linspace(0, 60, len(other))[:, np.newaxis, np.newaxis]  # it glides
    keypoints[5:9, 1] = 0
    fitted = retarget(PoseSequence(keypoints, CANVAS), me).keypoints
    steps = np.diff(fitted[:, [2, 5, 0, 8, 60], :2], axis=0)
    assert np.ptp(steps, axis=0).max() < 1e-3


@pytest.mark.parametrize("is_me", [True, False])
def test_head_and_shoulders_are_enough(is_me: bool) -> None:
    me, other = moving(1), somebody_else(1)
    part = only(me if is_me else other, UPPER_BODY)
    fitted = retarget(other, part) if is_me else retarget(part, me)
    ours, theirs = bone_lengths(fitted.keypoints), bone_lengths(me.keypoints)
    assert np.allclose(ours[[0, 2, 5]], theirs[[0, 2, 5]], rtol=1e-4)
    assert np.allclose(face_size(fitted), face_size(me), rtol=1e-4)
    if is_me:  # of whose legs nothing is known: they have the body's ratio
        ratio = find_ratios(other, part).body
        assert ours[9] == pytest.approx(ratio * bone_lengths(other.keypoints)[9], rel=1e-4)


@pytest.mark.parametrize(
    "shared",
    [list(range(FACE.start, FACE.stop)), [0, 14, 15, 16, 17], [8, 9, 10, 11, 12, 13], [8, 11, 9, 0, 14]],
    ids=["the face", "nose, eyes and ears", "the legs", "a leg and half a head"],
)
def test_other_roots_than_the_neck(shared: list[int]) -> None:
    me = moving(1)
    back = retarget(moved(only(me, shared), 2.5, (-40, 70)), me)
    assert np.allclose(back.keypoints, only(me, shared).keypoints, atol=2e-3)


def test_poses_without_a_face_take_the_heads_size_from_eyes_and_ears() -> None:
    body = [*JOINTS, *HEAD]
    build = np.ones(NUM_KEYPOINTS)
    build[list(HEAD)] = 1.5
    me, other = moving(1), only(moving(2, build=build), body)
    ratios = find_ratios(other, me)
    assert ratios.face == (pytest.approx(1 / 1.5, rel=0.01), pytest.approx(1 / 1.5, rel=0.01))
    fitted = retarget(other, me)
    assert not fitted.keypoints[:, FACE].any()
    eye, nose = fitted.keypoints[:, 14, :2], fitted.keypoints[:, 0, :2]
    before = other.keypoints[:, 14, :2] - other.keypoints[:, 0, :2]
    assert np.allclose(eye - nose, ratios.face[0] * before, atol=1e-3)


def test_hands_of_one_alone_go_by_the_forearms() -> None:
    body = [*JOINTS, *HEAD]
    build = np.ones(NUM_KEYPOINTS)
    build[[4, 7]] = 1.25
    ratios = find_ratios(moving(2, num_frames=60, build=build), only(moving(2, num_frames=60), body))
    assert ratios.hands == pytest.approx(0.8, rel=1e-3) and ratios.body > 0.85


def test_a_bone_that_was_seen_end_on_does_not_grow_without_limit() -> None:
    me = moving(1)
    keypoints = moving(2).keypoints.copy()
    keypoints[:-1, 4, :2] = keypoints[:-1, 3, :2] + (2, 0)  # towards the camera, but for the last frame
    other = PoseSequence(keypoints, CANVAS)
    ratios, fitted = find_ratios(other, me), retarget(other, me)
    forearm = np.linalg.norm(fitted.keypoints[-1, 4, :2] - fitted.keypoints[-1, 3, :2])
    assert ratios.bones[0, 4] / ratios.bones[1, 4] > 10
    assert forearm == pytest.approx(
        2 * ratios.body * np.linalg.norm(keypoints[-1, 4, :2] - keypoints[-1, 3, :2]), rel=1e-3
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (list(range(92, 134)), list(range(NUM_KEYPOINTS)), "no bone and no face in common"),
        ([8, 9, 10, 11, 12, 13], UPPER_BODY, "no bone and no face in common"),
        ([3, 4], list(range(NUM_KEYPOINTS)), "nothing in common to place them by"),
        ([], UPPER_BODY, "no bone and no face in common"),
    ],
)
def test_people_with_nothing_in_common_are_refused(theirs: list[int], ours: list[int], message: str) -> None:
    with pytest.raises(PoseError, match=message) as caught:
        retarget(only(somebody_else(1), theirs), only(moving(1), ours))
    assert caught.value.hint
