"""Eyes, brows, nostrils, mouth, ears and glasses, drawn over a shaded head from its 68 projected landmarks.

Layer 1 (embedded recipe): numpy and cv2 only. Functions draw in place into a uint8 RGB image; `scale` is pixels per cm.
"""

from __future__ import annotations

import cv2
import numpy as np

from posecrafter_rt.embedded.people_draw import Light, clip_box, fill, smooth, stroke, to_fixed
from posecrafter_rt.embedded.people_head import HeadPose, HeadShape, Projector


def draw_face(
    image: np.ndarray, marks: np.ndarray, shape: HeadShape, pose: HeadPose, project: Projector, light: Light
) -> None:
    """Draw all parts of the face; `marks` (68, 2) are pixels of `image`."""
    scale, facing = project.scale, project.rotation[2]
    sides = (
        np.clip((1.05 - abs(facing[0]) * (facing[0] > 0)) * 3, 0, 1),
        np.clip((1.05 - abs(facing[0]) * (facing[0] < 0)) * 3, 0, 1),
    )
    front = project.rotation @ np.array([0.0, 0.0, 1.0])
    tone = light.shade(front)
    for side, first in ((0, 36), (1, 42)):
        if sides[side] > 0:
            lean = np.array([-0.45 if side == 0 else 0.45, 0.0, 0.9])
            shade = light.shade(project.rotation @ lean)
            _eye(image, marks[first : first + 6], shape, pose, project, shade, outer_first=side == 0)
            _brow(image, marks[17 + 5 * side : 22 + 5 * side], shape, scale, shade, side)
    _nose(image, marks, shape, scale, tone)
    _mouth(image, marks[48:68], shape, pose, scale, tone)
    if shape.glasses != "none":
        _glasses(image, marks, shape, project, tone)


def _eye(
    image: np.ndarray,
    lids: np.ndarray,
    shape: HeadShape,
    pose: HeadPose,
    project: Projector,
    tone: np.ndarray,
    outer_first: bool,
) -> None:
    scale = project.scale
    width = np.linalg.norm(lids[3] - lids[0])
    height = 0.5 * (np.linalg.norm(lids[1] - lids[5]) + np.linalg.norm(lids[2] - lids[4]))
    skin = shape.skin * tone
    if height > 0.12 * scale:
        _eyeball(image, lids, shape, pose, project, tone)
    upper, lower = smooth(lids[[0, 1, 2, 3]], 4, closed=False), smooth(lids[[3, 4, 5, 0]], 4, closed=False)
    up = -project.rotation[:2, 1]
    lash = np.minimum(shape.hair * 0.5, 60.0)
    stroke(image, upper, lash, 0.24 * scale, 0.85)
    stroke(image, lower, skin * 0.5, 0.12 * scale, 0.5)
    stroke(image, upper + up * (0.42 + 0.1 * pose.brow_raise) * scale, skin * 0.62, 0.14 * scale, 0.55)
    stroke(image, lower - up * 0.55 * scale, skin * 0.75, 0.2 * scale, 0.3)
    tail = lids[0 if outer_first else 3]
    stroke(
        image,
        np.stack([tail, tail + scale * (0.25 * (tail - lids.mean(0)) / (width + 1e-6) + 0.1 * up)]),
        lash,
        0.16 * scale,
        0.6,
    )


def _eyeball(
    image: np.ndarray, lids: np.ndarray, shape: HeadShape, pose: HeadPose, project: Projector, tone: np.ndarray
) -> None:
    """Draw white, iris, pupil, glint and the lid's shadow, clipped to the opening between the lids."""
    scale, outline = project.scale, smooth(lids, 4)
    box = clip_box(outline, image.shape, 3)
    if box is None:
        return
    x0, y0, x1, y1 = box
    part = image[y0:y1, x0:x1]
    inside = part.copy()
    fill(inside, outline - [x0, y0], np.array([208.0, 200.0, 195.0]) * np.clip(tone, 0.2, 1.05))
    right, down, ahead = project.rotation[:2].T
    centre = lids.mean(0) + scale * (0.50 * pose.gaze_x * right + (0.25 * pose.gaze_y - 0.10) * down + 0.15 * ahead)
    centre = centre - [x0, y0]
    squeeze = np.clip(np.linalg.norm(lids[3] - lids[0]) / (2.9 * scale), 0.35, 1.0)
    angle, lit = np.degrees(np.arctan2(right[1], right[0])), np.clip(tone, 0.4, 1.0)
    for radius, colour in ((0.60, shape.iris * 0.55 * lit), (0.52, shape.iris * lit), (0.27, np.full(3, 11.0))):
        _disc(inside, centre, radius * scale * squeeze, radius * scale, angle, colour)
    glint = centre + scale * np.array([-0.18, -0.22])
    _disc(inside, glint, 0.15 * scale, 0.15 * scale, 0.0, np.full(3, 235.0))
    shadow = smooth(lids[:4], 4, closed=False) - [x0, y0] + [0, 0.18 * scale]
    stroke(inside, shadow, np.array([40.0, 30.0, 28.0]), 0.3 * scale, 0.35)
    mask = np.zeros(part.shape[:2], np.uint8)
    cv2.fillPoly(mask, [to_fixed(outline - [x0, y0])], 255, cv2.LINE_AA, 3)
    weight = (mask.astype(np.float32) / 255.0)[..., None]
    image[y0:y1, x0:x1] = (part * (1 - weight) + inside * weight).astype(np.uint8)


def _disc(image: np.ndarray, centre: np.ndarray, rx: float, ry: float, angle: float, colour: np.ndarray) -> None:
    axes = to_fixed(np.array([max(rx, 0.3), max(ry, 0.3)]))
    cv2.ellipse(
        image,
        tuple(int(c) for c in to_fixed(centre)),
        tuple(int(a) for a in axes),
        float(angle),
        0,
        360,
        tuple(float(c) for c in np.clip(colour, 0, 255)),
        -1,
        cv2.LINE_AA,
        3,
    )


def _brow(image: np.ndarray, line: np.ndarray, shape: HeadShape, scale: float, tone: np.ndarray, side: int) -> None:
    curve = smooth(line, 4, closed=False)
    tangent = np.gradient(curve, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / (np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6)
    taper = np.sin(np.linspace(0.25, 2.6, len(curve)))[:, None]
    taper = taper[::-1] if side == 0 else taper
    half = shape.brow_thickness * scale * taper * 0.62
    colour = np.minimum(shape.hair * 0.8, 150.0) * tone
    for grow, alpha in ((1.35, 0.35), (1.0, 0.6)):
        fill(image, np.concatenate([curve + normal * half * grow, (curve - normal * half * grow)[::-1]]), colour, alpha)


def _nose(image: np.ndarray, marks: np.ndarray, shape: HeadShape, scale: float, tone: np.ndarray) -> None:
    skin = shape.skin * tone
    for a, b in ((31, 32), (35, 34)):
        spot = 0.40 * marks[a] + 0.60 * marks[b]
        axis = marks[35] - marks[31]
        size = max(float(np.linalg.norm(axis) * 0.12), 0.18 * scale)
        box = smooth(np.stack([spot + [-size, 0], spot + [0, -0.2 * scale], spot + [size, 0], spot + [0, 0.2 * scale]]))
        fill(image, box, skin * np.array([0.32, 0.24, 0.22]), 0.75)
    for a, away in ((31, -1.0), (35, 1.0)):
        out = (marks[35] - marks[31]) * 0.10 * away
        wing = smooth(
            np.stack(
                [
                    marks[a] + out * 0.4 - (marks[33] - marks[30]) * 0.55,
                    marks[a] + out * 1.2,
                    marks[a] - out * 0.2 + (marks[33] - marks[30]) * 0.18,
                ]
            ),
            4,
            closed=False,
        )
        stroke(image, wing, skin * np.array([0.58, 0.50, 0.48]), 0.16 * scale, 0.5)
    stroke(image, smooth(marks[31:36], 3, closed=False), skin * np.array([0.6, 0.5, 0.48]), 0.2 * scale, 0.45)


def _mouth(
    image: np.ndarray, mouth: np.ndarray, shape: HeadShape, pose: HeadPose, scale: float, tone: np.ndarray
) -> None:
    lips = shape.lips * tone
    outer, inner = smooth(mouth[:12], 3), smooth(mouth[12:], 3)
    box = clip_box(outer, image.shape, 4)
    if box is None:
        return
    x0, y0, x1, y1 = box
    part = image[y0:y1, x0:x1]
    top = part.copy()
    fill(top, outer - [x0, y0], lips)
    upper = np.concatenate([smooth(mouth[:7], 3, closed=False), smooth(mouth[12:17], 3, closed=False)[::-1]])
    fill(top, upper - [x0, y0], lips * 0.82)
    low = 0.5 * (mouth[[19, 18, 17]] + mouth[[10, 9, 8]]) - [x0, y0]
    stroke(top, low, np.minimum(lips * 1.22 + 8, 255), 0.4 * scale, 0.5)
    mask = np.zeros(part.shape[:2], np.float32)
    cv2.fillPoly(mask, [to_fixed(outer - [x0, y0])], 1.0, cv2.LINE_8, 3)
    mask = cv2.GaussianBlur(mask, (0, 0), max(0.15 * scale, 0.5))[..., None] * 0.88
    image[y0:y1, x0:x1] = (part * (1 - mask) + top * mask).astype(np.uint8)
    gap = np.linalg.norm(mouth[14] - mouth[18])
    if gap > 0.25 * scale:
        _mouth_inside(image, mouth, inner, scale, tone)
    else:
        line = smooth(mouth[[0, 12, 13, 14, 15, 16, 6]], 3, closed=False)
        stroke(image, line, lips * 0.42, 0.22 * scale, 0.85)
    fold = 0.2 + 0.3 * max(pose.smile, 0.0)
    for corner, away in ((mouth[0], -1.0), (mouth[6], 1.0)):
        span = (mouth[6] - mouth[0]) * 0.06 * away
        rise = (mouth[3] - mouth[9]) * 0.25 / (1 + pose.mouth_open)
        stroke(
            image,
            np.stack([corner + span + rise, corner + span * 0.6, corner + span - rise]),
            shape.skin * tone * 0.6,
            0.2 * scale,
            fold,
        )


def _mouth_inside(image: np.ndarray, mouth: np.ndarray, inner: np.ndarray, scale: float, tone: np.ndarray) -> None:
    """Draw the dark cavity, teeth and tongue between the lips of an open mouth."""
    box = clip_box(inner, image.shape, 3)
    if box is None:
        return
    x0, y0, x1, y1 = box
    part = image[y0:y1, x0:x1]
    inside = part.copy()
    inside[:] = np.clip(np.array([62.0, 22.0, 24.0]) * tone, 0, 255)
    gap = np.linalg.norm(mouth[14] - mouth[18])
    down = (mouth[18] - mouth[14]) / gap
    thick = min(0.55 * scale, 0.38 * gap)
    ends = 0.4 * mouth[[12, 16]] + 0.6 * mouth[[13, 15]]
    edge = np.stack([ends[0], mouth[13], mouth[14], mouth[15], ends[1]]) - [x0, y0]
    teeth = np.concatenate([edge - down * 0.3 * scale, (edge + down * thick)[::-1]])
    fill(inside, teeth, np.array([182.0, 175.0, 164.0]) * np.clip(tone, 0.3, 1.0), 0.9)
    tongue = smooth(mouth[[19, 18, 17]], 3, closed=False) - [x0, y0] - down * 0.1 * scale
    stroke(inside, tongue, np.array([160.0, 80.0, 80.0]) * tone, 0.7 * scale, 0.55)
    mask = np.zeros(part.shape[:2], np.uint8)
    cv2.fillPoly(mask, [to_fixed(inner - [x0, y0])], 255, cv2.LINE_AA, 3)
    weight = (mask.astype(np.float32) / 255.0)[..., None]
    image[y0:y1, x0:x1] = (part * (1 - weight) + inside * weight).astype(np.uint8)


def draw_ear(image: np.ndarray, shape: HeadShape, project: Projector, side: float, light: Light) -> None:
    """Draw one ear; side -1 is the person's right. Draw the far ear before the head and the near one after it."""
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    up, out = np.cos(angle), np.sin(angle)
    half = 1.45 - 0.35 * np.clip(-up, 0, 1)
    ear_y = (1.1 - 2.9 * up) * shape.length
    for grow, tint in ((1.0, 0.90), (0.62, 0.68), (0.36, 0.88)):
        z = -1.0 - half * out * grow + 0.25 * up * grow
        x = side * (7.2 * shape.width + 0.55 - 0.5 * out * grow)
        y = 1.1 + (ear_y - 1.1) * grow - 0.25 * (grow < 0.9)
        pixels, _ = project(np.stack([x, y, z], 1).astype(np.float32))
        shade = light.shade(project.rotation @ np.array([side * 0.75, 0.0, 0.66]))
        fill(
            image, smooth(pixels), shape.skin * np.array([1.0, 0.90, 0.88]) * shade * tint, 1.0 if grow == 1.0 else 0.6
        )


def _glasses(image: np.ndarray, marks: np.ndarray, shape: HeadShape, project: Projector, tone: np.ndarray) -> None:
    scale = project.scale
    angle = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    shade = np.array([28.0, 26.0, 30.0]) if shape.glasses != "thin" else np.array([120.0, 110.0, 95.0])
    width = {"thin": 0.18, "thick": 0.38, "dark": 0.3}[shape.glasses] * scale
    rims = []
    for side in (-1.0, 1.0):
        x = side * 3.3 * shape.eye_gap + 2.55 * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.7
        y = 0.35 + 1.95 * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** 0.7
        z = 10.4 - 0.12 * np.abs(x) ** 1.6 * 0.35
        pixels, _ = project(np.stack([x, y * shape.length, z], 1).astype(np.float32))
        rim = smooth(pixels, 3)
        fill(
            image,
            rim,
            shade * 0.8 if shape.glasses == "dark" else np.array([215.0, 225.0, 235.0]),
            0.88 if shape.glasses == "dark" else 0.10,
        )
        stroke(image, np.concatenate([rim, rim[:1]]), shade * np.clip(tone, 0.4, 1.0), width, 0.9)
        rims.append(pixels)
        hinge, _ = project(np.array([[side * 6.0, -0.4, 8.6], [side * 7.6 * shape.width, -0.4, -0.5]], np.float32))
        if project.rotation[2, 0] * side > -0.25:
            stroke(image, hinge, shade * np.clip(tone, 0.4, 1.0), width, 0.85)
    stroke(image, np.stack([rims[0][0], rims[1][7]]), shade, width, 0.9)
