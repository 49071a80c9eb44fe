"""Procedural backgrounds, cloth and camera effects for the synthetic people.

Layer 1 (embedded recipe): numpy and cv2 only. The generator that is passed in determines everything.
"""

from __future__ import annotations

import cv2
import numpy as np


def octaves(
    rng: np.random.Generator, height: int, width: int, start: int = 3, levels: int = 5, gain: float = 0.6
) -> np.ndarray:
    """Return multi-octave value noise, float32 (height, width), roughly -1..1."""
    total, weight = np.zeros((height, width), np.float32), 1.0
    for level in range(levels):
        cells = start * 2**level
        small = rng.standard_normal((max(2, cells), max(2, cells * width // height))).astype(np.float32)
        total += weight * cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        weight *= gain
    return total / 2.2


def random_colour(rng: np.random.Generator, low: float = 20, high: float = 230, saturation: float = 0.5) -> np.ndarray:
    """Draw a colour, float (3,), that is rarely garish."""
    value = rng.uniform(low, high)
    return np.clip(value * (1 + saturation * rng.uniform(-1, 1, 3)), 5, 250)


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    corners = np.stack([random_colour(rng) for _ in range(4)]).reshape(2, 2, 3).astype(np.float32)
    corners = corners * 0.6 + 0.4 * corners.mean((0, 1))
    return cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)


def _boxes(rng: np.random.Generator, image: np.ndarray, count: int) -> None:
    height, width = image.shape[:2]
    for _ in range(count):
        centre = rng.uniform(0, 1, 2) * [width, height]
        size = rng.uniform(0.04, 0.5, 2) ** 1.3 * [width, height]
        angle = float(rng.choice([0.0, 0.0, rng.uniform(-12, 12), rng.uniform(-50, 50)]))
        corners = cv2.boxPoints((tuple(map(float, centre)), tuple(map(float, size)), angle))
        top = image.copy()
        cv2.fillConvexPoly(top, np.round(corners * 8).astype(np.int32), random_colour(rng).tolist(), cv2.LINE_AA, 3)
        if rng.random() < 0.4:
            cv2.polylines(
                top,
                [np.round(corners * 8).astype(np.int32)],
                True,
                random_colour(rng, 5, 90).tolist(),
                int(rng.integers(1, 4)),
                cv2.LINE_AA,
                3,
            )
        alpha = rng.uniform(0.35, 1.0)
        image[:] = top * alpha + image * (1 - alpha)


def _curves(rng: np.random.Generator, image: np.ndarray, count: int) -> None:
    height, width = image.shape[:2]
    for _ in range(count):
        t = np.linspace(0, 1, 24)[:, None]
        a, b, c = (rng.uniform(-0.2, 1.2, 2) * [width, height] for _ in range(3))
        line = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
        cv2.polylines(
            image,
            [np.round(line * 8).astype(np.int32)],
            False,
            random_colour(rng, 10, 200).tolist(),
            int(rng.integers(1, 12)),
            cv2.LINE_AA,
            3,
        )


def outdoors(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Paint what a window shows: sky, a bumpy line of trees or houses, ground; float32 RGB."""
    image = np.empty((height, width, 3), np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    skyline = height * rng.uniform(0.25, 0.6) + height * 0.12 * octaves(rng, width // 2, width, 3, 5, 0.5)[4][None]
    ground = height * rng.uniform(0.65, 0.95)
    sky, trees, floor = (
        random_colour(rng, 170, 250, 0.12),
        random_colour(rng, 30, 120, 0.4),
        random_colour(rng, 60, 150),
    )
    texture = octaves(rng, height, width, 6, 4, 0.8)[..., None]
    below, deep = np.clip((y - skyline) / 2, 0, 1)[..., None], np.clip((y - ground) / 2, 0, 1)[..., None]
    image[:] = sky * (1 + 0.05 * texture)
    image = image * (1 - below) + trees * (1 + 0.45 * texture) * below
    deep = np.broadcast_to(deep, below.shape)
    return np.clip(image * (1 - deep) + floor * (1 + 0.15 * texture) * deep, 0, 255)


def make_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Paint a still background, uint8 RGB (height, width, 3): room-like, textured, blurred or plain."""
    image = _gradient(rng, height, width)
    kind = rng.choice(["plain", "texture", "room", "room", "blurred", "outdoors"])
    if kind == "outdoors":
        image = outdoors(rng, height, width)
    elif kind in ("room", "blurred"):
        _boxes(rng, image, int(rng.integers(4, 16)))
        _curves(rng, image, int(rng.integers(0, 6)))
    strength = {"plain": 0.06, "texture": 0.35, "room": 0.12, "blurred": 0.2, "outdoors": 0.1}[str(kind)]
    noise = octaves(rng, height, width, int(rng.integers(2, 8)), 5, rng.uniform(0.5, 0.95))[..., None]
    image = image * (1 + strength * noise)
    if kind == "texture" and rng.random() < 0.5:
        y, x = np.mgrid[:height, :width].astype(np.float32)
        wave = np.sin(x * rng.uniform(0, 0.8) + y * rng.uniform(0, 0.8) + 2 * noise[..., 0])
        image *= (1 + rng.uniform(0.05, 0.3) * wave)[..., None]
    blur = {"plain": 1.0, "blurred": rng.uniform(2, 7)}.get(str(kind), rng.choice([0.5, 0.8, 1.5, 3.0]))
    return np.clip(cv2.GaussianBlur(image, (0, 0), float(blur)), 0, 255).astype(np.uint8)


def window_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a region like a car window, float32 (height, width) 0..1 with soft edges."""
    mask = np.zeros((height, width), np.float32)
    left = rng.uniform(-0.1, 0.55) * width
    size = np.array([rng.uniform(0.3, 0.8) * width, rng.uniform(0.3, 0.7) * height])
    top, lean = rng.uniform(-0.1, 0.25) * height, rng.uniform(-0.15, 0.15) * width
    corners = np.array(
        [
            [left + lean, top],
            [left + size[0] + lean, top],
            [left + size[0], top + size[1]],
            [left, top + size[1] * rng.uniform(0.8, 1.2)],
        ]
    )
    cv2.fillPoly(mask, [np.round(corners * 8).astype(np.int32)], 1.0, cv2.LINE_AA, 3)
    return cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.5, 1.5))


def make_cloth(rng: np.random.Generator, colour: np.ndarray, size: int = 192) -> np.ndarray:
    """Paint a cloth texture, uint8 RGB (size, size, 3): plain, striped, checked, or printed, with soft folds."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    image = np.repeat(np.repeat(colour[None, None].astype(np.float32), size, 0), size, 1)
    second = random_colour(rng)
    kind = rng.choice(["plain", "plain", "plain", "stripe", "check", "print", "front"])
    period = rng.uniform(9, 36)
    if kind in ("stripe", "check"):
        angle = rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)])
        wave = np.clip(
            3 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period) + rng.uniform(-1, 1), 0, 1
        )
        if kind == "check":
            cross = np.clip(3 * np.sin((y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period), 0, 1)
            wave = 0.5 * (wave + cross)
        image = image * (1 - wave[..., None]) + second * wave[..., None]
    elif kind == "print":
        spots = np.clip(4 * octaves(rng, size, size, 8, 2) - 1.0, 0, 1)[..., None]
        image = (image * (1 - spots) + second * spots).astype(np.float32)
    elif kind == "front":
        zone = (np.abs(x - size / 2) < rng.uniform(4, 30)).astype(np.float32)[..., None]
        image = image * (1 - zone) + second * zone
    return _fold(rng, image)


def _fold(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    size = image.shape[0]
    folds = 1 + 0.16 * octaves(rng, size, size, 3, 3)[..., None] + 0.05 * octaves(rng, size, size, 24, 3)[..., None]
    return np.clip(image * folds, 0, 255).astype(np.uint8)


def make_suit(rng: np.random.Generator, jacket: np.ndarray, shirt: np.ndarray, size: int = 192) -> np.ndarray:
    """Paint a cloth like `make_cloth`'s, with a jacket's lapels around a shirt front with a tie or a bow tie.

    It is for a torso whose neck point lies at the middle of row 20, at 3.3 texels per centimetre.
    """
    image = np.empty((size, size, 3), np.uint8)
    image[:] = np.clip(jacket, 0, 255)
    middle, width, depth = size / 2, rng.uniform(18, 34), rng.uniform(60, 130)
    shift = rng.uniform(-4, 4)

    def paint(outline: list[tuple[float, float]], colour: np.ndarray) -> None:
        points = np.round((np.array(outline) + [middle, 0]) * 8).astype(np.int32)
        cv2.fillPoly(image, [points], colour.tolist(), cv2.LINE_AA, 3)

    lapel = rng.uniform(8, 20)
    paint([(-width - lapel, -5), (width + lapel, -5), (shift + 2, 20 + depth), (shift - 2, 20 + depth)],
          np.clip(jacket * rng.choice([0.6, 0.8, 1.3]), 0, 255))  # fmt: skip
    paint([(-width, -5), (width, -5), (shift, 18 + depth)], np.clip(shirt, 0, 255))
    tie, knot = random_colour(rng, 15, 200, 0.8), rng.uniform(18, 26)
    wing = rng.uniform(14, 26)
    if rng.random() < 0.4:
        tall = rng.uniform(6, 11)
        paint([(-wing, knot - tall), (0, knot - 2), (wing, knot - tall), (wing, knot + tall), (0, knot + 2),
               (-wing, knot + tall)], tie)  # fmt: skip
        paint([(-4, knot - 5), (4, knot - 5), (4, knot + 5), (-4, knot + 5)], tie * 0.7)
    elif rng.random() < 0.8:
        paint([(-6, knot - 7), (6, knot - 7), (4, knot + 6), (shift + 9, 10 + depth), (shift, 20 + depth),
               (shift - 9, 10 + depth), (-4, knot + 6)], tie)  # fmt: skip
    return _fold(rng, image.astype(np.float32))
