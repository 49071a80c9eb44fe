"""Bodies of the procedural people: torso, neck, limbs and hands, with exact joints.

Layer 1 (embedded recipe): numpy and cv2 only. Lengths in centimetres; drawing is in place into uint8 RGB images.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from posecrafter_rt.embedded.people_draw import Frame, Light, fill, limb, pillow, smooth, stroke


@dataclass
class BodyShape:
    """Build and clothes of one identity."""

    shoulder: float = 17.0  # half distance of the shoulder joints
    girth: float = 1.0
    sleeve: str = "long"  # long, short
    collar: str = "crew"  # crew, vee, shirt, tie
    shirt: np.ndarray = field(default_factory=lambda: np.array([90.0, 100.0, 130.0]))
    trousers: np.ndarray = field(default_factory=lambda: np.array([50.0, 55.0, 80.0]))
    shoes: np.ndarray = field(default_factory=lambda: np.array([30.0, 30.0, 30.0]))
    jacket: np.ndarray | None = None  # worn over the shirt


@dataclass
class ArmPose:
    """Angles in the picture plane (radians; 0 hangs down, positive lifts outwards) and foreshortening 0..1."""

    upper: float = 0.12
    fore: float = 0.1
    length: float = 1.0
    hand: float = 0.0
    curl: float = 0.3
    spread: float = 0.5


@dataclass
class BodyPose:
    """Shoulder line and limbs."""

    lean: float = 0.0
    yaw: float = 0.0
    shrug: tuple[float, float] = (0.0, 0.0)
    right_arm: ArmPose = field(default_factory=ArmPose)
    left_arm: ArmPose = field(default_factory=ArmPose)
    stance: tuple[float, float] = (0.05, 0.05)
    knees: tuple[float, float] = (0.0, 0.0)


# finger roots on the palm (across, along) and segment lengths, in cm, for a hand that points along +y
_ROOTS = np.array([[-2.6, 2.6], [-2.4, 8.6], [-0.6, 9.0], [1.1, 8.6], [2.6, 7.7]])
_SEGMENTS = np.array([[3.4, 3.0, 2.5], [3.9, 2.4, 2.0], [4.3, 2.8, 2.1], [4.0, 2.6, 2.0], [3.1, 1.9, 1.8]])
_FAN = np.array([-0.75, -0.16, 0.0, 0.13, 0.28])


def hand_points(wrist: np.ndarray, angle: float, scale: float, mirror: float, arm: ArmPose) -> np.ndarray:
    """Return 21 points in pixels. The hand points along (sin angle, cos angle); `mirror` +1 puts the thumb at -x."""
    points = np.zeros((21, 2))
    for finger in range(5):
        place = _ROOTS[finger].copy()
        bend = 0.0 if finger else 0.3
        heading = _FAN[finger] * (0.4 + arm.spread)
        curl = arm.curl * (0.5 if finger == 0 else 1.0)
        points[1 + 4 * finger] = place
        for joint in range(3):
            bend += curl * 0.75
            place = place + _SEGMENTS[finger, joint] * np.cos(bend * 0.95) * np.array(
                [np.sin(heading), np.cos(heading)]
            )
            points[2 + 4 * finger + joint] = place
    points[:, 0] *= mirror
    cosine, sine = np.cos(angle), np.sin(angle)
    turned = np.stack([points[:, 0] * cosine + points[:, 1] * sine, -points[:, 0] * sine + points[:, 1] * cosine], 1)
    return wrist + scale * turned


def draw_hand(image: np.ndarray, points: np.ndarray, skin: np.ndarray, scale: float, light: Light) -> None:
    """Draw palm and fingers through 21 points."""
    tone = light.shade(np.array([0.0, 0.0, 1.0]))
    colour = skin * tone
    wrist = points[0]
    axis = points[9] - wrist
    side = (
        np.array([-axis[1], axis[0]])
        / (np.linalg.norm(axis) + 1e-6)
        * np.sign(np.cross(np.append(axis, 0), np.append(points[17] - points[5], 0))[2] + 1e-9)
    )
    palm = np.stack(
        [
            wrist - side * 2.4 * scale,
            points[1],
            points[5],
            points[9],
            points[13],
            points[17],
            wrist + side * 2.4 * scale,
        ]
    )
    middle = palm.mean(0)
    fill(image, smooth(middle + (palm - middle) * 1.12), colour * 0.93)
    fill(image, smooth(middle + (palm - middle) * 0.7), colour * 1.02, 0.6)
    for finger in (4, 3, 2, 1, 0):
        chain = points[1 + 4 * finger : 5 + 4 * finger]
        width = (1.0 if finger else 1.15) * scale
        if scale > 1.2:
            stroke(image, chain + [0.16 * width, 0.16 * width], colour * 0.62, 2.2 * width, 0.7)
        stroke(image, chain, colour * 0.95, 1.75 * width)
        stroke(image, chain - [0.25 * width, 0.25 * width], np.minimum(colour * 1.1, 255), 0.8 * width, 0.5)


def _arm_joints(shoulder: np.ndarray, side: float, arm: ArmPose, scale: float) -> np.ndarray:
    upper = np.array([side * np.sin(arm.upper), np.cos(arm.upper)])
    fore = np.array([side * np.sin(arm.fore), np.cos(arm.fore)])
    elbow = shoulder + upper * 29.0 * scale * arm.length
    return np.stack([shoulder, elbow, elbow + fore * 25.0 * scale * (0.5 + 0.5 * arm.length)])


def skeleton(shape: BodyShape, pose: BodyPose, neck: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Return all joints in pixels, given the neck point (COCO neck: between the shoulders)."""
    across = np.array([np.cos(pose.lean), np.sin(pose.lean)])
    down = np.array([-np.sin(pose.lean), np.cos(pose.lean)])
    half = shape.shoulder * np.cos(pose.yaw) * scale
    right = neck - across * half - down * pose.shrug[0] * scale
    left = neck + across * half - down * pose.shrug[1] * scale
    hip_half = 9.5 * shape.girth * (0.4 + 0.6 * np.cos(pose.yaw)) * scale
    waist = neck + 50.0 * scale * down
    joints = {
        "right_arm": _arm_joints(right, -1.0, pose.right_arm, scale),
        "left_arm": _arm_joints(left, 1.0, pose.left_arm, scale),
    }
    for name, side, index in (("right_leg", -1.0, 0), ("left_leg", 1.0, 1)):
        hip = waist + side * across * hip_half
        angle = pose.stance[index]
        knee = hip + 42.0 * scale * np.array([side * np.sin(angle), np.cos(angle)])
        ankle = knee + 40.0 * scale * np.array(
            [side * np.sin(angle - pose.knees[index]), np.cos(angle - pose.knees[index])]
        )
        toe = ankle + scale * np.array([[side * 4.0, 9.0], [side * 7.5, 7.0], [-side * 0.5, 4.0]])
        joints[name] = np.concatenate([np.stack([hip, knee, ankle]), toe])
    for name, mirror in (("right_hand", 1.0), ("left_hand", -1.0)):
        arm = pose.right_arm if mirror > 0 else pose.left_arm
        chain = joints[name.replace("hand", "arm")]
        direction = chain[2] - chain[1]
        angle = np.arctan2(direction[0], direction[1]) + arm.hand * mirror
        # a hanging hand shows its thumb towards the body, a raised one the palm
        raised = direction[1] < 0
        joints[name] = hand_points(chain[2], angle, scale, mirror * (-1.0 if not raised else 1.0), arm)
    joints["frame"] = np.stack([neck, across, down, right, left])
    return joints


def draw_legs(image: np.ndarray, joints: dict[str, np.ndarray], shape: BodyShape, scale: float, light: Light) -> None:
    for name in ("right_leg", "left_leg"):
        leg = joints[name]
        if leg[0, 1] > image.shape[0] + 20 * scale:
            continue
        fill(
            image,
            smooth(
                np.stack(
                    [
                        leg[5] + [0, -1 * scale],
                        leg[5] + [0, 2 * scale],
                        leg[3] + [0, 2 * scale],
                        leg[4] + [0, 2 * scale],
                        leg[4] + [0, -1 * scale],
                        leg[2] + [3 * scale, -3 * scale],
                        leg[2] - [3 * scale, 3 * scale],
                    ]
                )
            ),
            shape.shoes,
        )
        limb(image, leg[:3], np.array([8.6, 6.2, 4.6]) * scale * shape.girth, shape.trousers, light)


def draw_torso(
    image: np.ndarray, joints: dict[str, np.ndarray], shape: BodyShape, cloth: np.ndarray, scale: float, light: Light
) -> None:
    """Draw the shirt: cloth texture on a smooth outline, shaded as if inflated."""
    neck, across, down, right, left = joints["frame"]
    hips = 0.5 * (joints["right_leg"][0] + joints["left_leg"][0])
    hip_half = 0.5 * (joints["left_leg"][0] - joints["right_leg"][0]) + across * 6.5 * scale * shape.girth
    base = neck - down * 6.5 * scale
    span, thick = np.linalg.norm(left - right) / 2, 4.6 * scale * shape.girth
    slope = across * span
    outline = np.stack(
        [
            base + across * 5.6 * scale,
            neck + slope * 0.62 - down * 4.4 * scale,
            left + across * 2.4 * scale - down * 3.2 * scale,
            left + across * thick * 1.15 + down * 4.5 * scale,
            left - across * 0.2 * thick + down * 14 * scale,
            hips + hip_half * 0.93 - down * 16 * scale,
            hips + hip_half + down * 4 * scale,
            hips - hip_half + down * 4 * scale,
            hips - hip_half * 0.93 - down * 16 * scale,
            right + across * 0.2 * thick + down * 14 * scale,
            right - across * thick * 1.15 + down * 4.5 * scale,
            right - across * 2.4 * scale - down * 3.2 * scale,
            neck - slope * 0.62 - down * 4.4 * scale,
            base - across * 5.6 * scale,
        ]
    )
    pillow(
        image, smooth(outline, 5), cloth, light, Frame(neck, down, 9.0 * scale, 20.0, cloth.shape[0] / (58.0 * scale))
    )


def draw_neck(
    image: np.ndarray,
    joints: dict[str, np.ndarray],
    top: np.ndarray,
    skin: np.ndarray,
    shape: BodyShape,
    scale: float,
    light: Light,
) -> None:
    """Draw neck and collar; `top` is the pixel under the jaw where the neck meets the head."""
    neck, across, down, _, _ = joints["frame"]
    base = neck - down * 3.5 * scale
    half = 5.35 * scale * (0.9 + 0.1 * shape.girth)
    collar_depth = {"crew": 2.4, "vee": 9.0, "shirt": 7.0, "tie": 2.0}[shape.collar]
    tone = light.shade(np.array([0.0, 0.35, 0.94]))
    rim = np.stack(
        [
            base - across * 6.6 * scale - down * 3.4 * scale,
            base - across * 4.0 * scale,
            base + down * collar_depth * scale,
            base + across * 4.0 * scale,
            base + across * 6.6 * scale - down * 3.4 * scale,
            base - down * 4.5 * scale,
        ]
    )
    fill(image, smooth(rim, 4), skin * tone * 0.96)
    limb(image, np.stack([base + down * 0.5 * scale, top]), np.array([half * 1.06, half * 0.98]), skin * 0.93, light)
    under = np.stack(
        [
            top - across * half * 0.98,
            top + across * half * 0.98,
            top + across * half * 0.7 + down * 3.6 * scale,
            top + down * 5.0 * scale,
            top - across * half * 0.7 + down * 3.6 * scale,
        ]
    )
    fill(image, smooth(under, 3), skin * tone * 0.52, 0.5)
    edge = smooth(rim[:5], 4, closed=False)
    folded = shape.collar in ("shirt", "tie")
    colour = shape.shirt * (1.12 if folded else 0.72) * tone
    stroke(image, edge, colour, (2.6 if folded else 1.5) * scale, 0.9)


def draw_upper_arm(
    image: np.ndarray,
    chain: np.ndarray,
    shape: BodyShape,
    paints: tuple[np.ndarray, np.ndarray],
    scale: float,
    light: Light,
) -> None:
    """Draw an arm from shoulder to elbow; `paints` are the skin colour (3,) and the sleeve's cloth (T, T, 3)."""
    skin, cloth = paints
    girth = shape.girth * scale
    bone = np.stack([0.94 * chain[0] + 0.06 * chain[1], chain[1]])
    if shape.sleeve == "short":
        limb(image, bone, np.array([4.7, 4.0]) * girth, skin, light)
        limb(image, np.stack([bone[0], 0.4 * bone[0] + 0.6 * bone[1]]), np.array([5.2, 5.4]) * girth, cloth, light)
    else:
        limb(image, bone, np.array([5.2, 4.5]) * girth, cloth, light)


def draw_forearm(
    image: np.ndarray,
    chain: np.ndarray,
    hand: np.ndarray,
    shape: BodyShape,
    paints: tuple[np.ndarray, np.ndarray],
    scale: float,
    light: Light,
) -> None:
    """Draw an arm from elbow to finger tips; `paints` are the skin colour (3,) and the sleeve's cloth (T, T, 3)."""
    skin, cloth = paints
    girth = shape.girth * scale
    if chain[1:, 1].min() < image.shape[0] + 20 * scale:
        draw_hand(image, hand, skin, scale, light)
    if shape.sleeve == "short":
        limb(image, chain[1:], np.array([4.0, 2.7]) * girth, skin, light)
    else:
        limb(image, chain[1:], np.array([4.5, 3.3]) * girth, cloth, light)
