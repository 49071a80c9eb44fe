"""Whole-body keypoints: the 134-point layout and `PoseSequence`.

Layer 1: numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike

from posecrafter_rt.errors import PoseError

NUM_KEYPOINTS = 134
BODY = slice(0, 18)
FEET = slice(18, 24)
FACE = slice(24, 92)
LEFT_HAND = slice(92, 113)
RIGHT_HAND = slice(113, 134)
CONFIDENCE_THRESHOLD = 0.3
DEFAULT_FPS = 25.0  # of poses that state no rate

_BODY_NAMES = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
    "right eye", "left eye", "right ear", "left ear",
)  # fmt: skip
_FEET_NAMES = ("left big toe", "left small toe", "left heel", "right big toe", "right small toe", "right heel")


def keypoint_name(index: int) -> str:
    """Return a keypoint's name for messages: `"left wrist"`, `"face 30"`, `"right hand 4"`."""
    if index < BODY.stop:
        return _BODY_NAMES[index]
    if index < FEET.stop:
        return _FEET_NAMES[index - FEET.start]
    for part, points in (("face", FACE), ("left hand", LEFT_HAND), ("right hand", RIGHT_HAND)):
        if index < points.stop:
            return f"{part} {index - points.start}"
    raise IndexError(f"there are {NUM_KEYPOINTS} keypoints, so none has the index {index}")


def scale_keypoints(keypoints: np.ndarray, canvas: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Scale keypoints from one canvas to another, pixel centres at integers.

    x' = (x + 0.5) * W' / W - 0.5, and y likewise; confidences stay; missing points stay (0, 0, 0).
    Args:
        keypoints: float (..., 3): x, y in pixels of `canvas`, confidence.
        canvas: (height, width) in pixels that the coordinates refer to.
        size: (height, width) in pixels of the other canvas.
    Returns: float32 (..., 3), new array.
    """
    scaled = np.array(keypoints, dtype=np.float32)
    factors = np.array([size[1] / canvas[1], size[0] / canvas[0]])
    present = scaled[..., 2:] > 0
    scaled[..., :2] = np.where(present, (scaled[..., :2].astype(np.float64) + 0.5) * factors - 0.5, 0.0)
    return scaled


def copied(keypoints: ArrayLike) -> np.ndarray:
    """Return a float32 copy in which points with a masked number are missing; numpy alone would drop the mask."""
    copy = np.array(keypoints, dtype=np.float32)
    if np.ma.isMaskedArray(keypoints):
        copy[np.ma.getmaskarray(keypoints).any(axis=-1)] = 0.0
    return copy


@dataclass(frozen=True, eq=False)
class PoseSequence:
    """The poses of one person, one per video frame.

    Args:
        keypoints: (N, 134, 3): x, y in pixels of the canvas (pixel centres at integers) and confidence in 0..1.
            Copied to float32; points of confidence 0, or with a masked number, are missing: they get zeros.
        canvas: (height, width) in pixels.
        fps: frames per second, or None if unknown.
    Raises:
        PoseError: wrong shape, no frame, NaN or infinity, a confidence outside 0..1, an impossible canvas or fps.
    """

    keypoints: np.ndarray
    canvas: tuple[int, int]
    fps: float | None = None

    def __post_init__(self) -> None:
        try:
            keypoints = copied(self.keypoints)
        except (TypeError, ValueError) as error:
            raise PoseError(f"keypoints are not an array of numbers: {error}", "give (N, 134, 3) numbers") from error
        if keypoints.ndim != 3 or keypoints.shape[1:] != (NUM_KEYPOINTS, 3):
            raise PoseError(
                f"keypoints have the shape {keypoints.shape}",
                hint=f"give (frames, {NUM_KEYPOINTS}, 3): x, y in pixels and confidence",
            )
        if len(keypoints) == 0:
            raise PoseError("a pose sequence of 0 frames", hint="give at least one frame")
        _check_values(keypoints)
        keypoints[keypoints[..., 2] == 0] = 0.0
        object.__setattr__(self, "keypoints", keypoints)
        object.__setattr__(self, "canvas", _checked_canvas(self.canvas))
        if self.fps is not None:
            fps = float(self.fps)
            if not (np.isfinite(fps) and fps > 0):
                raise PoseError(f"fps is {self.fps}", hint="give a positive number, or None where it is unknown")
            object.__setattr__(self, "fps", fps)

    def __len__(self) -> int:
        return len(self.keypoints)

    def __getitem__(self, index: slice | int | np.ndarray | list[int]) -> PoseSequence:
        """Return a sequence of the chosen frames: a slice, the indices in an array or list, or the one of an int."""
        if isinstance(index, (slice, np.ndarray, list)):
            return PoseSequence(self.keypoints[index], self.canvas, self.fps)
        return PoseSequence(self.keypoints[index][np.newaxis], self.canvas, self.fps)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the frames' keypoints, float32 (134, 3)."""
        return iter(self.keypoints)

    @classmethod
    def load(
        cls, path: str | PathLike[str], *, person: int | None = None, canvas: tuple[int, int] | None = None
    ) -> PoseSequence:
        """Read OpenPose JSON: one file, or a folder with one file per frame.

        Args:
            path: file or folder.
            person: which of several people in the first frame, counted from 0; None takes the largest.
            canvas: (height, width) in pixels, for files that do not say.
        Raises: PoseError if the file is missing, damaged or not a pose, or if a frame does not show the person.
        """
        from posecrafter_rt.poses.openpose_json import read_openpose

        return read_openpose(path, person=person, canvas=canvas)

    def save(self, path: str | PathLike[str], *, force: bool = False) -> None:
        """Write one OpenPose JSON file, atomically; coordinates are rounded to 2 decimals.

        Raises:
            OutputExists: the file is there and `force` is false.
            PoseCrafterError: its folder cannot be written.
            DiskFull: no space; nothing half-written is left behind.
        """
        from posecrafter_rt.poses.openpose_json import write_openpose

        write_openpose(self, path, force=force)

    def resized(self, height: int, width: int) -> PoseSequence:
        """Return the same poses on a canvas of another size: x' = (x + 0.5) * W' / W - 0.5, y likewise."""
        height, width = _checked_canvas((height, width))
        return PoseSequence(scale_keypoints(self.keypoints, self.canvas, (height, width)), (height, width), self.fps)


def _check_values(keypoints: np.ndarray) -> None:
    """Raise PoseError that names the first value that is not finite, or the first confidence outside 0..1."""
    bad = np.argwhere(~np.isfinite(keypoints))
    if len(bad):
        frame, point, column = bad[0]
        column_name, value = ("x", "y", "confidence")[column], keypoints[frame, point, column]
        raise PoseError(
            f"frame {frame}, {keypoint_name(point)}: {column_name} is {value}",
            hint="a missing keypoint is x = y = confidence = 0, never NaN",
        )
    bad = np.argwhere((keypoints[..., 2] < 0) | (keypoints[..., 2] > 1))
    if len(bad):
        frame, point = bad[0]
        raise PoseError(
            f"frame {frame}, {keypoint_name(point)}: confidence is {keypoints[frame, point, 2]}",
            hint="confidences run from 0 (missing) to 1",
        )


def _checked_canvas(canvas: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in canvas)
        is_whole = (height, width) == tuple(canvas)
    except (TypeError, ValueError) as error:
        raise PoseError(f"canvas is {canvas!r}", hint="give (height, width) in pixels") from error
    if not is_whole or height < 1 or width < 1:
        raise PoseError(f"canvas is {canvas!r}", hint="give (height, width) in whole pixels, both at least 1")
    return height, width
