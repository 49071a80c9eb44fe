"""Plan which rectangles of the inverted latent are warped where, per frame and region (method step 4).

Layer 1: numpy and the keypoint layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from posecrafter_rt.errors import PoseError, ShapeError
from posecrafter_rt.method.affine import fit_affine_with_reason
from posecrafter_rt.poses.keypoints import (
    BODY,
    CONFIDENCE_THRESHOLD,
    FACE,
    FEET,
    LEFT_HAND,
    NUM_KEYPOINTS,
    RIGHT_HAND,
)


def _indices(*parts: slice | int) -> tuple[int, ...]:
    return tuple(i for part in parts for i in (range(part.start, part.stop) if isinstance(part, slice) else (part,)))


def _face(first: int, last: int) -> slice:
    """Face landmarks `first` to `last` in iBUG's numbering, both included."""
    return slice(FACE.start + first, FACE.start + last + 1)


# Left and right are the person's own.
REGIONS: dict[str, tuple[int, ...]] = {
    "face": _indices(FACE),
    "left_hand": _indices(LEFT_HAND),
    "right_hand": _indices(RIGHT_HAND),
    "head": _indices(0, 14, 15, 16, 17, FACE),
    "mouth": _indices(_face(48, 67)),
    "left_eye": _indices(_face(42, 47)),
    "right_eye": _indices(_face(36, 41)),
    "body": _indices(BODY),
    "torso": _indices(1, 2, 5, 8, 11),
    "left_arm": _indices(5, 6, 7),
    "right_arm": _indices(2, 3, 4),
    "left_leg": _indices(11, 12, 13),
    "right_leg": _indices(8, 9, 10),
    "feet": _indices(FEET),
    "left_foot": _indices(13, 18, 19, 20),
    "right_foot": _indices(10, 21, 22, 23),
}
DEFAULT_REGIONS = ("face", "left_hand", "right_hand")

_IDENTITY = np.eye(2, 3, dtype=np.float32)


class SkippedRegion(NamedTuple):
    """A region of one target frame that is left unedited, and why."""

    frame: int  # index of the target pose, the inserted reference not counted
    region: str
    reason: str


class EditPlan(NamedTuple):
    """The arguments of the warp-and-paste operator, for N target frames and R regions."""

    affines: np.ndarray  # float32 (N, R, 2, 3), reference -> target in latent pixels; identity where unedited
    rects: np.ndarray  # int32 (N, R, 4), x0, y0, x1, y1 in latent pixels, half open; all 0 where unedited
    report: list[SkippedRegion]


def plan_edits(
    reference_keypoints: np.ndarray,
    target_keypoints: np.ndarray,
    *,
    canvas: tuple[int, int],
    vae_scale_factor: int,
    latent_size: tuple[int, int],
    regions: Iterable[str] = DEFAULT_REGIONS,
) -> EditPlan:
    """Plan the latent edit of every target frame and region.

    A: least squares from the landmarks usable in both poses (Eq. 18-19). Rectangle: [floor(min), ceil(max) + 1) over
    the region's usable target landmarks, half open, clipped to the latent. Both in latent pixels u = (x + 0.5)/s - 0.5.
    Args:
        reference_keypoints: float (134, 3): x, y in pixels of `canvas`, confidence 0..1.
        target_keypoints: float (N, 134, 3), likewise.
        canvas: (height, width) of the rendered picture in pixels. Poses from another canvas are scaled first
            (`PoseSequence.resized`).
        vae_scale_factor: s, picture pixels per latent pixel.
        latent_size: (height, width) of the latent: the canvas over s, rounded down.
        regions: names from `REGIONS`; where they overlap, the later one is pasted over the earlier.
    Returns: the plan. A region is left unedited, and the report says so, if fewer than 3 landmarks are usable in both
        poses, if the reference's lie nearly on one line, if the map is nearly singular (the target's lie nearly on one
        line), or if the rectangle lies outside the latent.
    Raises:
        PoseError: as `checked_regions`.
        ShapeError: keypoints, canvas and latent whose shapes do not fit together.
    """
    reference, targets = _checked_keypoints(reference_keypoints, target_keypoints)
    _check_geometry(canvas, vae_scale_factor, latent_size)
    regions = checked_regions(regions)
    indices = [np.array(REGIONS[region]) for region in regions]
    affines = np.tile(_IDENTITY, (len(targets), len(regions), 1, 1))
    rects = np.zeros((len(targets), len(regions), 4), dtype=np.int32)
    report: list[SkippedRegion] = []
    reference_latent = _to_latent(reference, vae_scale_factor)
    targets_latent = _to_latent(targets, vae_scale_factor)
    for frame, target in enumerate(targets_latent):
        for number, (region, points) in enumerate(zip(regions, indices, strict=True)):
            affine, rect, reason = _plan_region(reference_latent[points], target[points], latent_size)
            if affine is None:
                report.append(SkippedRegion(frame, region, reason))
            else:
                affines[frame, number], rects[frame, number] = affine, rect
    return EditPlan(affines, rects, report)


def checked_regions(regions: Iterable[str]) -> tuple[str, ...]:
    """Return regions as a tuple, whatever they come in: options are keys of caches.

    Raises: PoseError for a region that does not exist or is named twice, and for a string, whose letters would
        be taken for regions.
    """
    if isinstance(regions, str):
        raise PoseError(f"regions are {regions!r}, one name", f"give several, or one as ({regions!r},)")
    chosen = tuple(regions)
    if unknown := sorted({*chosen} - {*REGIONS}):
        raise PoseError(f"unknown region {unknown[0]!r}", f"choose of {', '.join(REGIONS)}")
    if len({*chosen}) < len(chosen):
        raise PoseError(f"a region is named twice: {', '.join(chosen)}", "name each once")
    return chosen


def _plan_region(
    reference: np.ndarray, target: np.ndarray, latent_size: tuple[int, int]
) -> tuple[np.ndarray | None, tuple[int, int, int, int], str]:
    """Return the affine map and rectangle of one region, or None, an empty rectangle and the reason."""
    seen = target[:, 2] >= CONFIDENCE_THRESHOLD
    shared = seen & (reference[:, 2] >= CONFIDENCE_THRESHOLD)
    affine, reason = fit_affine_with_reason(reference[shared, :2], target[shared, :2])
    if affine is None:
        return None, (0, 0, 0, 0), reason
    rect = _bounding_rect(target[seen, :2], latent_size)
    if rect[0] >= rect[2] or rect[1] >= rect[3]:
        return None, (0, 0, 0, 0), "the region lies outside the picture"
    return affine, rect, ""


def _to_latent(keypoints: np.ndarray, vae_scale_factor: int) -> np.ndarray:
    """Convert picture pixels to latent pixels by pixel centres: u = (x + 0.5)/s - 0.5; confidences stay."""
    latent = keypoints.copy()
    latent[..., :2] = (latent[..., :2] + 0.5) / vae_scale_factor - 0.5
    return latent


def _bounding_rect(points: np.ndarray, latent_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 of whole pixels around the points, half open, clipped; x0 >= x1 or y0 >= y1 if empty."""
    height, width = latent_size
    x0, y0 = np.maximum(np.floor(points.min(axis=0)), 0)
    x1, y1 = np.minimum(np.ceil(points.max(axis=0)) + 1, (width, height))
    return int(x0), int(y0), int(x1), int(y1)


def _checked_keypoints(reference: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reference, targets = np.asarray(reference, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    expected = (NUM_KEYPOINTS, 3)
    if reference.shape != expected or targets.ndim != 3 or targets.shape[1:] != expected:
        raise ShapeError(
            f"keypoints of shapes {reference.shape} and {targets.shape}",
            hint=f"give one reference pose {expected} and target poses (N, {NUM_KEYPOINTS}, 3)",
        )
    return reference, targets


def _check_geometry(canvas: tuple[int, int], vae_scale_factor: int, latent_size: tuple[int, int]) -> None:
    fitting = (canvas[0] // vae_scale_factor, canvas[1] // vae_scale_factor)
    if tuple(latent_size) != fitting or min(fitting) < 1:
        raise ShapeError(
            f"a picture of {canvas[0]}x{canvas[1]} at {vae_scale_factor} pixels per latent pixel has a latent of "
            f"{fitting[0]}x{fitting[1]}, not {latent_size[0]}x{latent_size[1]}",
            hint="scale the poses to the rendered size first: PoseSequence.resized(height, width)",
        )
