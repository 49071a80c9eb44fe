"""Extract keypoints from a video, with a detector in a separate process.

Layer 1: numpy and `video_io`. The process is needed because the detectors' packages clash with ours and each other's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path

import numpy as np

from posecrafter_rt.config import onnxruntime_threads
from posecrafter_rt.errors import BackendUnavailable, PoseCrafterError, PoseError
from posecrafter_rt.machine import check_device, core_quota
from posecrafter_rt.poses import _extract_worker as worker
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence
from posecrafter_rt.poses.layouts import NUM_WHOLEBODY_POINTS, from_mediapipe, from_wholebody
from posecrafter_rt.poses.tracking import follow_person

# Detectors miss hands and faces in small pictures; on 176 x 144 video they were seen to need 576.
_DETECTION_SHORT_SIDE_PX = 576
_NUM_LOG_LINES = 20
OnFrame = Callable[[int, int, str], None]
_INSTALL_HINT = (
    "pip install --no-deps rtmlib for DWPose, or name an environment that has rtmlib or mediapipe "
    "with --python; --weights names a folder with DWPose's weights"
)


def extract_poses(
    video_path: str | PathLike[str],
    *,
    detector: str = "auto",
    weights: str | PathLike[str] | None = None,
    device: str = "cpu",
    python: str | PathLike[str] | None = None,
    person: int | None = None,
    progress: OnFrame | None = None,
) -> PoseSequence:
    """Detect one person's whole-body keypoints in every frame of a video.

    Args:
        video_path: any video that `video_io` reads.
        detector: `dwpose` (rtmlib), `mediapipe`, or `auto`: the first of the two that can run.
        weights: folder with yolox_l.onnx and dw-ll_ucoco_384.onnx, of DWPose, which `auto` then means; None lets
            rtmlib download the same DWPose and its own YOLOX. MediaPipe brings its own weights.
        device: `cpu`, or `cuda` or `cuda:1` (DWPose only).
        python: interpreter whose environment has the detector; None takes this one.
        person: which of several people in the first frame that shows any, counted from 0; None takes the largest.
        progress: called in another thread with (frames done, an estimate of the video's frames, the detector that
            runs). What it raises ends the detector, and is raised here.
    Returns: one pose per frame, in pixels of the video; a frame where the person was not found is all zeros.
    Raises:
        PoseError: nobody is in any frame, there is no such person, or the detector failed while it ran.
        BackendUnavailable: the detector cannot run; the message says why.
        PoseCrafterError: an unknown device, or weights for MediaPipe.
        VideoError: the video cannot be read.
    """
    if detector not in ("auto", *worker.DETECTORS):
        raise BackendUnavailable(f"there is no detector {detector!r}", hint="take auto, dwpose or mediapipe")
    check_device(device, "cpu or cuda")
    if weights is not None:
        if detector == "mediapipe":
            raise PoseCrafterError(f"mediapipe takes no weights, and {weights} was given", "leave one of the two out")
        detector = "dwpose"  # another one would pass over what was asked for
    from posecrafter_rt.video_io import count_frames, stream_video, video_size

    height, width = video_size(video_path)
    upscale = -(-_DETECTION_SHORT_SIDE_PX // min(height, width))
    arguments = ["--detector", detector, "--device", device, "--height", str(height), "--width", str(width)]
    arguments += ["--upscale", str(upscale)] + (["--weights", str(weights)] if weights is not None else [])
    frames, fps = stream_video(video_path)
    people = _detect(frames, count_frames(video_path), str(python or sys.executable), arguments, progress)
    tracked = follow_person(people, source=str(video_path), person=person, allow_missing=True)
    return PoseSequence(tracked, (height, width), fps)


def _detect(
    frames: Iterable[np.ndarray],
    num_frames: int,
    python: str,
    arguments: list[str],
    progress: OnFrame | None,
) -> list[np.ndarray]:
    """Return the people in each frame, float32 (P, 134, 3). num_frames: an estimate, for `progress`."""
    with tempfile.TemporaryDirectory(prefix="posecrafter-") as folder:
        output = Path(folder) / "keypoints.npz"
        command = [python, str(Path(worker.__file__)), *arguments, "--output", str(output)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env=onnxruntime_threads(core_quota()),  # which ONNX Runtime does not know, and rtmlib takes no number
            )  # fmt: skip
        except OSError as error:
            raise BackendUnavailable(f"the interpreter {python} cannot be started: {error.strerror}",
                                     "name the interpreter of an environment that has the detector") from error  # fmt: skip
        listener = _Listener(process, num_frames, progress)
        try:
            listener.start()
            _feed(process, frames)
            process.wait()
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # unsent data is useless now, and must not hide an interruption
                assert process.stdin is not None
                process.stdin.close()
            process.wait()
            listener.join()
        listener.raise_for_status(process.returncode)
        if not output.exists():
            raise BackendUnavailable(f"{python} ended well, and gave no keypoints",
                                     "name the interpreter of an environment that has the detector")  # fmt: skip
        with np.load(output) as result:
            return _split(result["points"], result["frames"], int(result["num_frames"]))


def _feed(process: subprocess.Popen[bytes], frames: Iterable[np.ndarray]) -> None:
    assert process.stdin is not None
    try:
        for frame in frames:
            process.stdin.write(np.ascontiguousarray(frame).data)
        process.stdin.close()
    except BrokenPipeError:
        # The worker has ended; its stderr says why.
        return


class _Listener(threading.Thread):
    """Reads the worker's stderr, so that neither process waits for the other."""

    def __init__(self, process: subprocess.Popen[bytes], num_frames: int, progress: OnFrame | None) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._num_frames = num_frames
        self._progress = progress
        self._said: dict[str, str] = {}
        self._log: list[str] = []
        self._failure: BaseException | None = None  # of `progress`

    def run(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self._hear(line.decode("utf-8", errors="replace").rstrip())

    def _hear(self, line: str) -> None:
        kind, _, value = line.partition(" ")
        if kind == worker.PROGRESS:
            self._report(int(value))
        elif kind in (worker.DETECTOR, worker.UNAVAILABLE, worker.FAILED):
            self._said[kind] = value
        elif line:
            self._log = [*self._log, line][-_NUM_LOG_LINES:]

    def _report(self, num_done: int) -> None:
        if self._progress is None or self._failure is not None:
            return
        try:
            self._progress(num_done, max(num_done, self._num_frames), self._said[worker.DETECTOR])
        except BaseException as failure:  # nobody would see it in this thread: `raise_for_status` raises it
            self._failure = failure
            self._process.kill()

    def raise_for_status(self, status: int) -> None:
        """Raise what `progress` raised, the error that the worker reported, or one that says that it died."""
        if self._failure is not None:
            raise self._failure
        if worker.UNAVAILABLE in self._said:
            raise BackendUnavailable(f"no pose detector: {self._said[worker.UNAVAILABLE]}", hint=_INSTALL_HINT)
        if status == 0:
            return
        reason = self._said.get(worker.FAILED) or "\n".join(self._log) or "it said nothing"
        if worker.DETECTOR not in self._said:
            raise BackendUnavailable(f"the pose detector does not start: {reason}", hint=_INSTALL_HINT)
        raise PoseError(
            f"the pose detector {self._said[worker.DETECTOR]} failed with status {status}: {reason}",
            hint="try the other one: --detector dwpose or --detector mediapipe",
        )


def _split(points: np.ndarray, frames: np.ndarray, num_frames: int) -> list[np.ndarray]:
    if len(points) == 0:
        return [np.zeros((0, NUM_KEYPOINTS, 3), np.float32)] * num_frames
    convert = from_wholebody if points.shape[1] == NUM_WHOLEBODY_POINTS else from_mediapipe
    keypoints = convert(points)
    # SimCC scores overshoot 1 a little.
    keypoints[..., 2] = np.clip(keypoints[..., 2], 0.0, 1.0)
    return [keypoints[frames == index] for index in range(num_frames)]
