"""The procedural people: shapes, determinism, and that keypoints lie on what they name.

Tests of posecrafter_rt/embedded/people.py and its parts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from posecrafter_rt.embedded import people
from posecrafter_rt.embedded.people_body import ArmPose, BodyPose
from posecrafter_rt.embedded.people_head import HeadPose
from posecrafter_rt.poses.keypoints import BODY, FACE, LEFT_HAND, RIGHT_HAND


def _plain_person(seed: int) -> people.Person:
    """A person without anything that covers the face, seen by a clean camera."""
    person = people.Person.sample(np.random.default_rng(seed))
    person.head = dataclasses.replace(person.head, glasses="none", beard=0.0, skin=np.array([215.0, 168.0, 142.0]))
    person.blur, person.jpeg_quality = 0.0, None
    person.grain = np.zeros_like(person.grain)
    person.mesh = person.coarse_mesh = type(person.mesh)(person.head)
    return person


def _pose(**head: float) -> people.Pose:
    return people.Pose(
        scale=3.4,
        neck=np.array([80.0, 120.0]),
        head_offset=np.zeros(2),
        head=HeadPose(**head),
        body=BodyPose(),
        arms_in_front=True,
        pan=np.zeros(2),
        window_pan=0.0,
        exposure=1.0,
        grain_seed=1,
    )


def _brightness(image: np.ndarray, point: np.ndarray, radius: int = 1) -> float:
    x, y = np.round(point[:2]).astype(int)
    return float(image[y - radius : y + radius + 1, x - radius : x + radius + 1].mean())


@pytest.mark.parametrize("size", [(128, 160), (96, 96), (65, 131), (256, 320)])
def test_clip_shapes_and_ranges(size):
    frames, keypoints, text = people.sample_clip(np.random.default_rng(3), 4, size)
    assert frames.shape == (4, *size, 3) and frames.dtype == np.uint8
    assert keypoints.shape == (4, 134, 3) and keypoints.dtype == np.float32
    assert np.isfinite(keypoints).all() and text.startswith("a ")
    seen = keypoints[..., 2] > 0
    assert set(np.unique(keypoints[..., 2])) <= {0.0, 1.0}
    assert (keypoints[~seen] == 0).all()
    assert (keypoints[seen][:, :2] >= 0).all() and (keypoints[seen][:, :2] <= [size[1] - 1, size[0] - 1]).all()


def test_same_generator_same_clip():
    first, second = (people.sample_clip(np.random.default_rng(11), 3) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1]) and first[2] == second[2]
    assert not np.array_equal(first[0], people.sample_clip(np.random.default_rng(12), 3)[0])


@pytest.mark.parametrize("framing", ["portrait", "half", "full"])
def test_framings_show_their_parts(framing):
    rng = np.random.default_rng(5)
    shown = []
    for _ in range(6):
        person = people.Person.sample(rng)
        shown += [people.render(person, pose)[1][:, 2] for pose in people.sample_poses(rng, person, 2, framing=framing)]
    rate = np.mean(shown, 0)
    assert rate[FACE].mean() > 0.8
    assert (rate[9] > 0.5) == (framing == "full")  # right knee
    if framing != "portrait":
        assert rate[LEFT_HAND].mean() + rate[RIGHT_HAND].mean() > 0.5


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("yaw", [-0.35, 0.0, 0.35])
def test_iris_is_darker_than_the_cheek(seed, yaw):
    person = _plain_person(seed)
    image, points = people.render(person, _pose(yaw=yaw))
    face = points[FACE]
    for eye, cheek in ((36, 48), (42, 54)):
        centre = face[eye : eye + 6].mean(0)
        below = 0.5 * (centre + face[cheek])
        assert _brightness(image, centre) < _brightness(image, below)


@pytest.mark.parametrize("seed", range(6))
def test_open_mouth_is_dark_or_red_inside(seed):
    person = _plain_person(seed)
    closed, _ = people.render(person, _pose(mouth_open=0.0))
    opened, points = people.render(person, _pose(mouth_open=1.0))
    inside = 0.4 * points[FACE][62] + 0.6 * points[FACE][66]
    assert points[FACE][66, 1] - points[FACE][62, 1] > 4
    assert _brightness(opened, inside) < _brightness(closed, inside)


def test_blinking_closes_the_lids():
    person = _plain_person(2)
    gap = [
        people.render(person, _pose(blink=blink))[1][FACE][[41, 40], 1].mean()
        - people.render(person, _pose(blink=blink))[1][FACE][[37, 38], 1].mean()
        for blink in (0.0, 1.0)
    ]
    assert gap[1] < 0.3 * gap[0]


def test_left_is_the_persons_left_and_body_agrees_with_face():
    _, points = people.render(_plain_person(4), _pose(yaw=0.1))
    body, face = points[BODY], points[FACE]
    assert body[5, 0] > body[2, 0] and body[15, 0] > body[14, 0] and body[17, 0] > body[16, 0]
    assert np.allclose(body[0], face[30], atol=1e-4)
    assert np.allclose(body[14, :2], face[36:42, :2].mean(0), atol=1e-3)
    assert face[16, 0] > face[0, 0] and face[8, 1] > face[57, 1] > face[51, 1] > face[33, 1]


def test_yaw_turns_the_nose_and_hides_the_far_ear():
    person = _plain_person(6)
    for sign, far, near in ((1, 17, 16), (-1, 16, 17)):
        _, points = people.render(person, _pose(yaw=0.7 * sign))
        middle = 0.5 * (points[FACE][0, 0] + points[FACE][16, 0])
        assert (points[BODY][0, 0] - middle) * sign > 3
        assert points[BODY][far, 2] == 0 and points[BODY][near, 2] == 1


@pytest.mark.parametrize("seed", range(4))
def test_identity_survives_a_change_of_pose(seed):
    person = _plain_person(seed)
    colours = []
    for yaw, roll in ((0.0, 0.0), (0.15, 0.1)):
        image, points = people.render(person, _pose(yaw=yaw, roll=roll))
        x, y = np.round(points[FACE][[27, 28]].mean(0)[:2]).astype(int)
        colours.append(image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0))
    assert np.abs(colours[0] - colours[1]).max() < 25


def test_hand_points_lie_on_skin():
    person = _plain_person(1)
    person.body = dataclasses.replace(person.body, sleeve="long")
    pose = _pose()
    arm = ArmPose(upper=0.5, fore=3.3, curl=0.2)
    pose = dataclasses.replace(pose, scale=1.5, neck=np.array([80.0, 60.0]), body=BodyPose(left_arm=arm, right_arm=arm))
    image, points = people.render(person, pose)
    bare = dataclasses.replace(person, background=np.zeros_like(person.background), window=None)
    dark, _ = people.render(bare, pose)
    for hand in (points[LEFT_HAND], points[RIGHT_HAND]):
        assert (hand[:, 2] == 1).all()
        assert all(_brightness(dark, p, 0) > 25 for p in hand)
    assert image.shape == dark.shape


def test_captions_start_plainly_half_of_the_time():
    rng = np.random.default_rng(0)
    texts = [people.caption(people.Person.sample(rng)) for _ in range(60)]
    assert 15 < sum(t == "a person" for t in texts) < 45
    assert any("shirt" in t for t in texts)
