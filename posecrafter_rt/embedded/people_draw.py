"""Drawing primitives of the procedural people: shaded quads, limbs, smooth outlines, soft fills.

Layer 1 (embedded recipe): numpy and cv2 only. All images are uint8 RGB and are drawn into in place. Points are
pixels of that image, with pixel centres at integers.
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
        """Return colour factors (..., 3) for unit normals (..., 3); the light wraps a little around the edge."""
        lambert = np.clip((normals @ self.direction + 0.25) / 1.25, 0.0, 1.0)
        return (self.ambient + self.key * lambert)[..., None] * (1 + (self.tint - 1) * lambert[..., None])


def to_fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * (1 << _SHIFT)).astype(np.int32)


@lru_cache(maxsize=32)
def _spline(num_points: int, steps: int, closed: bool) -> np.ndarray:
    """Return Catmull-Rom weights (M, num_points)."""
    segments = num_points if closed else num_points - 1
    weights = np.zeros((segments * steps + (not closed), num_points))
    for i in range(segments):
        ids = [i - 1, i, i + 1, i + 2]
        ids = [j % num_points for j in ids] if closed else [min(max(j, 0), num_points - 1) for j in ids]
        for k in range(steps):
            t = k / steps
            w = (
                -0.5 * t**3 + t**2 - 0.5 * t,
                1.5 * t**3 - 2.5 * t**2 + 1,
                -1.5 * t**3 + 2 * t**2 + 0.5 * t,
                0.5 * t**3 - 0.5 * t**2,
            )
            for j, wj in zip(ids, w, strict=True):
                weights[i * steps + k, j] += wj
    if not closed:
        weights[-1, -1] = 1.0
    return weights


def smooth(points: np.ndarray, steps: int = 4, closed: bool = True) -> np.ndarray:
    """Return a smooth curve through (N, 2) points."""
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
    cv2.polylines(
        top, [to_fixed(line - [x0, y0])], False, tuple(float(c) for c in colour), width_px, cv2.LINE_AA, _SHIFT
    )
    image[y0:y1, x0:x1] = cv2.addWeighted(top, alpha, part, 1 - alpha, 0.0)


def clip_box(points: np.ndarray, shape: tuple[int, ...], margin: int) -> tuple[int, int, int, int] | None:
    """Return the bounding box (x0, y0, x1, y1) of points within an image, or None if it is empty."""
    low = np.floor(points.min(0)).astype(int) - margin
    high = np.ceil(points.max(0)).astype(int) + margin + 1
    x0, y0 = max(int(low[0]), 0), max(int(low[1]), 0)
    x1, y1 = min(int(high[0]), shape[1]), min(int(high[1]), shape[0])
    return None if x1 <= x0 or y1 <= y0 else (x0, y0, x1, y1)


def grid_quads(
    pixels: np.ndarray, turned: np.ndarray, albedo: np.ndarray, light: Light, cull: bool = True, gloss: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def limb(image: np.ndarray, joints: np.ndarray, widths: np.ndarray, paint: np.ndarray, light: Light) -> None:
    """Draw a rounded limb through (N, 2) joints with (N,) half widths; `paint` is a colour (3,) or cloth (T, T, 3)."""
    curve, radius = smooth(joints, 4, closed=False), smooth(np.asarray(widths, float)[:, None], 4, closed=False)
    tangent = np.gradient(curve, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    arc = np.linspace(-np.pi / 2, np.pi / 2, 7)[1:-1, None]
    start = curve[0] - radius[0] * (np.cos(arc) * tangent[0] + np.sin(arc) * normal[0])
    end = curve[-1] + radius[-1] * (np.cos(arc) * tangent[-1] + np.sin(arc) * normal[-1])
    outline = np.concatenate([curve + normal * radius, end[::-1], (curve - normal * radius)[::-1], start[::-1]])
    axis = joints[-1] - joints[0]
    axis = axis / (np.linalg.norm(axis) + 1e-6)
    pillow(image, outline, paint, light, Frame(joints[0], axis, float(np.max(widths)), 26.0))


@dataclass(frozen=True)
class Frame:
    """How a pillow's cloth lies: origin and downward axis in pixels, thickness in pixels, cloth offset in texels."""

    origin: np.ndarray
    down: np.ndarray
    thickness: float
    offset: float = 20.0
    texels: float = 1.0  # texels per pixel


def pillow(image: np.ndarray, outline: np.ndarray, paint: np.ndarray, light: Light, frame: Frame) -> None:
    """Fill an outline with a colour (3,) or cloth (T, T, 3), shaded as if inflated, with soft edges."""
    box = clip_box(outline, image.shape, 2)
    if box is None:
        return
    x0, y0, x1, y1 = box
    size = (y1 - y0, x1 - x0)
    mask = np.zeros(size, np.uint8)
    cv2.fillPoly(mask, [to_fixed(outline - [x0, y0])], 255, cv2.LINE_AA, _SHIFT)
    shade = _inflate(outline - [x0, y0], size, frame.thickness, light)
    if paint.ndim == 1:
        shaded = np.clip(shade * paint.astype(np.float32), 0, 255)
    else:
        down, across = frame.down * frame.texels, np.array([frame.down[1], -frame.down[0]]) * frame.texels
        origin = frame.origin - [x0, y0]
        matrix = np.array(
            [
                [across[0], across[1], paint.shape[1] / 2 - origin @ across],
                [down[0], down[1], frame.offset - origin @ down],
            ]
        )
        texture = cv2.warpAffine(
            paint, matrix, size[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT
        )
        shaded = np.clip(shade * texture, 0, 255)
    part = image[y0:y1, x0:x1]
    cv2.copyTo(shaded.astype(np.uint8), (mask > 127).astype(np.uint8), part)


def _inflate(outline: np.ndarray, size: tuple[int, int], thickness: float, light: Light) -> np.ndarray:
    """Return colour factors (H, W, 3) of a pillow with this outline, computed at a fraction of the size."""
    step, pad = (4 if thickness > 16 else 2), 8
    shape = (size[0] // step + 1 + 2 * pad, size[1] // step + 1 + 2 * pad)
    mask = np.zeros(shape, np.float32)
    cv2.fillPoly(mask, [to_fixed(outline / step + pad)], 1.0, cv2.LINE_8, _SHIFT)
    sigma = max(0.42 * thickness / step, 0.5)
    height = cv2.GaussianBlur(mask, (0, 0), sigma)
    steep = -0.62 * sigma
    normals = np.empty((*shape, 3), np.float32)
    normals[..., 0], normals[..., 1] = cv2.Sobel(height, cv2.CV_32F, 1, 0), cv2.Sobel(height, cv2.CV_32F, 0, 1)
    normals[..., :2] *= steep
    normals[..., 2] = 1.0
    normals /= np.sqrt((normals**2).sum(-1, keepdims=True))
    shade = light.shade(normals).astype(np.float32)[pad : shape[0] - pad, pad : shape[1] - pad]
    large = cv2.resize(shade, (shade.shape[1] * step, shade.shape[0] * step), interpolation=cv2.INTER_LINEAR)
    return np.asarray(large[: size[0], : size[1]], np.float32)
