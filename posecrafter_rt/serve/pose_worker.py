"""The process that reads a client's pose file or video: a path in, a pose track or an error as JSON out.

Layer 7: `main` is run by `poses_api`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from posecrafter_rt.errors import BackendUnavailable, PoseCrafterError, PoseError, VideoError
from posecrafter_rt.poses.keypoints import PoseSequence, keypoint_name
from posecrafter_rt.serve.poses_api import NO_DETECTOR, pose_track
from posecrafter_rt.serve.protocol import MAX_CANVAS_PX, MAX_COORDINATE

MAX_FRAMES = 20_000
MAX_FRAME_PX = 4096 * 2304
MAX_ASPECT = 16  # a narrow picture is enlarged a lot before detection
_MAX_MORE_BYTES = 2 * 2**30  # of address space: a small file may ask for a lot
_STATM = Path("/proc/self/statm")


def read_track(path: Path) -> PoseSequence:
    """Read the poses of OpenPose JSON (`.json`) or of the person in a video.

    Raises: PoseError, VideoError, BackendUnavailable.
    """
    poses = _read_json(path) if path.suffix == ".json" else _read_video(path)
    if len(poses) > MAX_FRAMES:
        raise PoseError(f"{len(poses)} frames are too many", f"send {MAX_FRAMES} at most")
    if max(poses.canvas) > MAX_CANVAS_PX:
        height, width = poses.canvas
        raise PoseError(f"a canvas of {width}x{height} pixels is too large", f"{MAX_CANVAS_PX} a side at most")
    far = np.argwhere(np.abs(poses.keypoints[..., :2]) > MAX_COORDINATE)
    if len(far):
        frame, keypoint, _ = far[0].tolist()
        raise PoseError(
            f"frame {frame}: the {keypoint_name(keypoint)} is too far from the picture",
            f"coordinates are {MAX_COORDINATE:g} at most",
        )
    return poses


def _read_json(path: Path) -> PoseSequence:
    from posecrafter_rt.poses.openpose_json import read_openpose

    with _bounded_memory():
        return read_openpose(path, allow_missing=True)


def _read_video(path: Path) -> PoseSequence:
    """Decode twice. Only the first pass has bounded memory, because a detector reserves far more than it uses."""
    from posecrafter_rt.poses.extract import extract_poses
    from posecrafter_rt.video_io import stream_video

    with _bounded_memory():
        frames, _ = stream_video(path)
        for number, frame in enumerate(frames, start=1):
            height, width = frame.shape[:2]
            if max(height, width) > MAX_ASPECT * min(height, width):
                raise VideoError(
                    f"frames of {width}x{height} pixels are too narrow", f"cut it to at most {MAX_ASPECT}:1"
                )
            if height * width > MAX_FRAME_PX:
                raise VideoError(f"frames of {width}x{height} pixels are too large", "scale it down to 640 pixels")
            if number > MAX_FRAMES:
                raise VideoError(f"more than {MAX_FRAMES} frames are too many", "cut it, or send it in parts")
    return extract_poses(path)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process take at most 2 GiB more than it has, if the system tells how much that is (Linux does).

    Raises: PoseError if that is not enough.
    """
    if not _STATM.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(_STATM.read_text().split()[0]) * resource.getpagesize() + _MAX_MORE_BYTES
    limit = min([wanted, *(bound for bound in before if bound != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except MemoryError as error:
        raise PoseError("the file asks for too much memory", "send a shorter or smaller one") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> int:
    """Read the file that the first argument names, print the answer and return the exit status."""
    path = Path(sys.argv[1])
    with suppress(AttributeError, OSError):
        os.nice(10)  # rendering goes first
    try:
        answer, status = pose_track(read_track(path)), 0
    except PoseCrafterError as error:
        message = str(error).replace(str(path), "the file")  # clients need not know where it lies
        answer, status = (
            {"message": message, "hint": error.hint},
            NO_DETECTOR if isinstance(error, BackendUnavailable) else 1,
        )
    sys.stdout.write(json.dumps(answer))
    return status
