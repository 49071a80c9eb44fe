"""The process that reads a client's pose file or video: a path in, a pose track or an error as JSON out.

Layer 7: run as a module by `poses_api`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

from posecrafter_rt.errors import BackendUnavailable, PoseCrafterError, PoseError, VideoError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve.poses_api import NO_DETECTOR, pose_track
from posecrafter_rt.serve.protocol import MAX_CANVAS_PX

MAX_DECODED_BYTES = 2**30  # detection holds all frames
MAX_FRAMES = 20_000
_MAX_JSON_MEMORY_BYTES = 3 * 2**30  # a small file may ask for very much


def read_track(path: Path) -> PoseSequence:
    """Poses of OpenPose JSON (`.json`) or of the person in a video.

    Raises: PoseError, VideoError, BackendUnavailable.
    """
    poses = _read_json(path) if path.suffix == ".json" else _read_video(path)
    if len(poses) > MAX_FRAMES:
        raise PoseError(f"{len(poses)} frames are too many", f"send {MAX_FRAMES} at most")
    if max(poses.canvas) > MAX_CANVAS_PX:
        height, width = poses.canvas
        raise PoseError(f"a canvas of {width}x{height} pixels is too large", f"{MAX_CANVAS_PX} a side at most")
    return poses


def _read_json(path: Path) -> PoseSequence:
    from posecrafter_rt.poses.openpose_json import read_openpose

    try:
        return read_openpose(path, allow_missing=True)
    except MemoryError as error:
        raise PoseError("the file asks for too much memory", "send a shorter one") from error


def _read_video(path: Path) -> PoseSequence:
    from posecrafter_rt.poses.extract import extract_poses
    from posecrafter_rt.video_io import stream_video

    frames, _ = stream_video(path)
    num_bytes = 0
    for frame in frames:
        num_bytes += frame.nbytes
        if num_bytes > MAX_DECODED_BYTES:
            raise VideoError("the video is too long or too large", "cut it, or scale it down to 640 pixels")
    return extract_poses(path)


def main(path: Path) -> int:
    """Print the answer; returns the exit status."""
    with suppress(AttributeError, OSError):
        os.nice(10)  # whoever is being rendered goes first
    if path.suffix == ".json":  # detectors reserve far more than they use
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_JSON_MEMORY_BYTES, _MAX_JSON_MEMORY_BYTES))
    try:
        answer, status = pose_track(read_track(path)), 0
    except PoseCrafterError as error:
        message = str(error).replace(str(path), "the file")  # where it lies here is nobody's business
        answer, status = (
            {"message": message, "hint": error.hint},
            NO_DETECTOR if isinstance(error, BackendUnavailable) else 1,
        )
    sys.stdout.write(json.dumps(answer))
    return status


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
