"""Drawing primitives of the procedural people: shaded quads, limbs, smooth outlines, soft fills.

Layer 1 (embedded recipe): numpy and cv2 only. All images are uint8 RGB and drawn into in place; points are pixels of
that image with pixel centres at integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np

_SHIFT = 3  # fractional bits of cv2's polygon coordinates


@dataclass
class Light:
    """A key light (unit vector towards it, in image axes x right, y down, z to the camera) and an ambient level."""

    direction: np.ndarray = field(default_factory=lambda: np.array([-0.4, -0.5, 0.77]))
    ambient: float = 0.5
    key: float = 0.65
    tint: np.ndarray = field(default_factory=lambda: np.ones(3))

    def shade(self, normals: np.ndarray) -> np.ndarray:
        """(..., 3) unit normals to (..., 3) colour factors; the light wraps a little round the edge."""
        lambert = np.clip((normals @ self.direction + 0.25) / 1.25, 0.0, 1.0)
        return (self.ambient + self.key * lambert)[..., None] * (1 + (self.tint - 1) * lambert[..., None])


def to_fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * (1 << _SHIFT)).astype(np.int32)


@lru_cache(maxsize=32)
def _spline(num_points: int, steps: int, closed: bool) -> np.ndarray:
    """Catmull-Rom weights (M, num_points)."""
    segments = num_points if closed else num_points - 1
    weights = np.zeros((segments * steps + (not closed), num_points))
    for i in range(segments):
        ids = [i - 1, i, i + 1, i + 2]
        ids = [j % num_points for j in ids] if closed else [min(max(j, 0), num_points - 1) for j in ids]
        for k in range(steps):
            t = k / steps
            w = (-0.5 * t**3 + t**2 - 0.5 * t, 1.5 * t**3 - 2.5 * t**2 + 1, -1.5 * t**3 + 2 * t**2 + 0.5 * t,
                 0.5 * t**3 - 0.5 * t**2)
            for j, wj in zip(ids, w, strict=True):
                weights[i * steps + k, j] += wj
    if not closed:
        weights[-1, -1] = 1.0
    return weights


def smooth(points: np.ndarray, steps: int = 4, closed: bool = True) -> np.ndarray:
    """A smooth curve through (N, 2) points."""
    return _spline(len(points), steps, closed) @ points


def fill(image: np.ndarray, outline: np.ndarray, colour: np.ndarray, alpha: float = 1.0) -> None:
    """Fill an antialiased polygon, blended by alpha."""
    if alpha >= 0.999:
        cv2.fillPoly(image, [to_fixed(outline)], tuple(float(c) for c in colour), cv2.LINE_AA, _SHIFT)
        return
    box = clip_box(outline, image.shape, 2)
    if box is None or alpha <= 0.0:
        return
    x0, y0, x1, y1 = box
    part = image[y0:y1, x0:x1]
    top = part.copy()
    cv2.fillPoly(top, [to_fixed(outline - [x0, y0])], tuple(float(c) for c in colour), cv2.LINE_AA, _SHIFT)
    cv2.addWeighted(top, alpha, part, 1 - alpha, 0.0, dst=part)
    image[y0:y1, x0:x1] = part


def stroke(image: np.ndarray, line: np.ndarray, colour: np.ndarray, width: float, alpha: float = 1.0) -> None:
    """Draw an antialiased open polyline, blended by alpha."""
    width_px = max(1, round(width))
    box = clip_box(line, image.shape, width_px + 2)
    if box is None or alpha <= 0.0:
        return
    x0, y0, x1, y1 = box
    part = image[y0:y1, x0:x1]
    top = part.copy()
    cv2.polylines(top, [to_fixed(line - [x0, y0])], False, tuple(float(c) for c in colour), width_px, cv2.LINE_AA,
                  _SHIFT)
    image[y0:y1, x0:x1] = cv2.addWeighted(top, alpha, part, 1 - alpha, 0.0)


def clip_box(points: np.ndarray, shape: tuple[int, ...], margin: int) -> tuple[int, int, int, int] | None:
    """Bounding box (x0, y0, x1, y1) of points within an image, or None if it is empty."""
    low = np.floor(points.min(0)).astype(int) - margin
    high = np.ceil(points.max(0)).astype(int) + margin + 1
    x0, y0 = max(int(low[0]), 0), max(int(low[1]), 0)
    x1, y1 = min(int(high[0]), shape[1]), min(int(high[1]), shape[0])
    return None if x1 <= x0 or y1 <= y0 else (x0, y0, x1, y1)


def grid_quads(pixels: np.ndarray, turned: np.ndarray, albedo: np.ndarray, light: Light,
               cull: bool = True, gloss: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shade a vertex grid. Returns quads (Q, 4, 2) int32 fixed point, colours (Q, 3), depths (Q,), unsorted."""
    du = turned[:-1, 1:] - turned[:-1, :-1] + turned[1:, 1:] - turned[1:, :-1]
    dv = turned[1:, :-1] - turned[:-1, :-1] + turned[1:, 1:] - turned[:-1, 1:]
    normals = np.cross(du, dv)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9
    if cull:
        keep = normals[..., 2] > -0.05
    else:
        normals = np.where(normals[..., 2:3] < 0, -normals, normals)
        keep = np.ones(normals.shape[:2], bool)
    colour = 0.25 * (albedo[:-1, :-1] + albedo[1:, :-1] + albedo[:-1, 1:] + albedo[1:, 1:]) * light.shade(normals)
    if gloss > 0:
        half = light.direction + np.array([0.0, 0.0, 1.0])
        half = half / np.linalg.norm(half)
        colour = colour + 255.0 * gloss * (np.clip(normals @ half, 0, 1) ** 12)[..., None] * light.tint
    fixed = to_fixed(pixels)
    quads = np.stack([fixed[:-1, :-1], fixed[:-1, 1:], fixed[1:, 1:], fixed[1:, :-1]], axis=2)
    depth = 0.25 * (turned[:-1, :-1, 2] + turned[1:, :-1, 2] + turned[:-1, 1:, 2] + turned[1:, 1:, 2])
    return quads[keep], np.clip(colour[keep], 0, 255), depth[keep]


def paint_quads(image: np.ndarray, quads: np.ndarray, colours: np.ndarray, depths: np.ndarray) -> None:
    """Paint shaded quads from far to near."""
    order = np.argsort(depths)
    draw = cv2.fillConvexPoly
    for quad, colour in zip(quads[order], colours[order].tolist(), strict=True):
        draw(image, quad, colour, 8, _SHIFT)


def limb(image: np.ndarray, joints: np.ndarray, widths: np.ndarray, colour: np.ndarray, light: Light) -> None:
    """A rounded limb through (N, 2) joints with (N,) half widths: nested outlines give the shading of a cylinder."""
    points = np.concatenate([joints[:1] + 0.02 * (joints[:1] - joints[1:2]), joints])[1:]
    curve, radius = smooth(points, 4, closed=False), smooth(np.asarray(widths, float)[:, None], 4, closed=False)
    tangent = np.gradient(curve, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    across = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 9))[:, None, None]  # 9 stripes along the limb
    points2 = curve[None] + normal[None] * radius[None] * across
    ends = ((curve[0], radius[0, 0]), (curve[-1], radius[-1, 0]))
    for centre, r in ends:
        cv2.circle(image, tuple(int(c) for c in to_fixed(centre)), max(1, int(r * (1 << _SHIFT))),
                   _as_colour(colour * light.shade(np.array([0.0, 0.0, 1.0])) * 0.93), -1, cv2.LINE_AA, _SHIFT)
    for i in range(8):
        a = 0.5 * (across[i, 0, 0] + across[i + 1, 0, 0])
        d = np.sqrt(1 - a * a)
        mean_normal = normal[len(normal) // 2]
        shade = light.shade(np.array([mean_normal[0] * a, mean_normal[1] * a, d]))
        strip = np.concatenate([points2[i], points2[i + 1][::-1]])
        cv2.fillPoly(image, [to_fixed(strip)], _as_colour(colour * shade), cv2.LINE_AA, _SHIFT)


def _as_colour(colour: np.ndarray) -> tuple[float, ...]:
    return tuple(float(c) for c in np.clip(colour, 0, 255))
