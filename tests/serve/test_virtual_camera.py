"""The camera: what it shows where there is one, and the line that says what is missing where there is none.

No test runs a device where none is there: a class in the place of pyvirtualcam's `Camera` records what it is given.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.poses.draw import draw_pose
from posecrafter_rt.serve import sampling
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.service import Service
from posecrafter_rt.serve.virtual_camera import VirtualCamera
from tests.serve.drawn import SIZE, DrawnAvatar, make_pose, pose_bytes, running, wait_until


def make_camera() -> VirtualCamera:
    return VirtualCamera(SIZE, lambda: np.zeros((*SIZE, 3), np.uint8))


def has_camera() -> bool:
    try:
        make_camera().close()
    except BackendUnavailable:
        return False
    return True


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvirtualcam", None)
    with pytest.raises(BackendUnavailable, match="pyvirtualcam") as refused:
        make_camera()
    assert refused.value.hint == "pip install 'posecrafter-rt[camera]'"


@pytest.mark.skipif(has_camera(), reason="this machine has a virtual camera")
def test_without_a_device_it_says_how_to_get_one() -> None:
    with pytest.raises(BackendUnavailable, match="no virtual camera|pyvirtualcam") as refused:
        make_camera()
    assert refused.value.hint
    service = Service(DrawnAvatar(), ServeOptions(has_virtual_camera=True))  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable):
        service.start()
    service.stop()


@pytest.mark.skipif(not has_camera(), reason="needs a virtual camera, such as v4l2loopback")
def test_a_server_with_a_camera_starts_and_ends() -> None:
    with running(DrawnAvatar(), ServeOptions(has_virtual_camera=True)):
        time.sleep(0.3)


def test_a_camera_that_fails_without_a_message_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: object) -> None:
        raise RuntimeError

    monkeypatch.setitem(sys.modules, "pyvirtualcam", SimpleNamespace(Camera=fails))
    with pytest.raises(BackendUnavailable, match=r"^there is no virtual camera: RuntimeError$"):
        make_camera()


class RecordingCamera:
    """Called as `pyvirtualcam.Camera` is; keeps the last frame, and fails when the device is lost."""

    device = "/dev/video9"

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.frame = np.zeros(0)
        self.was_sent, self.is_lost, self.was_closed = threading.Event(), threading.Event(), threading.Event()

    def __enter__(self) -> RecordingCamera:
        return self

    def __exit__(self, *exception: object) -> None:
        self.was_closed.set()

    def send(self, frame: np.ndarray) -> None:
        if self.is_lost.is_set():
            raise RuntimeError("the device is gone")
        assert frame.dtype == np.uint8 and frame.flags.c_contiguous and not self.was_closed.is_set()
        self.frame = frame.copy()
        self.was_sent.set()

    def shows(self, frame: np.ndarray) -> bool:
        return np.array_equal(self.frame, frame)


@pytest.fixture
def cameras(monkeypatch: pytest.MonkeyPatch) -> list[RecordingCamera]:
    """Those that are opened."""
    opened: list[RecordingCamera] = []

    def open_camera(**options: Any) -> RecordingCamera:
        opened.append(RecordingCamera(**options))
        return opened[-1]

    monkeypatch.setitem(sys.modules, "pyvirtualcam", SimpleNamespace(Camera=open_camera))
    return opened


def show(client: ClientConnection, shift: float) -> np.ndarray:
    """Send a pose as it is, and give its frame once it has come."""
    client.send('{"type": "configure", "fit": "canvas"}')
    client.send(pose_bytes(1, shift))
    while isinstance(client.recv(timeout=30), str):
        pass
    return draw_pose(make_pose(shift), SIZE)


def test_it_shows_the_first_clients_newest_frame(cameras: list[RecordingCamera]) -> None:
    avatar = DrawnAvatar()
    with running(avatar, ServeOptions(has_virtual_camera=True)) as server:
        (camera,) = cameras
        assert camera.options == {"width": SIZE[1], "height": SIZE[0], "fps": 30}
        wait_until(lambda: camera.shows(server.app.state.service.reference))
        with connect(server.url("/ws", "ws")) as first, connect(server.url("/ws", "ws")) as second:
            frame = show(first, 2)
            wait_until(lambda: camera.shows(frame))
            other = show(second, 6)
            camera.was_sent.clear()
            assert camera.was_sent.wait(60) and camera.shows(frame) and not camera.shows(other)
            newer = show(first, 4)
            wait_until(lambda: camera.shows(newer))
            first.close()
            wait_until(lambda: camera.shows(other))
        assert not camera.was_closed.is_set()
    assert camera.was_closed.is_set()


def test_a_frame_that_is_a_view_is_sent_as_the_device_needs_it(cameras: list[RecordingCamera]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
    camera = VirtualCamera(SIZE, lambda: picture[:, ::-1])
    assert cameras[0].was_sent.wait(60) and camera.device == "/dev/video9"
    camera.close()
    assert cameras[0].shows(picture[:, ::-1]) and cameras[0].was_closed.is_set()


def test_the_server_goes_on_when_the_device_is_lost(
    cameras: list[RecordingCamera], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), running(DrawnAvatar(), ServeOptions(has_virtual_camera=True)) as server:
        assert cameras[0].was_sent.wait(60)
        cameras[0].is_lost.set()
        assert cameras[0].was_closed.wait(60)
        with connect(server.url("/ws", "ws")) as client:
            show(client, 1)
    assert "the virtual camera has ended: the device is gone" in caplog.text


class Clock:
    """A clock that only waiting moves on; and the event that ends the waiting."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.is_stopped = False

    def perf_counter(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.now_s += seconds
        return self.is_stopped


def test_a_sampler_keeps_its_pace_and_makes_up_for_a_late_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ticks = Clock(), []
    monkeypatch.setattr(sampling, "time", clock)

    def tick() -> None:
        ticks.append(round((clock.now_s - 100) * 30, 6))
        if len(ticks) == 3:
            clock.now_s += 3.5 / 30
        clock.is_stopped = len(ticks) == 12

    sampling.sample(9, tick, clock)  # type: ignore[arg-type]
    assert ticks == [0, 1, 2, 5.5, 5.5, 5.5, 6, 7, 8]
    sampling.sample(None, tick, clock)  # type: ignore[arg-type]
    assert len(ticks) == 12
