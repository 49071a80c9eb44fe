"""Read and write OpenPose JSON: one file of one or many frames, or a folder with a file per frame.

Layer 1: numpy only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posecrafter_rt.atomic import atomic_path, natural_key, refuse_overwrite
from posecrafter_rt.errors import PoseError
from posecrafter_rt.poses.keypoints import (
    BODY,
    FACE,
    FEET,
    LEFT_HAND,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    PoseSequence,
    keypoint_name,
    scale_keypoints,
)
from posecrafter_rt.poses.layouts import BODY_25_BODY, BODY_25_FEET
from posecrafter_rt.poses.tracking import follow_person

# JSON key -> (our points, how many points a file may list under it).
_PARTS = {
    "pose_keypoints_2d": (BODY, (18, 25)),
    "face_keypoints_2d": (FACE, (68, 70)),
    "hand_left_keypoints_2d": (LEFT_HAND, (21,)),
    "hand_right_keypoints_2d": (RIGHT_HAND, (21,)),
    "foot_keypoints_2d": (FEET, (6,)),
}
# If most coordinates of a file are at most this, they are fractions of the canvas: a few points may lie far outside the
# picture, and no pose in pixels is this small.
_LARGEST_FRACTION = 2.0
# Of the fractions of a picture, few are negative: those of points outside it. If they run from -1 to 1, half are.
_MOST_NEGATIVE = 0.25
_SMALLEST_PIXEL_CANVAS = 16
_LARGEST_NUMBER = 1e9
_NOBODY: dict[str, Any] = {"people": []}


@dataclass(frozen=True)
class _Frame:
    people: np.ndarray  # float32 (P, 134, 3), coordinates as in the file
    canvas: tuple[int, int] | None


def read_openpose(
    path: str | os.PathLike[str],
    *,
    person: int | None = None,
    canvas: tuple[int, int] | None = None,
    allow_missing: bool = False,
) -> PoseSequence:
    """Read poses of one person from OpenPose JSON.

    Accepted are `{"people": [...]}`, a list of such frames, `{"frames": [...]}`, or a folder with one frame, or a list
    of them, per file in the order of the numbers in their names; there an empty list is a frame without people. A
    person has 18 or 25 body, 68 or 70 face, 21 hand and 6 foot points; a part may be null, empty or absent.
    Coordinates are pixels, or fractions of the canvas if most of them are that small. A point at exactly (0, 0) or
    (-1, -1) is missing, whatever its confidence: DWPose and others mark missing points so, in pixels and in fractions.
    In our own files, which say that they are in pixels, it is an ordinary point.
    Args:
        path: file or folder.
        person: which of several people, counted from 0 in the first frame that shows any; None takes the largest.
        canvas: (height, width) in pixels, for files that do not say (`canvas_height`, `canvas_width`).
        allow_missing: a frame without the person is all zeros instead of an error.
    Returns: N frames on the file's canvas, else the first canvas that a frame states, else `canvas`; frames on other
        canvases are scaled to it.
    Raises: PoseError if a file is missing or damaged, holds NaN or infinity, states no canvas, has coordinates from -1
        to 1, or has a frame without the person.
    """
    path = Path(path)
    documents, header, places = _read_documents(path)
    frames = [_parse_frame(document, place) for document, place in zip(documents, places, strict=True)]
    if not frames:
        raise PoseError(f"{path}: it holds 0 frames", hint="a pose file needs at least one frame")
    base = _parse_canvas(header, str(path)) or next((f.canvas for f in frames if f.canvas), None) or canvas
    if base is None:
        raise PoseError(
            f"{path}: it does not say how large the picture is",
            hint="write a file that does: posecrafter-rt poses edit FILE -o NEW.json --canvas HEIGHTxWIDTH",
        )
    is_ours = header.get("coordinates") == "pixels"
    if not is_ours:
        for frame in frames:
            for missing in (0, -1):
                frame.people[(frame.people[..., :2] == missing).all(axis=-1)] = 0
    in_pixels = is_ours or not _is_normalised(frames, base, path)
    people = []
    for frame in frames:
        own = frame.canvas or base
        keypoints = frame.people if in_pixels else frame.people * np.array([own[1], own[0], 1.0], np.float32)
        people.append(keypoints if own == base else scale_keypoints(keypoints, own, base))
    tracked = follow_person(people, source=str(path), person=person, allow_missing=allow_missing)
    return PoseSequence(tracked, base, _parse_fps(header, str(path)))


def write_openpose(poses: PoseSequence, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write all frames to one JSON file, atomically; missing folders are made.

    Every entry of `frames` is an OpenPose object. Coordinates are pixels with 2 decimals, confidences have 3. A part
    without any point is an empty list.
    Raises:
        OutputExists: the file is there and `force` is false.
        PoseCrafterError: the folder or the file cannot be written.
        DiskFull: no space.
    """
    refuse_overwrite(path, force)
    height, width = poses.canvas
    document = {
        "format": "openpose",
        "coordinates": "pixels",
        "canvas_width": width,
        "canvas_height": height,
        "fps": poses.fps,
        "frames": [{"people": [_person_entry(keypoints)]} for keypoints in poses],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False), encoding="utf-8")


def _person_entry(keypoints: np.ndarray) -> dict[str, list[float]]:
    rounded = np.round(keypoints.astype(np.float64), 2)
    rounded[:, 2] = np.round(keypoints[:, 2].astype(np.float64), 3)
    entry = {}
    for key, (points, _) in _PARTS.items():
        part = rounded[points].ravel()
        # 12.0 is written as 12, because a quarter of the file is zeros of missing points.
        entry[key] = [int(value) if value == int(value) else value for value in part.tolist()] if part.any() else []
    return entry


def _read_documents(path: Path) -> tuple[Sequence[Any], dict[str, Any], list[str]]:
    """Return the frames' JSON objects, the object around them (for canvas and fps), and each frame's place as text."""
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.suffix.lower() == ".json" and file.name[0] != "."),
                       key=natural_key)  # fmt: skip
        if not files:
            raise PoseError(f"{path}: no .json file in this folder", hint="OpenPose writes one file per frame")
        contents = [(file, _load(file)) for file in files]
        named = [(one, str(file)) for file, content in contents
                 for one in (content or [_NOBODY] if isinstance(content, list) else [content])]  # fmt: skip
        return [one for one, _ in named], {}, [place for _, place in named]
    document = _load(path)
    frames, header = None, document if isinstance(document, dict) else {}
    if isinstance(document, list):
        frames = document
    elif isinstance(header.get("frames"), list):
        frames = header["frames"]
    elif "people" in header:
        frames = [document]
    if frames is not None:
        return frames, header, [f"{path}: frame {index}" for index in range(len(frames))]
    raise PoseError(
        f"{path}: this JSON is not poses: {_kind(document)}",
        hint='expected {"people": [...]}, a list of those, or {"frames": [...]}',
    )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise PoseError(f"{path}: there is no such file", hint="check the path") from error
    except OSError as error:
        raise PoseError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error
    except json.JSONDecodeError as error:
        raise PoseError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            hint="the file may be cut short; write or download it again",
        ) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise PoseError(f"{path}: not a JSON text file: {error}", hint="poses are read from OpenPose JSON") from error


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {sorted(value)[:6]}"
    return "null" if value is None else f"a {type(value).__name__}"


def _parse_frame(document: Any, where: str) -> _Frame:
    people = document.get("people") if isinstance(document, dict) else None
    if not isinstance(people, list):
        raise PoseError(f'{where}: no list of "people" in {_kind(document)}', hint='expected {"people": [...]}')
    parsed = np.zeros((len(people), NUM_KEYPOINTS, 3), np.float32)
    for index, entry in enumerate(people):
        if not isinstance(entry, dict):
            raise PoseError(f"{where}: person {index} is {_kind(entry)}", hint='expected {"pose_keypoints_2d": ...}')
        _parse_person(entry, where, parsed[index])
    return _Frame(parsed, _parse_canvas(document, where))


def _parse_person(entry: dict[str, Any], where: str, out: np.ndarray) -> None:
    for key, (points, allowed) in _PARTS.items():
        values = entry.get(key)
        if not values:
            continue
        if not isinstance(values, list) or len(values) not in [3 * count for count in allowed]:
            size = f"{len(values)} values" if isinstance(values, list) else _kind(values)
            expected = " or ".join(str(3 * count) for count in allowed)
            raise PoseError(f"{where}: {key} has {size}", hint=f"expected {expected}: x, y, confidence of each point")
        triples = [
            _parse_point(values[i : i + 3], where, _point_name(key, points, i // 3)) for i in range(0, len(values), 3)
        ]
        part = np.array(triples, np.float32)
        if len(part) == 25:
            out[FEET] = part[BODY_25_FEET]
            part = part[list(BODY_25_BODY)]
        # OpenPose lists the pupils as face points 68 and 69.
        out[points] = part[: points.stop - points.start]


def _point_name(key: str, points: slice, index: int) -> str:
    """Return a point's name for messages; pupils, and body points that BODY_25 numbers differently, get their index."""
    num_same_in_all = 8 if key == "pose_keypoints_2d" else points.stop - points.start
    return keypoint_name(points.start + index) if index < num_same_in_all else f"{key} point {index}"


def _parse_point(values: list[Any], where: str, name: str) -> tuple[float, float, float]:
    if values[0] is None or values[1] is None or values[2] is None:
        return 0.0, 0.0, 0.0
    for value, column in zip(values, ("x", "y", "confidence"), strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PoseError(f"{where}, {name}: {column} is {value!r}", hint="expected a number")
        # Written so that NaN fails, too.
        if not abs(value) <= _LARGEST_NUMBER:
            raise PoseError(f"{where}, {name}: {column} is {value!r:.20}", hint="write 0, 0, 0 for a missing point")
    # Confidences are peaks of heat maps, which can slightly exceed 1.
    confidence = min(max(float(values[2]), 0.0), 1.0)
    return (float(values[0]), float(values[1]), confidence) if confidence > 0 else (0.0, 0.0, 0.0)


def _parse_canvas(document: dict[str, Any], where: str) -> tuple[int, int] | None:
    sides = document.get("canvas_height"), document.get("canvas_width")
    if sides == (None, None):
        return None
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, (int, float)) or not 1 <= side <= 1e6 or side != int(side):
            raise PoseError(
                f"{where}: the canvas is {sides[1]!r} wide and {sides[0]!r} high",
                hint="expected whole pixels, at least 1",
            )
    return int(sides[0]), int(sides[1])  # type: ignore[arg-type]


def _parse_fps(document: dict[str, Any], where: str) -> float | None:
    fps = document.get("fps")
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not (math.isfinite(fps) and fps > 0):
        raise PoseError(f"{where}: fps is {fps!r}", hint="expected a positive number, or null")
    return float(fps)


def _is_normalised(frames: list[_Frame], canvas: tuple[int, int], path: Path) -> bool:
    points = np.concatenate([frame.people.reshape(-1, 3) for frame in frames])
    coordinates = points[points[:, 2] > 0, :2]
    if coordinates.size == 0 or min(canvas) < _SMALLEST_PIXEL_CANVAS:
        return False
    if np.median(np.abs(coordinates)) > _LARGEST_FRACTION:
        return False
    if (share := np.mean(coordinates < 0)) >= _MOST_NEGATIVE:
        raise PoseError(
            f"{path}: {share:.0%} of the coordinates are negative, so they do not run from 0 to 1",
            hint="write them in pixels: OpenPose's --keypoint_scale 0",
        )
    return True
