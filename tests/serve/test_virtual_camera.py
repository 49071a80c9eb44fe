"""The camera: what it shows where there is one, and the line that says what is missing where there is none."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.serve import sampling
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.service import Service
from posecrafter_rt.serve.virtual_camera import VirtualCamera
from tests.serve.drawn import SIZE, DrawnAvatar, running


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
