"""Procedural pictures of people with exact keypoints, for pretraining a small pose-conditioned network.

Layer 1 (embedded recipe): numpy and cv2 only. `sample_clip` is the entry. The generator determines everything.
"""

from __future__ import annotations

import cv2
import numpy as np

from posecrafter_rt.embedded.people_body import draw_forearm, draw_legs, draw_neck, draw_torso, draw_upper_arm, skeleton
from posecrafter_rt.embedded.people_draw import clip_box, grid_quads, paint_quads
from posecrafter_rt.embedded.people_face import draw_ear, draw_face
from posecrafter_rt.embedded.people_head import Projector, landmarks
from posecrafter_rt.embedded.people_sample import MARGIN, Person, Pose, caption, sample_poses
from posecrafter_rt.poses.keypoints import BODY, FACE, FEET, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND

_OVERSAMPLE = 2

__all__ = ["Person", "Pose", "caption", "render", "sample_clip", "sample_poses"]


def sample_clip(
    rng: np.random.Generator, n: int, size: tuple[int, int] = (128, 160)
) -> tuple[np.ndarray, np.ndarray, str]:
    """Draw one person in front of one background in n loosely related poses.

    Returns: frames (n, H, W, 3) uint8 RGB; keypoints (n, 134, 3) float32, pixels of the frames; a caption.
    """
    person = Person.sample(rng)
    pictures = [render(person, pose, size) for pose in sample_poses(rng, person, n)]
    return np.stack([p[0] for p in pictures]), np.stack([p[1] for p in pictures]), caption(person)


def render(person: Person, pose: Pose, size: tuple[int, int] = (128, 160)) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture at twice its size and average it down, so that edges are soft.

    Returns: image (H, W, 3) uint8 RGB; keypoints (134, 3) float32 in pixels of that image (pixel centres at integers),
    confidence 1, or 0 with x = y = 0 where hidden or outside.
    """
    height, width = size
    unit = _OVERSAMPLE * height / 128.0
    canvas = _background(person, pose, size)
    scale = pose.scale * unit
    centre = np.array([80.0, 0.0])
    neck = (pose.neck - centre) * unit + [_OVERSAMPLE * width / 2.0, 0.0]
    across = np.array([np.cos(pose.body.lean), np.sin(pose.body.lean)])
    up = np.array([across[1], -across[0]])
    pivot = neck + (up * 15.0 + pose.head_offset[0] * across + pose.head_offset[1] * up) * scale
    project = Projector(pose.head, (0.0, 0.0), scale)
    at_pivot, _ = project(project.pivot[None])
    project.origin = (pivot - at_pivot[0]).astype(np.float32)
    joints = skeleton(person.body, pose.body, neck, scale)
    marks, seen = landmarks(person.head, pose.head, project)
    _draw(canvas, person, pose, project, joints, marks)
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return _camera(image, person, pose), _keypoints(person, project, joints, marks, seen, size)


def _background(person: Person, pose: Pose, size: tuple[int, int]) -> np.ndarray:
    zoom = _OVERSAMPLE * size[0] / 128.0
    wide = zoom * max(1.0, size[1] / size[0] / 1.25)
    target = (_OVERSAMPLE * size[1], _OVERSAMPLE * size[0])
    source = person.background
    if person.window is not None:
        view, mask = person.window
        room = view.shape[1] - source.shape[1]
        start = int(abs((pose.window_pan + room) % (2 * room) - room))  # back and forth
        weight = mask[..., None]
        outside = view[:, start : start + source.shape[1]]
        source = (source * (1 - weight) + outside * weight).astype(np.uint8)
    matrix = np.array([[wide, 0, (pose.pan[0] - MARGIN) * wide], [0, wide, (pose.pan[1] - MARGIN) * wide]])
    return cv2.warpAffine(source, matrix, target, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _draw(
    canvas: np.ndarray, person: Person, pose: Pose, project: Projector, joints: dict[str, np.ndarray], marks: np.ndarray
) -> None:
    head, light, scale = person.head, person.light, project.scale
    sheet = None
    if person.long_hair is not None and scale > 2.0:
        sheet = grid_quads(*project(person.long_hair[0]), person.long_hair[1], light, cull=False, gloss=0.05)
        behind = sheet[2] < -1.0
        paint_quads(canvas, sheet[0][behind], sheet[1][behind] * 0.75, sheet[2][behind])
    draw_legs(canvas, joints, person.body, scale, light)
    for name in ("right", "left"):
        draw_upper_arm(canvas, joints[f"{name}_arm"], person.body, _paints(person), scale, light)
    if not pose.arms_in_front:
        _draw_forearms(canvas, person, joints, scale)
    draw_torso(canvas, joints, person.body, person.cloth, scale, light)
    top, _ = project(np.array([[0.0, 8.3 * head.length, -0.6]], np.float32))
    draw_neck(canvas, joints, top[0], head.skin, person.body, scale, light)
    _draw_head(canvas, person, pose, project, sheet)
    draw_face(canvas, marks, head, pose.head, project, light)
    if pose.arms_in_front:
        _draw_forearms(canvas, person, joints, scale)


def _draw_forearms(canvas: np.ndarray, person: Person, joints: dict[str, np.ndarray], scale: float) -> None:
    for name in ("right", "left"):
        draw_forearm(
            canvas,
            joints[f"{name}_arm"],
            joints[f"{name}_hand"],
            person.body,
            _paints(person),
            scale,
            person.light,
        )


def _paints(person: Person) -> tuple[np.ndarray, np.ndarray]:
    """Return the skin colour and the sleeves' paint: for a jacket its colour, because its texture shows its front."""
    return person.head.skin, person.cloth if person.body.jacket is None else person.body.jacket


def _draw_head(
    canvas: np.ndarray,
    person: Person,
    pose: Pose,
    project: Projector,
    sheet: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
) -> None:
    mesh = person.mesh if project.scale > 3.0 else person.coarse_mesh
    pixels, turned = project(mesh.posed(pose.head))
    quads, colours, depths = grid_quads(pixels, turned, mesh.albedo, person.light, gloss=0.12)
    near = 1.0 if project.rotation[2, 0] > 0 else -1.0
    ears = person.head.hair_style not in ("long", "medium")
    if ears:
        draw_ear(canvas, person.head, project, -near, person.light)
    paint_quads(canvas, quads, colours, depths)
    _soften(canvas, pixels, project.scale)
    if ears:
        draw_ear(canvas, person.head, project, near, person.light)
    if sheet is not None:
        front = sheet[2] >= -1.0
        paint_quads(canvas, sheet[0][front], sheet[1][front], sheet[2][front])


def _soften(canvas: np.ndarray, pixels: np.ndarray, scale: float) -> None:
    """Blur the head mesh, so that its facets merge."""
    flat = pixels.reshape(-1, 2)
    box = clip_box(flat, canvas.shape, 2)
    if box is None or scale < 1.5:
        return
    x0, y0, x1, y1 = box
    outline = np.round(cv2.convexHull(flat.astype(np.float32)) - [x0, y0]).astype(np.int32)
    mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillConvexPoly(mask, outline, 255)
    part = canvas[y0:y1, x0:x1]
    blurred = cv2.GaussianBlur(part, (0, 0), min(0.16 * scale, 1.6))
    cv2.copyTo(blurred, mask, part)


def _camera(image: np.ndarray, person: Person, pose: Pose) -> np.ndarray:
    if person.blur > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), person.blur)
    height, width = image.shape[:2]
    grain = person.grain
    if height > grain.shape[0] or width > grain.shape[1]:
        grain = np.tile(grain, (height // grain.shape[0] + 1, width // grain.shape[1] + 1, 1))
    dy = pose.grain_seed % (grain.shape[0] - height + 1)
    dx = (pose.grain_seed >> 8) % (grain.shape[1] - width + 1)
    gain = (person.gain * pose.exposure).astype(np.float32)
    image = np.clip(image * gain + grain[dy : dy + height, dx : dx + width] + 0.5, 0, 255).astype(np.uint8)
    if person.jpeg_quality is not None:
        _, packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, person.jpeg_quality])
        image = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))[..., ::-1]
    return np.ascontiguousarray(image)


def _keypoints(
    person: Person,
    project: Projector,
    joints: dict[str, np.ndarray],
    marks: np.ndarray,
    seen: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    points, confident = np.zeros((NUM_KEYPOINTS, 2)), np.ones(NUM_KEYPOINTS, bool)
    right, left = joints["right_arm"], joints["left_arm"]
    ears, _ = project(
        np.array([[-7.6 * person.head.width, 1.2, -0.8], [7.6 * person.head.width, 1.2, -0.8]], np.float32)
    )
    body = np.concatenate(
        [
            marks[30:31],
            0.5 * (right[:1] + left[:1]),
            right,
            left,
            joints["right_leg"][:3],
            joints["left_leg"][:3],
            marks[36:42].mean(0)[None],
            marks[42:48].mean(0)[None],
            ears,
        ]
    )
    points[BODY], points[FACE] = body, marks
    points[FEET] = np.concatenate([joints["left_leg"][3:], joints["right_leg"][3:]])
    points[LEFT_HAND], points[RIGHT_HAND] = joints["left_hand"], joints["right_hand"]
    confident[FACE] = seen
    confident[14], confident[15] = seen[36], seen[42]
    turn = project.rotation[2, 0]  # positive: the person's left side is nearer
    confident[16], confident[17] = turn < 0.32, turn > -0.32
    points = (points - 0.5 * (_OVERSAMPLE - 1)) / _OVERSAMPLE
    height, width = size
    inside = (points >= 0).all(1) & (points[:, 0] <= width - 1) & (points[:, 1] <= height - 1)
    keep = confident & inside
    return np.concatenate([points * keep[:, None], keep[:, None]], axis=1).astype(np.float32)
