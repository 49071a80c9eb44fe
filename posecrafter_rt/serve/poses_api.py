"""Turn a client's pose file or video into a pose track, in a process of its own so that rendering goes on.

Layer 7: asyncio; `pose_worker.py` is the process.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import IO, Any

import anyio

from posecrafter_rt.atomic import means_full
from posecrafter_rt.config import temporary_files_in
from posecrafter_rt.errors import BackendUnavailable, PoseCrafterError, PoseError
from posecrafter_rt.poses._extract_worker import DETECTORS
from posecrafter_rt.poses.keypoints import DEFAULT_FPS, PoseSequence
from posecrafter_rt.serve.options import MAX_POSE_FILE_BYTES, MAX_VIDEO_BYTES

NO_DETECTOR = 3  # exit status of the worker; 1 means that something is wrong with the file
_TIMEOUT_S = 600.0
_UPLOAD_TIMEOUT_S = 300.0  # no other file is read during an upload
_LOGGED_BYTES = 4096  # of what a worker says that fails
_WORKER = "import sys; sys.path[:] = {path!r}; from posecrafter_rt.serve.pose_worker import main; sys.exit(main())"
_log = logging.getLogger(__name__)


class TooLarge(PoseCrafterError):
    """A body is larger than its limit."""


class NotSaved(PoseCrafterError):
    """The server cannot keep a body: its disk is full, or fails."""


class Left(Exception):
    """The client that wanted the poses has left."""


class Busy(PoseCrafterError):
    """Another file is being read."""


def has_pose_extraction() -> bool:
    """Whether a detector's package is installed."""
    return any(importlib.util.find_spec(package) is not None for package in DETECTORS.values())


def pose_track(poses: PoseSequence) -> dict[str, Any]:
    """Return poses as JSON: fps, canvas, num_frames, and keypoints as base64 of float32 (n, 134, 3), little-endian."""
    return {"fps": poses.fps or DEFAULT_FPS, "canvas": list(poses.canvas), "num_frames": len(poses),
            "keypoints": base64.b64encode(poses.keypoints.astype("<f4").tobytes()).decode()}  # fmt: skip


class PoseReader:
    """Reads what clients send, one at a time."""

    def __init__(self) -> None:
        self._is_busy = False

    async def read(
        self, content_type: str, num_bytes: int, body: AsyncIterator[bytes], leave: Callable[[], Awaitable[None]]
    ) -> bytes:
        """Read a body, and return its track as JSON.

        content_type: `application/json`, or `video/...`. num_bytes: what the client says that the body has; 0 if it does
            not say. leave: called after the body; returns when the client leaves.

        Raises: PoseError for what is no pose file or shows nobody, and with a VideoError's message; TooLarge; Busy;
            BackendUnavailable for a video if no detector is installed; NotSaved; Left.
        """
        kind = content_type.partition(";")[0].strip().lower()
        if kind == "application/json":
            name, limit = "poses.json", MAX_POSE_FILE_BYTES
        elif kind.startswith("video/"):
            name, limit = "video", MAX_VIDEO_BYTES
            if not has_pose_extraction():
                raise BackendUnavailable("no pose detector is installed", "pip install --no-deps rtmlib")
        else:
            raise PoseError(f"a body of type {kind!r:.60}", "send OpenPose JSON as application/json, or video/mp4")
        _check_size(num_bytes, limit)  # before anything of it is taken
        if self._is_busy:
            raise Busy("another file is being read", "try again in a moment")
        self._is_busy = True
        try:
            with tempfile.TemporaryDirectory(prefix="posecrafter-") as folder:
                path = Path(folder) / name
                try:
                    with anyio.fail_after(_UPLOAD_TIMEOUT_S):
                        await _save(body, path, limit)
                except TimeoutError as error:
                    raise PoseError(
                        f"it took more than {_UPLOAD_TIMEOUT_S:g} s to come", "send a smaller one"
                    ) from error
                return await _work(path, leave)
        except OSError as error:
            _log.warning("a client's file could not be read: %s", error)
            if means_full(error):
                raise NotSaved(
                    "the server has no space for the file", "free some there, or send a smaller one"
                ) from error
            raise NotSaved("the server cannot take the file", "the server's log says why") from error
        finally:
            self._is_busy = False


async def _save(body: AsyncIterator[bytes], path: Path, limit: int) -> None:
    size = 0
    with path.open("wb") as file:
        async for part in body:
            size += len(part)
            _check_size(size, limit)
            file.write(part)


def _check_size(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise TooLarge(f"more than {limit // 2**20} MiB", "send a shorter one")


async def _work(path: Path, leave: Callable[[], Awaitable[None]]) -> bytes:
    """Run the worker and return its answer. Raises: PoseError or BackendUnavailable as it reports; Left."""
    environment = temporary_files_in(path.parent)  # deleted with the request, even if the process is killed
    with tempfile.TemporaryFile(dir=path.parent) as complaints:  # a pipe's reader would keep all of them in memory
        # Not -m: that would take modules from the server's working directory first.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _WORKER.format(path=sys.path), str(path), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=complaints, env=environment)  # fmt: skip
        working, leaving = asyncio.create_task(process.communicate()), asyncio.ensure_future(leave())
        try:
            await asyncio.wait((working, leaving), timeout=_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                raise Left
            if not working.done():
                raise PoseError(f"reading it took more than {_TIMEOUT_S:g} s", "send a shorter one")
            answer, _ = working.result()
        finally:
            leaving.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
        status = await process.wait()
        if status == 0:
            return answer
        raise _reported(answer, status, complaints)


def _reported(answer: bytes, status: int, complaints: IO[bytes]) -> PoseCrafterError:
    """Return the error that a worker reports. If it reports none, the end of its complaints is logged."""
    try:
        report = json.loads(answer)
    except ValueError:
        complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - _LOGGED_BYTES))
        said = complaints.read().decode(errors="replace").strip()
        _log.error("reading a client's file failed with status %d: %s", status, said or "it said nothing")
        return PoseError(f"reading it failed with status {status}", "the server's log says more; try a smaller one")
    kind = BackendUnavailable if status == NO_DETECTOR else PoseError
    return kind(report["message"], report["hint"])
