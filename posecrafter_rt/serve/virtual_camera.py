"""A camera device that shows the avatar, for meetings and OBS.

Layer 7: pyvirtualcam, on a thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from posecrafter_rt.errors import BackendUnavailable, first_line
from posecrafter_rt.serve.sampling import SAMPLES_PER_SECOND, sample

_log = logging.getLogger(__name__)


class VirtualCamera:
    """Shows the frames that `latest` returns, (H, W, 3) uint8, until closed.

    Args: size: (H, W).
    Raises: BackendUnavailable if pyvirtualcam is not installed or there is no device.
    """

    def __init__(self, size: tuple[int, int], latest: Callable[[], np.ndarray]) -> None:
        self._latest, self._stopped = latest, threading.Event()
        self._camera = _open_camera(size)
        self._thread = threading.Thread(target=self._run, name="posecrafter-camera", daemon=True)
        self._thread.start()

    @property
    def device(self) -> str:
        """The device's name, such as /dev/video0."""
        return str(self._camera.device)

    def close(self) -> None:
        """Stop, and close the device."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        with self._camera as camera:
            try:
                sample(None, lambda: camera.send(np.ascontiguousarray(self._latest())), self._stopped)
            except (RuntimeError, OSError) as error:  # the device is gone; the server goes on without it
                _log.error("the virtual camera has ended: %s", error)


def _open_camera(size: tuple[int, int]) -> Any:
    try:
        import pyvirtualcam
    except ImportError as error:
        raise BackendUnavailable(
            "--virtual-camera needs pyvirtualcam", "pip install 'posecrafter-rt[camera]'"
        ) from error
    try:
        return pyvirtualcam.Camera(width=size[1], height=size[0], fps=SAMPLES_PER_SECOND)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"there is no virtual camera: {first_line(error)}",
            "Linux: sudo modprobe v4l2loopback exclusive_caps=1; macOS and Windows: install OBS and start its camera once",
        ) from error
