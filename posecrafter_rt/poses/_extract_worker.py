"""The detector process: reads raw RGB frames from stdin, writes keypoints in the detector's own layout to a .npz.

Layer 1: runs as a script, perhaps under another interpreter, so it imports nothing of the package.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The parent reads stderr: a line that starts with one of these carries a value; every other line is a log.
PROGRESS, DETECTOR, UNAVAILABLE, FAILED = "@progress", "@detector", "@unavailable", "@failed"
DETECTORS = {"dwpose": "rtmlib", "mediapipe": "mediapipe"}
DWPOSE_FILES = ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")
# The same network, from rtmlib's list of models. By default rtmlib would take RTMW, whose scores are on another scale:
# scores are SimCC peaks, and RTMW's loss lets them reach about 10 (beta 1, label_beta 10), DWPose's only about 1.
_DWPOSE_URL = (
    "https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/onnx_sdk/"
    "rtmpose-l_simcc-ucoco_dw-ucoco_270e-384x288-2438fd99_20230728.zip"
)
_YOLOX_SIZE = (640, 640)
_DWPOSE_SIZE = (288, 384)
_PERSON_CLASS = 0
_MIN_SCORE = 0.3  # of a person: DWPose's own, and that of the YOLOX that rtmlib downloads
_CUDA = "CUDAExecutionProvider"

# RGB uint8 (H, W, 3) -> (P, K, 3): x, y in pixels of that picture (pixel centres at integers), confidence.
Detect = Callable[[np.ndarray], np.ndarray]


class Unavailable(Exception):
    """This detector cannot run here; the message says why."""


def make_dwpose(weights: str | None, device: str) -> Detect:
    """Make DWPose, through rtmlib on ONNX Runtime: YOLOX finds people, a SimCC network their 133 points."""
    rtmlib = _import("rtmlib")
    onnxruntime = _import("onnxruntime")
    on_cuda = device.startswith("cuda")
    if on_cuda and _CUDA not in onnxruntime.get_available_providers():
        raise Unavailable(f"device {device} was asked for, but this ONNX Runtime has no CUDA")
    if on_cuda and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's libraries may have come with torch, where no loader looks
    if weights is None:
        both = _download_dwpose(rtmlib, device)
        find_people, find_points, has_classes = both.det_model, both.pose_model, False
    else:
        paths = [Path(weights) / name for name in DWPOSE_FILES]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise Unavailable(f"DWPose weights are missing: {', '.join(missing)}")
        # The third argument is positional because rtmlib renamed it. DWPose's YOLOX knows all 80 COCO classes.
        find_people = rtmlib.YOLOX(str(paths[0]), _YOLOX_SIZE, "multiclass", score_thr=_MIN_SCORE, device=device)
        find_points, has_classes = rtmlib.RTMPose(str(paths[1]), _DWPOSE_SIZE, device=device), True
    # Without those libraries ONNX Runtime only warns, and computes on the CPU.
    if on_cuda and any(_CUDA not in model.session.get_providers() for model in (find_people, find_points)):
        raise Unavailable(f"device {device} was asked for, but ONNX Runtime cannot load CUDA's or cuDNN's libraries; "
                          "it needs the versions that it was built for, or take --device cpu")  # fmt: skip

    def detect(picture: np.ndarray) -> np.ndarray:
        # YOLOX was trained on BGR; the pose network on RGB (its mean and deviation are in that order).
        boxes = find_people(np.ascontiguousarray(picture[..., ::-1]))
        if has_classes:
            boxes, classes = boxes
            boxes = boxes[classes == _PERSON_CLASS]
        if len(boxes) == 0:
            # Given no boxes, rtmlib would take the whole picture for a person.
            return np.zeros((0, 133, 3), np.float32)
        points, scores = find_points(picture, boxes)
        return np.concatenate([points, scores[..., np.newaxis]], axis=-1)

    return detect


def _download_dwpose(rtmlib: Any, device: str) -> Any:
    """Return rtmlib's own pair of detectors, whose weights it downloads at first use."""
    try:
        return rtmlib.Wholebody(pose=_DWPOSE_URL, pose_input_size=_DWPOSE_SIZE, mode="performance", device=device)
    except (OSError, ValueError) as error:
        raise Unavailable(f"rtmlib could not download its weights: {error}") from error
    except zipfile.BadZipFile as error:  # it was cut off; rtmlib keeps the file, and would never fetch it again
        raise Unavailable(f"rtmlib's download is damaged ({error}): to have it fetched again, empty "
                          "~/.cache/rtmlib/hub/checkpoints, which TORCH_HOME and XDG_CACHE_HOME move") from error  # fmt: skip


def make_mediapipe(weights: str | None, device: str) -> Detect:
    """Make MediaPipe Holistic, with its own weights: one person, 33 pose + 468 face mesh + 21 + 21 hand points."""
    mediapipe = _import("mediapipe")
    if device != "cpu":
        raise Unavailable(f"device {device} was asked for, but MediaPipe runs on the CPU only")
    if not hasattr(mediapipe, "solutions"):
        raise Unavailable(f"MediaPipe {mediapipe.__version__} has no Holistic solution; 0.10.14 has")
    # The middle pose model is the only one in the package that finds shoulders well.
    holistic = mediapipe.solutions.holistic.Holistic(model_complexity=1)

    def detect(picture: np.ndarray) -> np.ndarray:
        found = holistic.process(picture)
        body, face = _landmarks(found.pose_landmarks, 33), _landmarks(found.face_landmarks, 468)
        hands = _landmarks(found.left_hand_landmarks, 21), _landmarks(found.right_hand_landmarks, 21)
        points = np.concatenate([body, face, *hands])
        is_outside = (points[:, :2] < 0).any(axis=1) | (points[:, :2] >= 1).any(axis=1)
        points[is_outside, 2] = 0
        # Fractions count from the picture's corner, our coordinates from the centre of the first pixel.
        points[:, 0] = points[:, 0] * picture.shape[1] - 0.5
        points[:, 1] = points[:, 1] * picture.shape[0] - 0.5
        return points[np.newaxis] if (points[:, 2] > 0).any() else np.zeros((0, len(points), 3), np.float32)

    return detect


def _landmarks(part: Any, count: int) -> np.ndarray:
    """Return (count, 3): x, y in fractions of the picture and the visibility, which is 1 for all but the pose."""
    if part is None:
        return np.zeros((count, 3), np.float32)
    rows = [(point.x, point.y, point.visibility if count == 33 else 1.0) for point in part.landmark]
    return np.array(rows, np.float32)


def _import(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"the Python package {name} is not installed for {sys.executable}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"the Python package {name} does not import: {error}") from error


def make_detector(name: str, weights: str | None, device: str) -> tuple[str, Detect]:
    """Make the named detector, or for `auto` the first that can run; return its name, too.

    Raises: Unavailable if it cannot run; for `auto`, with the reasons of all.
    """
    makers = {"dwpose": make_dwpose, "mediapipe": make_mediapipe}
    if name != "auto":
        return name, makers[name](weights, device)
    reasons = []
    for candidate, make in makers.items():
        try:
            return candidate, make(weights, device)
        except Unavailable as error:
            reasons.append(f"{candidate}: {error}")
    raise Unavailable("; ".join(reasons))


def detect_stream(detect: Detect, size: tuple[int, int], upscale: int, output: str) -> None:
    """Run `detect` on every frame of stdin, enlarged `upscale` times; save every person's frame index and points."""
    import cv2

    height, width = size
    frames: list[int] = []
    people: list[np.ndarray] = []
    index = 0
    while buffer := sys.stdin.buffer.read(height * width * 3):
        picture: np.ndarray = np.frombuffer(buffer, np.uint8).reshape(height, width, 3)
        if upscale > 1:
            picture = cv2.resize(picture, None, fx=upscale, fy=upscale, interpolation=cv2.INTER_CUBIC)
        points = detect(picture).astype(np.float32)
        points[..., :2] = (points[..., :2] + 0.5) / upscale - 0.5
        frames.extend([index] * len(points))
        people.extend(points)
        index += 1
        _tell(PROGRESS, index)
    np.savez(output, frames=np.array(frames, np.int64), points=np.array(people, np.float32), num_frames=index)


def _tell(kind: str, value: object) -> None:
    sys.stderr.write(f"{kind} {value}".replace("\n", " ") + "\n")
    sys.stderr.flush()


def main() -> int:
    """Parse the arguments, detect, report; return the exit status."""
    parser = argparse.ArgumentParser(description="detect keypoints in raw frames (started by posecrafter_rt)")
    parser.add_argument("--detector", choices=["auto", *DETECTORS], required=True)
    parser.add_argument("--weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--upscale", type=int, default=1)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    try:
        name, detect = make_detector(options.detector, options.weights, options.device)
        _tell(DETECTOR, name)
        detect_stream(detect, (options.height, options.width), options.upscale, options.output)
    except Unavailable as error:
        _tell(UNAVAILABLE, error)
        return 1
    except Exception as error:  # process boundary: the parent raises an error of its own from it
        _tell(FAILED, f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    # Python put this folder first on the path, but the package's modules must not be found as top-level ones.
    sys.path.pop(0)
    raise SystemExit(main())
