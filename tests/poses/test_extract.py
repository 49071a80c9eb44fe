"""Tests of keypoint extraction: the process, rtmlib on tiny ONNX networks, and a stand-in for MediaPipe.

Tests; no layer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from posecrafter_rt.errors import BackendUnavailable, PoseCrafterError, PoseError, VideoError
from posecrafter_rt.poses.extract import _feed, extract_poses
from posecrafter_rt.poses.keypoints import BODY, FACE, FEET, LEFT_HAND, RIGHT_HAND, PoseSequence
from posecrafter_rt.video_io import write_video

RED = (255, 0, 0)
BLACK = (0, 0, 0)

# Answers with a point's own number as its place; all points sit on a diagonal, the right hand outside the picture.
MEDIAPIPE = """
import numpy as np
from types import SimpleNamespace as N
__version__ = "0.10.14"
class Holistic:
    def __init__(self, model_complexity): assert model_complexity == 1
    def process(self, picture):
        assert picture.shape == (576, 768, 3) and picture.dtype == np.uint8, picture.shape
        if picture.max() == 0:
            return N(pose_landmarks=None, face_landmarks=None, left_hand_landmarks=None, right_hand_landmarks=None)
        if picture[0, 0, 2] > 200:
            raise RuntimeError("out of memory")
        part = lambda n, shift=0.0: N(landmark=[N(x=i / 1000 + shift, y=0.5, visibility=i / 100) for i in range(n)])
        return N(pose_landmarks=part(33), face_landmarks=part(468), left_hand_landmarks=None,
                 right_hand_landmarks=part(21, 1.0))
solutions = N(holistic=N(Holistic=Holistic))
"""


@pytest.fixture
def video(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The colours of the frames (48 x 64) that the next `extract_poses` will read; a test fills it."""
    colours: list[tuple[int, int, int]] = []

    def stream_video(path: object, *, stop: int | None = None, **_: object) -> tuple[Iterator[np.ndarray], float]:
        return (np.full((48, 64, 3), colour, np.uint8) for colour in colours[:stop]), 25.0

    monkeypatch.setattr("posecrafter_rt.video_io.stream_video", stream_video)
    monkeypatch.setattr("posecrafter_rt.video_io.count_frames", lambda path: len(colours))
    return colours


def interpreter(folder: Path, modules: dict[str, str]) -> Path:
    """A Python with these modules before all others, as another environment would have them."""
    library = folder / "library"
    library.mkdir()
    for name, source in modules.items():
        (library / f"{name}.py").write_text(source)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{library}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


def test_mediapipe_in_another_environment(video: list, tmp_path: Path) -> None:
    video += [RED] * 3
    seen: list[tuple[int, int, str]] = []
    poses = extract_poses(
        "clip.mp4",
        detector="mediapipe",
        python=interpreter(tmp_path, {"mediapipe": MEDIAPIPE}),
        progress=lambda *told: seen.append(told),
    )
    assert isinstance(poses, PoseSequence)
    assert (len(poses), poses.canvas, poses.fps) == (3, (48, 64), 25.0)
    assert seen == [(1, 3, "mediapipe"), (2, 3, "mediapipe"), (3, 3, "mediapipe")]
    # Right shoulder: landmark 12 at 0.012 of 64 pixels, the middle of 48, pixel centres at integers, visibility 0.12.
    assert np.allclose(poses.keypoints[:, 2], [0.012 * 64 - 0.5, 23.5, 0.12], atol=1e-4)
    assert np.allclose(poses.keypoints[:, FACE.start + 8], [0.152 * 64 - 0.5, 23.5, 1], atol=1e-4)
    assert not poses.keypoints[:, LEFT_HAND].any()
    assert not poses.keypoints[:, RIGHT_HAND].any()


def test_a_detector_is_told_of_a_quota_of_cores(video: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would start a thread for each of the machine's."""
    monkeypatch.setattr("posecrafter_rt.poses.extract.core_quota", lambda: 3)
    monkeypatch.delenv("ORT_INTRA_OP_NUM_THREADS", raising=False)
    told = tmp_path / "told"
    tells = f"import os, pathlib\npathlib.Path({str(told)!r}).write_text(os.environ['ORT_INTRA_OP_NUM_THREADS'])\n"
    video += [RED]
    extract_poses("clip.mp4", detector="mediapipe", python=interpreter(tmp_path, {"mediapipe": tells + MEDIAPIPE}))
    assert told.read_text() == "3"


def test_frames_are_let_go_once_they_are_sent(video: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    most_alive = 0

    def stream_video(path: object, *, stop: int | None = None, **_: object) -> tuple[Iterator[np.ndarray], float]:
        return frames(20 if stop is None else stop), 25.0

    def frames(count: int) -> Iterator[np.ndarray]:
        nonlocal most_alive
        for _ in range(count):
            frame = np.full((48, 64, 3), RED, np.uint8)
            made.append(weakref.ref(frame))
            most_alive = max(most_alive, sum(reference() is not None for reference in made))
            yield frame
            del frame

    monkeypatch.setattr("posecrafter_rt.video_io.stream_video", stream_video)
    python = interpreter(tmp_path, {"mediapipe": MEDIAPIPE})
    assert len(extract_poses("clip.mp4", detector="mediapipe", python=python)) == 20
    assert most_alive <= 2  # the one that is being made and the one before it


def test_a_video_that_breaks_off_ends_the_detection(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    noise[..., 2] = 0
    clip = tmp_path / "clip.mp4"
    write_video(clip, noise, 25)
    clip.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * 0.8)])
    with pytest.raises(VideoError, match=r"clip\.mp4 is damaged or breaks off at frame \d+"):
        extract_poses(clip, detector="mediapipe", python=interpreter(tmp_path, {"mediapipe": MEDIAPIPE}))


def test_a_frame_without_anybody_is_zeros_and_a_video_without_is_an_error(video: list, tmp_path: Path) -> None:
    video += [RED, BLACK, RED]
    python = interpreter(tmp_path, {"mediapipe": MEDIAPIPE})
    poses = extract_poses("clip.mp4", detector="mediapipe", python=python)
    assert [bool(keypoints.any()) for keypoints in poses] == [True, False, True]
    video[:] = [BLACK] * 7
    with pytest.raises(PoseError, match=r"clip\.mp4: no person in any of 7 frames"):
        extract_poses("clip.mp4", detector="mediapipe", python=python)


def test_auto_takes_the_detector_that_can_run(video: list, tmp_path: Path) -> None:
    video += [RED]
    broken = "raise ImportError('no good')"
    poses = extract_poses("clip.mp4", python=interpreter(tmp_path, {"mediapipe": MEDIAPIPE, "rtmlib": broken}))
    assert poses.keypoints[0, 2].any()


def test_weights_are_of_dwpose_and_no_other_detector_passes_over_them(video: list, tmp_path: Path) -> None:
    """Not even where DWPose cannot run, and MediaPipe can."""
    video += [RED]
    python = interpreter(tmp_path, {"mediapipe": MEDIAPIPE, "rtmlib": "raise ImportError('no good')"})
    with pytest.raises(BackendUnavailable, match="no pose detector: the Python package rtmlib does not import"):
        extract_poses("clip.mp4", weights=tmp_path, python=python)
    with pytest.raises(PoseCrafterError, match=f"mediapipe takes no weights, and {tmp_path} was given"):
        extract_poses("clip.mp4", detector="mediapipe", weights=tmp_path, python=python)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "auto", ""])
def test_an_unknown_device_is_refused_before_a_video_is_opened(device: str) -> None:
    with pytest.raises(PoseCrafterError, match=f"unknown device '{device}'") as caught:
        extract_poses("none.mp4", device=device)
    assert caught.value.hint == "choose cpu or cuda"
    with pytest.raises(VideoError):
        extract_poses("none.mp4", device="cuda:1")


def test_a_failing_detector_is_reported(video: list, tmp_path: Path) -> None:
    # Far more frames than a pipe holds, so that the parent is still writing when the detector dies.
    video += [(0, 0, 255)] * 50
    python = interpreter(tmp_path, {"mediapipe": MEDIAPIPE})
    with pytest.raises(PoseError, match="detector mediapipe failed with status 1: RuntimeError: out of memory"):
        extract_poses("clip.mp4", detector="mediapipe", python=python)


@pytest.mark.parametrize("num_frames", [1, 100_000])  # it has ended already, or would go on for minutes
def test_what_progress_raises_is_raised_and_ends_the_detector(
    video: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_frames: int
) -> None:
    num_sent = 0
    calls: list[int] = []

    def frames(count: int) -> Iterator[np.ndarray]:
        nonlocal num_sent
        for number in range(1, count + 1):
            num_sent = number
            yield np.full((48, 64, 3), RED, np.uint8)

    def progress(done: int, total: int, detector: str) -> None:
        calls.append(done)
        raise BrokenPipeError("the terminal is gone")

    monkeypatch.setattr(
        "posecrafter_rt.video_io.stream_video", lambda path, *, stop=num_frames, **_: (frames(stop), 25.0)
    )
    python = interpreter(tmp_path, {"mediapipe": MEDIAPIPE})
    with pytest.raises(BrokenPipeError, match="the terminal is gone"):
        extract_poses("clip.mp4", detector="mediapipe", python=python, progress=progress)
    assert calls == [1] and (num_sent == 1 or num_sent < num_frames)


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        ({"mediapipe": "raise ImportError('GLIBC')"}, {"detector": "mediapipe"}, "mediapipe does not import: GLIBC"),
        ({"mediapipe": "__version__ = '0.11'"}, {"detector": "mediapipe"}, "MediaPipe 0.11 has no Holistic solution"),
        ({"mediapipe": MEDIAPIPE}, {"detector": "mediapipe", "device": "cuda"}, "MediaPipe runs on the CPU only"),
        (
            {"rtmlib": "raise ImportError('R')", "mediapipe": "raise ImportError('M')"},
            {},
            "dwpose: .* R; mediapipe: .* M",
        ),
        ({"numpy": "raise ImportError('no numpy')"}, {}, "does not start: .*no numpy"),
    ],
)
def test_why_a_detector_cannot_run(video: list, tmp_path: Path, modules: dict, options: dict, message: str) -> None:
    video += [RED]
    with pytest.raises(BackendUnavailable, match=f"(?s){message}") as caught:
        extract_poses("clip.mp4", python=interpreter(tmp_path, modules), **options)
    assert "pip install --no-deps rtmlib" in (caught.value.hint or "")


def test_an_interpreter_that_is_not_there(video: list, tmp_path: Path) -> None:
    video += [RED]
    with pytest.raises(BackendUnavailable, match="python9 cannot be started"):
        extract_poses("clip.mp4", python=tmp_path / "python9")


def test_an_interpreter_that_is_none(video: list, tmp_path: Path) -> None:
    video += [RED]
    with pytest.raises(BackendUnavailable, match="true ended well, and gave no keypoints"):
        extract_poses("clip.mp4", python=Path(shutil.which("true") or "/bin/true"))


def test_an_unknown_detector() -> None:
    with pytest.raises(BackendUnavailable, match="no detector 'openpose'"):
        extract_poses("clip.mp4", detector="openpose")


# --- DWPose through rtmlib, on networks of a few operations with DWPose's interface


def dwpose_networks(folder: Path, certainty: float = 1.0) -> None:
    """YOLOX that finds a person and a dog in blue-green-red pictures that are red, SimCC that needs red-green-blue.

    certainty: how sure YOLOX is of both.
    """
    onnx = pytest.importorskip("onnx", reason="onnx builds the test's networks")

    def save(name: str, shape: list[int], channel: int, threshold: float, outputs: dict[str, np.ndarray]) -> None:
        """The outputs where that channel's mean is above the threshold, else zeros."""
        picture = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, *shape])
        constants = {f"{key}_values": value for key, value in outputs.items()}
        constants |= {"channel": np.array(channel), "axes": np.array([1, 2]), "threshold": np.float32(threshold)}
        graph = onnx.helper.make_graph(
            [
                onnx.helper.make_node("Gather", ["input", "channel"], ["plane"], axis=1),
                onnx.helper.make_node("ReduceMean", ["plane", "axes"], ["mean"], keepdims=0),
                onnx.helper.make_node("Sub", ["mean", "threshold"], ["above"]),
                onnx.helper.make_node("Relu", ["above"], ["positive"]),
                onnx.helper.make_node("Sign", ["positive"], ["level"]),
                *[onnx.helper.make_node("Mul", [f"{key}_values", "level"], [key]) for key in outputs],
            ],
            name,
            [picture],
            [onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, list(v.shape)) for k, v in outputs.items()],
            [onnx.numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
        )
        opset = [onnx.helper.make_opsetid("", 18)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), folder / name)

    # Rows of the 20 x 20 cells of stride 32, last of the three grids; centre / 32 - cell, log(size / 32).
    boxes = np.zeros((1, 8400, 85), np.float32)
    for cell, (x, y, w, h), class_index in [(0, (320, 320, 240, 320), 0), (1, (320, 320, 600, 600), 16)]:
        row = boxes[0, 8000 + cell]
        row[:4] = [x / 32 - cell, y / 32, np.log(w / 32), np.log(h / 32)]
        row[[4, 5 + class_index]] = 1, certainty
    save("yolox_l.onnx", [640, 640], 2, 200, {"output": boxes})
    simcc_x, simcc_y = np.zeros((1, 133, 576), np.float32), np.zeros((1, 133, 768), np.float32)
    for index in range(133):
        simcc_x[0, index, 2 * index] = simcc_y[0, index, 4 * index] = 1
    save("dw-ll_ucoco_384.onnx", [384, 288], 0, 0, {"simcc_x": simcc_x, "simcc_y": simcc_y})


def test_dwpose_through_rtmlib(video: list, tmp_path: Path) -> None:
    for name in ("rtmlib", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    dwpose_networks(tmp_path)
    video += [RED, BLACK, RED]
    poses = extract_poses("clip.mp4", detector="dwpose", weights=tmp_path)
    assert poses.canvas == (48, 64)
    assert not poses.keypoints[1].any()
    # 48 x 64 is enlarged 12 times and fits 640 x 640 by 5/6; the person's box, 240 x 320 around (320, 320), is then
    # 288 x 384 around (384, 384) in the enlarged picture, and 1.25 times that is what the pose network sees.
    index = np.arange(133)
    x = index * 1.25 + 384 - 1.25 * 144
    y = 2 * index * 1.25 + 384 - 1.25 * 192
    expected = np.stack([(x + 0.5) / 12 - 0.5, (y + 0.5) / 12 - 0.5], axis=1)
    keypoints = poses.keypoints[0]
    assert np.allclose(keypoints[BODY, :2][[0, 2, 3, 4]], expected[[0, 6, 8, 10]], atol=0.02)
    assert np.allclose(keypoints[1, :2], (expected[5] + expected[6]) / 2, atol=0.02)
    assert np.allclose(keypoints[FEET.start :, :2], expected[17:], atol=0.02)
    assert (keypoints[:, 2] == 1).all()
    assert np.array_equal(poses.keypoints[2], keypoints)


def test_the_dwpose_that_rtmlib_downloads(video: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights as they lie once they are downloaded; any others would have to come from the net."""
    for name in ("rtmlib", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    dwpose_networks(tmp_path)
    downloads = tmp_path / "hub" / "checkpoints"
    downloads.mkdir(parents=True)
    (tmp_path / "yolox_l.onnx").rename(downloads / "yolox_m_8xb8-300e_humanart-c2c7a14a.onnx")
    dwpose = downloads / "rtmpose-l_simcc-ucoco_dw-ucoco_270e-384x288-2438fd99_20230728.onnx"
    (tmp_path / "dw-ll_ucoco_384.onnx").rename(dwpose)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing is downloaded here
    video += [RED]
    poses = extract_poses("clip.mp4", detector="dwpose")
    assert (poses.keypoints[0, :, 2] == 1).all()


@pytest.mark.parametrize(("certainty", "is_found"), [(0.4, True), (0.2, False)])
def test_a_person_is_found_where_yolox_is_as_sure_as_dwpose_asks(
    video: list, tmp_path: Path, certainty: float, is_found: bool
) -> None:
    """From 0.3 on; rtmlib's own default for this network is 0.7."""
    for name in ("rtmlib", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    dwpose_networks(tmp_path, certainty)
    video += [RED]
    if is_found:
        assert extract_poses("clip.mp4", detector="dwpose", weights=tmp_path).keypoints.any()
    else:
        with pytest.raises(PoseError, match="no person"):
            extract_poses("clip.mp4", detector="dwpose", weights=tmp_path)


def test_a_download_that_was_cut_off_is_said_and_passed_over(
    video: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rtmlib", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "yolox_m_8xb8-300e_humanart-c2c7a14a.zip").write_bytes(b"PK\x03\x04cut off")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    video += [RED]
    python = interpreter(tmp_path, {"mediapipe": MEDIAPIPE})
    with pytest.raises(BackendUnavailable, match=r"download is damaged .* empty ~/\.cache/rtmlib/hub/checkpoints"):
        extract_poses("clip.mp4", detector="dwpose", python=python)
    assert extract_poses("clip.mp4", python=python).keypoints.any()


def test_dwpose_says_which_weights_are_missing(video: list, tmp_path: Path) -> None:
    for name in ("rtmlib", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    video += [RED]
    (tmp_path / "yolox_l.onnx").touch()
    with pytest.raises(BackendUnavailable, match=r"missing: \S*dw-ll_ucoco_384\.onnx$"):
        extract_poses("clip.mp4", detector="dwpose", weights=tmp_path)
    assert os.listdir(tmp_path) == ["yolox_l.onnx"]


def test_dwpose_is_refused_where_onnx_runtime_would_silently_run_it_on_the_cpu(video: list, tmp_path: Path) -> None:
    """One that was built with CUDA lists it even where CUDA's libraries are missing; here is one that only lists it."""
    for name in ("rtmlib", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    dwpose_networks(tmp_path)
    listed = f"""
import onnxruntime, pathlib
onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
onnxruntime.preload_dlls = pathlib.Path({str(tmp_path / "preloaded")!r}).touch
"""
    video += [RED]
    python = interpreter(tmp_path, {"sitecustomize": listed})
    assert extract_poses("clip.mp4", detector="dwpose", weights=tmp_path, python=python).keypoints.any()
    assert not (tmp_path / "preloaded").exists()
    with pytest.raises(BackendUnavailable, match="cuda was asked for, but ONNX Runtime cannot load CUDA's or cuDNN's"):
        extract_poses("clip.mp4", detector="dwpose", weights=tmp_path, python=python, device="cuda")
    assert (tmp_path / "preloaded").exists()


def test_an_interruption_is_not_taken_for_a_detector_that_has_ended() -> None:
    """Ctrl-C ends the detector too: what waits to be sent to it can then no longer be."""
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)

    def frames() -> Iterator[np.ndarray]:
        yield np.zeros((2, 2, 3), np.uint8)
        process.wait()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _feed(process, frames())
    assert process.stdin is not None
    with pytest.raises(BrokenPipeError):  # there was something to send
        process.stdin.close()
