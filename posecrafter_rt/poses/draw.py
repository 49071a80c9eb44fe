"""Draw pose pictures as DWPose does: the condition of ControlNet 1.1 openpose.

Layer 1: numpy and OpenCV.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

import cv2
import numpy as np

from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import (
    BODY,
    CONFIDENCE_THRESHOLD,
    FACE,
    LEFT_HAND,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    PoseSequence,
    scale_keypoints,
)

Point = tuple[float, float]
Pixel = tuple[int, int]

_DRAWN_SHORT_SIDE_PX = 512
_STICK_WIDTH_PX = 4
_BODY_DOT_PX = 4
_HAND_DOT_PX = 4
_FACE_DOT_PX = 3
_HAND_LINE_PX = 2
_LIMB_DIMMING = 0.6
_HAND_DOT_COLOUR = (0, 0, 255)
_FACE_DOT_COLOUR = (255, 255, 255)
# Far outside any picture, and small enough for OpenCV's fixed-point coordinates.
_FARTHEST_PX = 2**14
_LARGEST_PICTURE_BYTES = (1 << 31) - 1  # OpenCV crashes on larger ones

# Pairs of body points, in the order in which they are painted; limb i and joint i both have the i-th colour.
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
# Limbs are painted first and never blended, so dimming their colours equals dimming the picture before the joints.
_LIMB_COLOURS = tuple(tuple(int(c * _LIMB_DIMMING) for c in colour) for colour in _COLOURS[: len(_LIMBS)])
# Five fingers of four bones each; a finger's first bone starts at the wrist, point 0.
_HAND_EDGES = tuple((0 if tip % 4 == 1 else tip - 1, tip) for tip in range(1, 21))
_HAND_COLOURS = tuple(tuple(255 * c for c in colorsys.hsv_to_rgb(edge / 20, 1.0, 1.0)) for edge in range(20))


def draw_pose(
    keypoints: np.ndarray,
    canvas: tuple[int, int],
    size: tuple[int, int] | None = None,
    threshold: float = CONFIDENCE_THRESHOLD,
) -> np.ndarray:
    """Draw one pose on black, as DWPose does.

    Limbs are ellipses of half-width 4 px in the joint colours times 0.6; joints are discs of radius 4. Hands are 2 px
    lines in rainbow colours under blue discs of radius 4; the face is white discs of radius 3. Feet are not drawn. If
    the short side of `size` is below 512, the picture is drawn at the smallest whole multiple that reaches 512 and then
    averaged down, so that small pictures keep sub-pixel positions.
    Args:
        keypoints: (134, 3): x, y in pixels of `canvas` (pixel centres at integers), confidence 0..1.
        canvas: (height, width) in pixels that the coordinates refer to.
        size: (height, width) of the picture in pixels; None takes the canvas.
        threshold: points of lower confidence are left out, with every limb that ends there.
    Returns: uint8 (H', W', 3), RGB, contiguous.
    Raises: PoseError for a wrong shape, coordinates that are not finite, or a picture without area or too large.
    """
    keypoints = np.asarray(keypoints)
    if keypoints.shape != (NUM_KEYPOINTS, 3):
        raise PoseError(f"a pose has the shape {keypoints.shape}", hint=f"give ({NUM_KEYPOINTS}, 3): x, y, confidence")
    if not np.isfinite(keypoints).all():
        raise PoseError("a pose holds NaN or infinity", hint="a missing keypoint is x = y = confidence = 0")
    height, width = canvas if size is None else size
    if height < 1 or width < 1:
        raise PoseError(f"cannot draw a pose at {height} x {width} pixels", hint="give at least 1 x 1")
    multiple = -(-_DRAWN_SHORT_SIDE_PX // min(height, width))
    if 3 * height * width * multiple**2 > _LARGEST_PICTURE_BYTES:
        raise PoseError(
            f"cannot draw a pose at {height} x {width} pixels", hint="give fewer, or sides that differ less"
        )
    drawn = np.zeros((height * multiple, width * multiple, 3), np.uint8)
    scaled = scale_keypoints(keypoints, canvas, drawn.shape[:2])
    # A bad detection may put a point far outside; it must not overflow OpenCV's coordinates.
    np.clip(scaled[:, :2], -_FARTHEST_PX, _FARTHEST_PX, out=scaled[:, :2])
    usable = ((scaled[:, 2] >= threshold) & (scaled[:, 2] > 0)).tolist()
    # Round to the nearest pixel centre, halves up: the same as truncating coordinates measured from the corner.
    pixels = list(map(tuple, np.floor(scaled[:, :2] + 0.5).astype(int).tolist()))
    _paint_body(drawn, list(map(tuple, scaled[BODY, :2].tolist())), usable[BODY], pixels[BODY])
    for hand in (LEFT_HAND, RIGHT_HAND):
        _paint_hand(drawn, usable[hand], pixels[hand])
    for is_usable, pixel in zip(usable[FACE], pixels[FACE], strict=True):
        if is_usable:
            cv2.circle(drawn, pixel, _FACE_DOT_PX, _FACE_DOT_COLOUR, thickness=-1)
    return drawn if multiple == 1 else cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA)


def draw_poses(
    poses: PoseSequence, size: tuple[int, int] | None = None, threshold: float = CONFIDENCE_THRESHOLD
) -> np.ndarray:
    """Draw every frame of a sequence with `draw_pose`.

    Args:
        poses: N poses on one canvas.
        size: (height, width) of the pictures in pixels; None takes the canvas.
        threshold: see `draw_pose`.
    Returns: uint8 (N, H', W', 3), RGB, contiguous.
    """
    height, width = poses.canvas if size is None else size
    pictures = np.empty((len(poses), height, width, 3), np.uint8)
    for picture, keypoints in zip(pictures, poses, strict=True):
        picture[:] = draw_pose(keypoints, poses.canvas, (height, width), threshold)
    return pictures


def _paint_body(picture: np.ndarray, points: list[Point], usable: list[bool], pixels: list[Pixel]) -> None:
    for (start, end), colour in zip(_LIMBS, _LIMB_COLOURS, strict=True):
        if usable[start] and usable[end]:
            cv2.fillConvexPoly(picture, _stick(points[start], points[end]), colour)
    for is_usable, pixel, colour in zip(usable, pixels, _COLOURS, strict=True):
        if is_usable:
            cv2.circle(picture, pixel, _BODY_DOT_PX, colour, thickness=-1)


def _stick(start: Point, end: Point) -> np.ndarray:
    """Return the outline of a limb, int32 (n, 2): an ellipse between two joints, in whole pixels and degrees."""
    (x0, y0), (x1, y1) = start, end
    half_length = int(np.hypot(x1 - x0, y1 - y0) / 2)
    degrees = int(np.degrees(np.arctan2(y0 - y1, x0 - x1)))
    centre = (int(np.floor((x0 + x1) / 2 + 0.5)), int(np.floor((y0 + y1) / 2 + 0.5)))
    return _ellipse(half_length, degrees) + np.array(centre, np.int32)


@lru_cache(maxsize=4096)
def _ellipse(half_length: int, degrees: int) -> np.ndarray:
    return np.asarray(cv2.ellipse2Poly((0, 0), (half_length, _STICK_WIDTH_PX), degrees, 0, 360, 1), np.int32)


def _paint_hand(picture: np.ndarray, usable: list[bool], pixels: list[Pixel]) -> None:
    for (start, end), colour in zip(_HAND_EDGES, _HAND_COLOURS, strict=True):
        if usable[start] and usable[end]:
            cv2.line(picture, pixels[start], pixels[end], colour, thickness=_HAND_LINE_PX)
    for is_usable, pixel in zip(usable, pixels, strict=True):
        if is_usable:
            cv2.circle(picture, pixel, _HAND_DOT_PX, _HAND_DOT_COLOUR, thickness=-1)
