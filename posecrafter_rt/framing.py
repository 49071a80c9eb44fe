"""Fit frames and their keypoints to a size; lay frames out in contact sheets and side by side.

Layer 1: OpenCV and the keypoint layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from posecrafter_rt.errors import PoseError, ShapeError
from posecrafter_rt.poses.keypoints import PoseSequence

MAX_COLUMNS = 8
TILE_HEIGHT_PX = (128, 256)
_STRIP_PX, _GAP_PX, _FONT_SCALE = 22, 4, 0.45


class CoverTransform(NamedTuple):
    """Maps source to destination pixels, centres at integers: x' = (x - offset_x + 0.5) * scale_x - 0.5, y likewise."""

    scale_x: float
    scale_y: float
    offset_x: int
    offset_y: int


def cover_transform(src_size: tuple[int, int], dst_size: tuple[int, int]) -> CoverTransform:
    """Return how a picture is scaled to cover another size: it is scaled until it fills it, then cropped at the centre.

    The crop runs along whole source pixels, so the two scales may differ slightly, by rounding of half a pixel.
    Args: src_size, dst_size: (height, width) in pixels.
    Raises: ShapeError if a side is not positive.
    """
    if min(*src_size, *dst_size) < 1:
        raise ShapeError(
            f"a picture of {size_text(src_size)} cannot be fitted to {size_text(dst_size)}", "give sides of 1 or more"
        )
    scale = max(dst_size[0] / src_size[0], dst_size[1] / src_size[1])
    kept = [min(src, max(1, round(dst / scale))) for src, dst in zip(src_size, dst_size, strict=True)]
    return CoverTransform(
        scale_x=dst_size[1] / kept[1],
        scale_y=dst_size[0] / kept[0],
        offset_x=(src_size[1] - kept[1]) // 2,
        offset_y=(src_size[0] - kept[0]) // 2,
    )


def transform_keypoints(poses: PoseSequence, size: tuple[int, int]) -> PoseSequence:
    """Move poses as `resize_to` moves the pixels of their frames when it fits these to a size.

    Args: poses: N poses; their canvas is the frames' size before. size: (height, width) in pixels.
    Returns: N poses on a canvas of that size; cropped points lie outside it; missing points stay (0, 0, 0).
    Raises: ShapeError if a side is not positive; PoseError for anything but a PoseSequence.
    """
    if not isinstance(poses, PoseSequence):
        raise PoseError(f"poses are a {type(poses).__name__}", "give a PoseSequence: PoseSequence(keypoints, canvas)")
    scale_x, scale_y, offset_x, offset_y = cover_transform(poses.canvas, size)
    moved = poses.keypoints.astype(np.float64)
    moved[..., :2] = (moved[..., :2] - (offset_x, offset_y) + 0.5) * (scale_x, scale_y) - 0.5
    return replace(poses, keypoints=moved, canvas=size)


def check_one_pose_a_frame(video: Path | str, num_frames: int, num_poses: int) -> None:
    """Raise PoseError unless a video has as many frames as there are poses."""
    if num_frames != num_poses:
        raise PoseError(f"{video} has {num_frames} frames but there are {num_poses} poses",
                        "extract the poses from this very video")  # fmt: skip


def have_one_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes have one aspect ratio, to 2 % or one pixel of the smaller one."""
    across, down = size[1] * other[0], size[0] * other[1]  # equal if the aspect ratios are
    return abs(across - down) <= max(*size, *other, 0.02 * max(across, down))


def check_canvas(video: Path | str, size: tuple[int, int], canvas: tuple[int, int]) -> None:
    """Raise PoseError unless a canvas has the shape of a video's frames (see `have_one_shape`).

    It differs, for example, if the video was rotated after its poses were extracted.
    Args: size, canvas: (height, width) in pixels.
    """
    if not have_one_shape(size, canvas):
        raise PoseError(f"the frames of {video} are {size_text(size)}, of another shape than their poses' canvas of {size_text(canvas)}",
                        "extract the poses from this very video; `poses preview --video` shows both")  # fmt: skip


def resize_to(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fit frames to a size: scale them to cover it and crop around the centre (see `cover_transform`).

    Frames are scaled down by area averaging, up by cubic interpolation.
    Args: frames: uint8 (N, H, W, 3) or (H, W, 3). size: (height, width) in pixels.
    Returns: uint8 of that size, same number of axes; a single frame that has the size already is returned as it is.
    Raises: ShapeError for frames of another shape or type, or a side that is not positive.
    """
    if frames.ndim == 4:
        return np.stack([resize_to(frame, size) for frame in frames]) if len(frames) else np.empty((0, *size, 3), "u1")
    check_frame(frames)
    transform = cover_transform(frames.shape[:2], size)
    if frames.shape[:2] == tuple(size):
        return frames
    rows = slice(transform.offset_y, transform.offset_y + round(size[0] / transform.scale_y))
    columns = slice(transform.offset_x, transform.offset_x + round(size[1] / transform.scale_x))
    shrinks = min(transform.scale_x, transform.scale_y) < 1
    return _resize(frames[rows, columns], size, shrinks)


Frames = np.ndarray | Sequence[np.ndarray]
"""uint8 RGB (N, H, W, 3), or a list of (H, W, 3)."""


def shown_in_sheet(num_frames: int) -> np.ndarray:
    """Return which frames of a clip a contact sheet shows: int64, at most 8, evenly from the first to the last.

    A sheet of those frames alone shows all of them, so a long clip's other frames need not be kept.
    """
    return np.unique(np.linspace(0, num_frames - 1, min(num_frames, MAX_COLUMNS)).round().astype(np.int64))


def contact_sheet(rows: Sequence[tuple[str, Frames] | np.ndarray]) -> np.ndarray:
    """Show clips in rows: each row shows up to 8 evenly sampled frames, below the clip's name.

    Args: rows: (name, frames) each, the name in ASCII; or an array of frames alone, which gets no name.
    Returns: uint8 (h, w, 3) RGB; frames are scaled to a height of 128 to 256 pixels.
    Raises: ShapeError without rows, for a row without frames, or for frames of another shape or type.
    """
    named = [row if isinstance(row, tuple) else ("", row) for row in rows]
    if not named or not all(len(frames) for _, frames in named):
        raise ShapeError(
            "a contact sheet needs rows, and each row at least one frame", "leave out clips without frames"
        )
    tallest = max(frame.shape[0] for _, frames in named for frame in frames)
    height = _tile_height(tallest)
    strips = []
    for name, frames in named:
        shown = shown_in_sheet(len(frames))
        tiles = [np.pad(_scale_to_height(frames[i], height), [(0, 0), (0, _GAP_PX), (0, 0)]) for i in shown]
        strips.append(_captioned(name, np.concatenate(tiles, axis=1)))
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate([np.pad(strip, [(0, _GAP_PX), (0, width - strip.shape[1]), (0, 0)]) for strip in strips])


def tile_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) in pixels at which a contact sheet shows frames of one size."""
    height = _tile_height(size[0])
    return height, _scaled_width(size, height)


def side_by_side(*clips: np.ndarray, labels: Sequence[str] | None = None) -> np.ndarray:
    """Join clips into one, next to each other, scaled to the tallest one's height.

    Args: clips: uint8 (N, H, W, 3) RGB each, all of N frames. labels: one name per clip, shown above it; ASCII.
    Returns: uint8 (N, h, w, 3).
    Raises: ShapeError for clips of different lengths, another shape or type, none, or labels that do not match.
    """
    if not clips or len({len(clip) for clip in clips}) != 1 or (labels is not None and len(labels) != len(clips)):
        lengths = ", ".join(str(len(clip)) for clip in clips)
        raise ShapeError(
            f"clips of {lengths or 'no'} frames and {'no' if labels is None else len(labels)} labels cannot be joined",
            hint="give clips of one length, and as many labels as clips",
        )
    height = max(clip.shape[1] for clip in clips)
    joined = []
    for frames in zip(*clips, strict=True):
        tiles = [_scale_to_height(frame, height) for frame in frames]
        if labels is not None:
            tiles = [_captioned(label, tile) for label, tile in zip(labels, tiles, strict=True)]
        joined.append(np.concatenate(tiles, axis=1))
    return np.stack(joined)


def check_frame(frame: np.ndarray) -> None:
    """Raise ShapeError unless the array is one frame: uint8 (H, W, 3), not empty."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ShapeError(f"a frame of shape {frame.shape}, {frame.dtype}", hint="frames are uint8 RGB (H, W, 3)")


def size_text(shape: Sequence[int]) -> str:
    """Return a size as text for messages, height first: `480x640`."""
    return f"{shape[0]}x{shape[1]}"


def _resize(frame: np.ndarray, size: tuple[int, int], shrinks: bool) -> np.ndarray:
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(frame), (size[1], size[0]), interpolation=method)


def _scale_to_height(frame: np.ndarray, height: int) -> np.ndarray:
    check_frame(frame)
    if frame.shape[0] == height:
        return frame
    return _resize(frame, (height, _scaled_width(frame.shape, height)), shrinks=height < frame.shape[0])


def _scaled_width(shape: Sequence[int], height: int) -> int:
    return max(1, round(shape[1] * height / shape[0]))


def _tile_height(tallest: int) -> int:
    return min(max(tallest, TILE_HEIGHT_PX[0]), TILE_HEIGHT_PX[1])


def _captioned(text: str, picture: np.ndarray) -> np.ndarray:
    """Put a dark strip with a name above a picture, widened if the name is longer; without a name, change nothing."""
    if not text:
        return picture
    (text_width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _FONT_SCALE, 1)
    width = max(picture.shape[1], text_width + 2 * _GAP_PX)
    strip = np.full((_STRIP_PX, width, 3), 32, dtype=np.uint8)
    origin, colour = (_GAP_PX, _STRIP_PX - 7), (230, 230, 230)
    cv2.putText(strip, text, origin, cv2.FONT_HERSHEY_SIMPLEX, _FONT_SCALE, colour, 1, cv2.LINE_AA)
    return np.concatenate([strip, np.pad(picture, [(0, 0), (0, width - picture.shape[1]), (0, 0)])])
