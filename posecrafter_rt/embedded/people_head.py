"""Procedural 3-D head: a shaded mesh with 68 exact landmarks, on which `people_face` draws eyes, brows, nose and mouth.

Layer 1 (embedded recipe): numpy and cv2 only. Units are centimetres around the point between the eyes, x to the
person's left, y down, z towards the camera; `Projector` turns them into pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np

_ROW_Y = np.array([-11.6, -11.3, -10.5, -8.0, -5.0, -1.0, 3.0, 6.0, 9.0, 11.0, 11.9, 12.3])
_ROW_HALF_WIDTH = np.array([0.0, 2.2, 4.0, 6.4, 7.3, 7.4, 7.0, 6.3, 4.7, 2.9, 1.5, 0.0])
_ROW_FRONT = np.array([-0.5, 1.9, 4.0, 7.2, 8.9, 9.1, 9.2, 9.5, 9.5, 9.2, 8.4, 7.4])
_ROW_BACK = np.array([-0.5, -2.8, -5.2, -8.6, -10.0, -9.6, -6.5, -2.5, 1.5, 4.5, 6.0, 7.4])
_JAW_Y = np.array([0.2, 2.7, 4.9, 6.9, 8.6, 10.0, 11.1, 11.8, 12.1])


@dataclass
class HeadShape:
    """Face proportions and colours of one identity (RGB floats 0..255, lengths as factors of the mean head)."""

    width: float = 1.0
    length: float = 1.0
    jaw: float = 1.0
    nose: float = 1.0
    eye_gap: float = 1.0
    eye_size: float = 1.0
    brow_height: float = 0.0
    brow_thickness: float = 0.55
    lip_thickness: float = 1.0
    mouth_width: float = 1.0
    skin: np.ndarray = field(default_factory=lambda: np.array([205.0, 160.0, 135.0]))
    hair: np.ndarray = field(default_factory=lambda: np.array([60.0, 40.0, 30.0]))
    lips: np.ndarray = field(default_factory=lambda: np.array([175.0, 95.0, 90.0]))
    iris: np.ndarray = field(default_factory=lambda: np.array([80.0, 60.0, 40.0]))
    hair_style: str = "short"  # bald, short, medium, long, cap
    hair_thickness: float = 1.1
    hairline: float = -6.3
    parting: float = 0.0
    beard: float = 0.0  # 0 none .. 1 full
    glasses: str = "none"  # none, thin, thick, dark
    cap: np.ndarray = field(default_factory=lambda: np.array([40.0, 60.0, 110.0]))
    strands: float = 0.8  # contrast of the locks
    texture_seed: int = 0


@dataclass
class HeadPose:
    """Rotation (radians; yaw > 0 looks to the image's right, pitch > 0 up, roll > 0 clockwise) and expression."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    mouth_open: float = 0.0
    smile: float = 0.0
    blink: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0
    brow_raise: float = 0.0


class Projector:
    """Turns head centimetres into pixels: rotation, then perspective. z of the result points to the camera."""

    def __init__(self, pose: HeadPose, origin: tuple[float, float], scale: float, distance_cm: float = 75.0) -> None:
        cy, sy = np.cos(pose.yaw), np.sin(pose.yaw)
        cp, sp = np.cos(pose.pitch), np.sin(pose.pitch)
        cr, sr = np.cos(pose.roll), np.sin(pose.roll)
        turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        self.rotation = (tilt @ nod @ turn).astype(np.float32)
        # the head turns around the top of the neck, not around the eyes
        self.pivot = np.array([0.0, 7.0, -2.0], np.float32)
        self.origin = np.array(origin, np.float32)
        self.scale = scale
        self.distance = distance_cm

    def __call__(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Project (..., 3) centimetres to ((..., 2) pixels, (..., 3) rotated centimetres)."""
        turned = (points - self.pivot) @ self.rotation.T + self.pivot
        factor = self.scale * self.distance / (self.distance - turned[..., 2:3])
        return turned[..., :2] * factor + self.origin, turned


@lru_cache(maxsize=8)
def _grid(rows: int, half_columns: int) -> tuple[np.ndarray, np.ndarray]:
    u = np.linspace(-1.0, 1.0, 2 * half_columns + 1)
    theta = np.pi * (0.5 * u + 0.5 * u**3)
    v = np.linspace(0.0, 1.0, rows)
    y = -11.6 + 23.9 * (0.5 - 0.5 * np.cos(np.pi * v)) * 0.35 + 23.9 * v * 0.65
    return theta, y


def _rings(shape: HeadShape, y: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Return skull points at heights y and longitudes theta (broadcast), without nose and sockets: (..., 3)."""
    jaw = np.where(y > 3.0, 1.0 + (shape.jaw - 1.0) * np.clip((y - 3.0) / 5.0, 0.0, 1.0), 1.0)
    half_width = np.interp(y, _ROW_Y, _ROW_HALF_WIDTH) * shape.width * jaw
    front, back = np.interp(y, _ROW_Y, _ROW_FRONT), np.interp(y, _ROW_Y, _ROW_BACK)
    sine, cosine = np.sin(theta), np.cos(theta)
    x = half_width * np.sign(sine) * np.abs(sine) ** 0.92
    z = 0.5 * (front + back) + 0.5 * (front - back) * np.sign(cosine) * np.abs(cosine) ** 0.85
    return np.stack(np.broadcast_arrays(x, y, z), axis=-1)


def _relief(shape: HeadShape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the depth that nose, sockets, cheeks, lips and chin add to the front of the skull."""

    def bump(cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
        return np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

    ridge = np.interp(y, [-1.8, 0.0, 2.4, 4.3, 5.0, 5.6], [0.0, 0.55, 1.5, 2.7, 1.6, 0.0]) * shape.nose
    width = np.interp(y, [-1.0, 1.0, 4.4, 5.4], [1.0, 1.15, 1.45, 1.6]) * (0.6 + 0.4 * shape.nose)
    depth = ridge * np.exp(-((x / width) ** 2))
    depth += 0.8 * shape.nose * (bump(-1.55, 4.6, 0.7, 0.7) + bump(1.55, 4.6, 0.7, 0.7))
    eye_x = 3.15 * shape.eye_gap
    for side in (-1.0, 1.0):
        depth -= 1.0 * bump(side * eye_x * 0.95, 0.0, 1.7, 1.25)
        depth += 0.45 * bump(side * 3.0, -2.1, 2.3, 0.8)
        depth += 0.5 * bump(side * 4.4, 3.2, 1.8, 1.6)
    return depth + 0.75 * bump(0, 7.6, 2.4, 1.2) - 0.35 * bump(0, 9.1, 1.8, 0.55) + 0.6 * bump(0, 10.8, 1.7, 1.1)


def _jaw_drop(pose: HeadPose, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return how far the lower face moves down when the mouth opens."""
    weight = np.clip((y - 6.8) / 3.2, 0.0, 1.0) * np.clip((z + 2.0) / 8.0, 0.0, 1.0)
    return 1.9 * pose.mouth_open * weight


def _on_face(shape: HeadShape, xy: np.ndarray) -> np.ndarray:
    """Lift frontal (x, y) points onto the face surface: (N, 3)."""
    x, y = xy[:, 0], xy[:, 1]
    half_width = np.interp(y, _ROW_Y, _ROW_HALF_WIDTH) * shape.width + 1e-6
    sine = np.clip(np.abs(x) / half_width, 0.0, 0.999) ** (1 / 0.92)
    front, back = np.interp(y, _ROW_Y, _ROW_FRONT), np.interp(y, _ROW_Y, _ROW_BACK)
    z = 0.5 * (front + back) + 0.5 * (front - back) * np.sqrt(1 - sine**2) ** 0.85
    return np.stack([x, y, z + _relief(shape, x, y)], axis=1)


def _brow_xy(shape: HeadShape, pose: HeadPose) -> np.ndarray:
    x = np.array([5.7, 4.8, 3.7, 2.5, 1.3]) * (0.5 + 0.5 * shape.eye_gap)
    lift = pose.brow_raise * np.array([0.3, 0.8, 1.0, 0.9, 0.7])
    y = np.array([-1.75, -2.6, -2.9, -2.75, -2.35]) - shape.brow_height - 0.7 * lift
    right = np.stack([-x, y], axis=1)
    return np.concatenate([right, right[::-1] * [-1, 1]])


def _eye_xy(shape: HeadShape, pose: HeadPose) -> np.ndarray:
    centre, half = 3.15 * shape.eye_gap, 1.45 * (0.5 + 0.5 * shape.eye_size)
    opening = np.clip(1.0 - pose.blink, 0.04, 1.2) * shape.eye_size
    up, low = -0.72 * opening + 0.32 * (1 - min(opening, 1.0)), 0.42 * opening + 0.32 * (1 - min(opening, 1.0))
    low -= 0.12 * max(pose.smile, 0.0)
    x = centre - half * np.array([-1.0, -0.42, 0.40, 1.0, 0.42, -0.42])
    y = np.array([-0.05, up, up * 0.96, 0.18, low, low])
    right = np.stack([-x, y], axis=1)
    left = right[[3, 2, 1, 0, 5, 4]] * [-1, 1]
    return np.concatenate([right, left])


def _mouth_xy(shape: HeadShape, pose: HeadPose) -> np.ndarray:
    half = 2.35 * shape.mouth_width * (1 + 0.22 * pose.smile - 0.16 * pose.mouth_open)
    corner = 7.5 - 0.5 * pose.smile + 0.35 * pose.mouth_open
    drop, upper = 1.75 * pose.mouth_open, 0.95 * shape.lip_thickness * (1 - 0.2 * pose.smile)
    lower = 1.15 * shape.lip_thickness * (1 - 0.15 * pose.smile)
    middle, lift = 7.55, 0.25 * pose.mouth_open
    f = np.array([-1.0, -0.62, -0.24, 0.0, 0.24, 0.62])
    top = middle - lift - upper * np.array([0, 0.62, 1.0, 0.86, 1.0, 0.62])
    top[0] = corner
    bend = 1 - np.abs(np.array([0.62, 0.27, 0.0, -0.27, -0.62]))
    bottom = middle + drop * (0.55 + 0.45 * bend) + lower * np.array([0.68, 0.96, 1.0, 0.96, 0.68])
    bottom += (corner - middle) * np.array([0.4, 0.1, 0, 0.1, 0.4])
    outer = np.concatenate(
        [
            np.stack([half * f, top], 1),
            [[half, corner]],
            np.stack([half * np.array([0.62, 0.27, 0.0, -0.27, -0.62]), bottom], 1),
        ]
    )
    g = np.array([-0.86, -0.33, 0.0, 0.33, 0.86])
    inner_top = np.array([corner, middle - lift, middle - lift + 0.08, middle - lift, corner])
    inner_bottom = middle + drop * np.array([0.92, 1.0, 0.92]) + 0.06
    inner = np.concatenate(
        [np.stack([half * g, inner_top], 1), np.stack([half * np.array([0.33, 0.0, -0.33]), inner_bottom], 1)]
    )
    return np.concatenate([outer, inner])


def landmarks(shape: HeadShape, pose: HeadPose, project: Projector) -> tuple[np.ndarray, np.ndarray]:
    """Compute the 68 iBUG landmarks.

    Returns: (68, 2) float pixels; (68,) bool, False where the head itself hides the point. Jaw points of the side
    turned away slide onto the visible contour, as 2-D face detectors label them.
    """
    jaw_y = np.concatenate([_JAW_Y, _JAW_Y[-2::-1]])
    jaw = _rings(shape, jaw_y, np.concatenate([np.full(9, -np.pi / 2), np.full(8, np.pi / 2)]))
    nose_y = np.array([-0.4, 1.1, 2.6, 4.1])
    bridge = np.stack([np.zeros(4), nose_y], 1)
    base = np.stack(
        [np.array([-1.7, -0.85, 0.0, 0.85, 1.7]) * (0.5 + 0.5 * shape.nose), np.array([5.15, 5.4, 5.55, 5.4, 5.15])], 1
    )
    mouth = _mouth_xy(shape, pose)
    front = _on_face(
        shape,
        np.concatenate(
            [
                _brow_xy(shape, pose),
                bridge,
                base,
                _eye_xy(shape, pose),
                np.stack([mouth[:, 0], np.minimum(mouth[:, 1], 9.0)], 1),
            ]
        ),
    )
    front[-20:, 1] = mouth[:, 1]
    front[14:19, 2] += np.array([0.2, 0.7, 1.0, 0.7, 0.2]) * shape.nose  # the base of the nose stands out
    points = np.concatenate([jaw, front])
    points[:17, 1] += _jaw_drop(pose, points[:17, 1], points[:17, 2])
    points[:, 1] *= shape.length
    pixels, turned = project(points.astype(np.float32))
    _slide_to_contour(shape, pose, project, pixels)
    visible = np.ones(68, bool)
    facing = project.rotation[2]  # z row: how much each head axis points at the camera
    if abs(facing[0]) > 0.72:  # beyond about 46 degrees the nose hides the far eye and brow
        far_right = facing[0] > 0
        visible[[*range(17, 22), *range(36, 42)] if far_right else [*range(22, 27), *range(42, 48)]] = False
    return pixels, visible


def _slide_to_contour(shape: HeadShape, pose: HeadPose, project: Projector, pixels: np.ndarray) -> None:
    theta = np.linspace(0.0, np.pi / 2, 12)
    ring = _rings(shape, _JAW_Y[:8, None], theta[None])
    ring[..., 2] += _relief(shape, ring[..., 0], ring[..., 1]) * (np.cos(theta) > 0.1)
    ring[..., 1] += _jaw_drop(pose, ring[..., 1], ring[..., 2])
    ring[..., 1] *= shape.length
    axis = project.rotation[:2, 0] / (np.linalg.norm(project.rotation[:2, 0]) + 1e-6)
    # the side turned away is the one whose outward axis points away from the camera
    side = -1.0 if project.rotation[2, 0] > 0 else 1.0
    ring[..., 0] *= side
    candidates, _ = project(ring.astype(np.float32))
    best = np.argmax((candidates @ axis) * side, axis=1)
    slots = np.arange(8) if side < 0 else 16 - np.arange(8)
    pixels[slots] = candidates[np.arange(8), best]


class HeadMesh:
    """The vertex grid of one identity: neutral positions and albedo, shared by all its poses."""

    def __init__(self, shape: HeadShape, rows: int = 46, half_columns: int = 27) -> None:
        self.shape = shape
        theta, y = _grid(rows, half_columns)
        points = _rings(shape, y[:, None], theta[None])
        front = np.clip(np.cos(theta)[None] * 4.0, 0.0, 1.0)
        points[..., 2] += _relief(shape, points[..., 0], points[..., 1]) * front
        rng = np.random.default_rng(shape.texture_seed)
        self.hair_mask = self._hair_mask(theta, points, rng)
        self.albedo = self._albedo(points, front, rng)
        outward = points - np.array([0.0, -1.0, -0.5])
        outward /= np.linalg.norm(outward, axis=-1, keepdims=True) + 1e-6
        lump = 1.0 + 0.25 * cv2.GaussianBlur(rng.standard_normal(self.hair_mask.shape), (0, 0), 2.0) * 3
        lump[:4] = 1.0  # the crown is one point: its columns have to agree
        swell = cv2.GaussianBlur(self.hair_mask, (0, 0), 1.6) * np.clip(2 * self.hair_mask, 0, 1)
        swell = cv2.GaussianBlur(swell, (0, 0), 0.8)
        self.points = points + outward * (shape.hair_thickness * swell * lump)[..., None]

    def _hair_mask(self, theta: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        style = self.shape.hair_style
        if style == "bald":
            return np.zeros(points.shape[:2])
        angle = np.abs(theta)
        low = {"short": 0.8, "medium": 3.0, "long": 5.0, "cap": 0.5}[style]
        back = {"short": 5.0, "medium": 8.0, "long": 11.0, "cap": 3.0}[style]
        line = np.interp(
            angle,
            [0.0, 0.55, 0.85, 1.05, 1.3, 1.65, 2.1],
            [self.shape.hairline, self.shape.hairline + 0.2, self.shape.hairline + 1.2, -3.0, low, low + 0.2, back],
        )
        if style == "cap":
            line = np.interp(angle, [0.0, 1.0, 1.6, 3.2], [-4.6, -4.2, -3.0, -1.0])
        else:
            line = line + 0.9 * np.exp(-(((theta - self.shape.parting) / 0.25) ** 2)) * np.sign(self.shape.parting)
            line = line + cv2.GaussianBlur(rng.standard_normal((1, theta.size)), (0, 0), 1.0)[0] * 0.45
        return cv2.GaussianBlur(np.clip((line[None] - points[..., 1]) / 0.9 + 0.5, 0.0, 1.0), (0, 0), 0.55)

    def _albedo(self, points: np.ndarray, front: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        shape, (x, y) = self.shape, (points[..., 0], points[..., 1])

        def spot(cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
            return np.exp(-(((np.abs(x) - cx) / sx) ** 2) - ((y - cy) / sy) ** 2) * front

        skin = np.repeat(np.repeat(shape.skin[None, None], x.shape[0], 0), x.shape[1], 1)
        blotch = (
            cv2.GaussianBlur(rng.standard_normal(x.shape), (0, 0), 1.5) * 0.09 + rng.standard_normal(x.shape) * 0.02
        )
        red = 0.09 * spot(4.2, 3.5, 1.8, 1.6) + 0.08 * spot(0, 4.3, 1.3, 0.9)
        skin = skin * (1 + blotch[..., None]) * (1 - red[..., None] * np.array([0.0, 1.0, 1.0]))
        dark = 0.20 * spot(3.1, -0.4, 1.9, 1.1) + 0.10 * spot(3.0, 1.4, 1.3, 0.5) + 0.25 * spot(0.8, 5.45, 0.9, 0.35)
        dark += 0.12 * spot(2.6, 6.0, 0.5, 1.3) + 0.10 * spot(0, 9.2, 1.6, 0.4) + 0.08 * spot(0, 6.2, 0.4, 0.5)
        dark += 0.22 * np.clip(1 - (y - shape.hairline) / 1.6, 0, 1) * (self.hair_mask < 0.5)
        skin = skin * (1 - dark[..., None])
        if shape.beard > 0:
            chin = np.clip((y - 5.9 + 1.1 * np.maximum(np.abs(x) - 3.2, 0)) / 1.2, 0, 1) * np.clip(
                (points[..., 2] + 2.0) / 2.0, 0, 1
            )
            side = np.clip((np.abs(x) - 5.4) / 0.8, 0, 1) * np.clip((y - 1.0) / 1.0, 0, 1) * (points[..., 2] > -1)
            cover = np.clip(np.maximum(chin, side) * shape.beard * (1 + 0.4 * rng.standard_normal(x.shape)), 0, 0.95)
            skin = skin * (1 - cover[..., None]) + shape.hair * 1.05 * cover[..., None]
        strands = cv2.GaussianBlur(rng.standard_normal(x.shape), (0, 0), sigmaX=0.5, sigmaY=4.0) * shape.strands
        hair = (shape.cap if shape.hair_style == "cap" else shape.hair)[None, None]
        rough = 0.06 * rng.standard_normal(x.shape) if shape.hair_style == "cap" else strands
        hair = hair * (1 + np.clip(rough, -0.6, 0.9))[..., None]
        return skin * (1 - self.hair_mask[..., None]) + hair * self.hair_mask[..., None]

    def posed(self, pose: HeadPose) -> np.ndarray:
        points = self.points.copy()
        points[..., 1] += _jaw_drop(pose, points[..., 1], points[..., 2])
        points[..., 1] *= self.shape.length
        return points.astype(np.float32)


def curtain(shape: HeadShape, length_cm: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Make long hair: a sheet around the back and sides of the head. Returns: points and albedo, (R, C, 3) each."""
    rng = np.random.default_rng(seed)
    theta = np.linspace(1.15, 2 * np.pi - 1.15, 30)
    v = np.linspace(0.0, 1.0, 12)[:, None]
    ends = 1 + 0.10 * cv2.GaussianBlur(rng.standard_normal((1, 30)), (0, 0), 1.0)
    y = -5.0 + v * (length_cm + 5.0) * ends
    wide = (7.6 * shape.width + shape.hair_thickness) * (1 + 0.18 * np.sin(np.pi * np.clip(v, 0, 0.75)))
    wave = 0.5 * np.sin(v * 6 + rng.uniform(0, 6)) * v
    points = np.stack([wide * np.sin(theta) + wave, y, -1.2 + (9.5 - 3.0 * v) * np.cos(theta)], -1)
    strands = cv2.GaussianBlur(rng.standard_normal((12, 30)), (0, 0), sigmaX=0.6, sigmaY=3.0) * 0.8
    albedo = shape.hair * (1 + np.clip(strands, -0.6, 0.9) - 0.15 * v)[..., None]
    return points.astype(np.float32), albedo
