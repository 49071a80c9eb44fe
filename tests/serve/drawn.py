"""Servers to speak to: of an avatar that draws its poses, on 127.0.0.1 and a free port.

Tests; `DrawnAvatar` has what a server needs of an avatar, so that what is tested is the server. `test_whole.py` and
`test_command.py` serve a real one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.draw import draw_pose
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve.app import create_app
from posecrafter_rt.serve.listening import listen
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.protocol import PoseMessage, encode_pose
from posecrafter_rt.serve.server import server_config

SIZE = (64, 48)


def make_pose(shift: float = 0.0) -> np.ndarray:
    """A person on a canvas of SIZE, moved to the right: float32 (134, 3)."""
    rng = np.random.default_rng(5)
    pose = np.ones((134, 3), np.float32)
    pose[:, 0], pose[:, 1] = rng.uniform(8, 36, 134) + shift, rng.uniform(6, 58, 134)
    return pose


@dataclass
class DrawnStream:
    """Draws each pose, after `seconds`; fails for poses whose first point lies at x < -500, as a network might.

    Pipelined, a step gives the drawing of the pose that was given `steps - 1` steps before, none of them a repeat.
    """

    owner: DrawnAvatar
    options: Any = field(default_factory=lambda: SimpleNamespace(steps=1, window=1, is_pipelined=False))
    last: Any = None
    is_closed: bool = False
    past: np.ndarray | None = None
    pending: deque[np.ndarray] = field(default_factory=deque)

    def step(self, pose: np.ndarray | None) -> np.ndarray:
        self.owner.steps.append((id(self), threading.get_ident()))
        time.sleep(self.owner.seconds)
        delay = self.options.steps - 1 if self.options.is_pipelined else 0
        is_repeat = not delay and pose is not None and self.past is not None and np.array_equal(pose, self.past)
        self.last = SimpleNamespace(held=pose is None, is_repeat=is_repeat, reset=False, lost=False)
        if pose is not None and pose[0, 0] < -500:
            raise RuntimeError("a step that fails")
        self.past = self.past if pose is None else pose
        self.pending.append(np.zeros((*SIZE, 3), np.uint8) if pose is None else draw_pose(pose, SIZE))
        return self.pending.popleft() if len(self.pending) > delay else self.owner.frames[0]

    def close_itself(self, pose: np.ndarray | None) -> np.ndarray:
        """What `step` is when float32 is needed, and cannot be had."""
        self.is_closed = True
        raise PoseCrafterError("the networks cannot be loaded in float32", "free some memory")

    def reset(self) -> None:
        self.past = None
        self.pending.clear()
        self.owner.num_resets += 1


@dataclass
class DrawnAvatar:
    """An avatar whose streams draw. seconds: what a step takes. steps: (stream, thread) of each so far."""

    seconds: float = 0.0
    size: tuple[int, int] = SIZE
    prompt: str = "a drawing"
    num_open: int = 0
    num_resets: int = 0
    steps: list[tuple[int, int]] = field(default_factory=list)
    folder: Any = field(default_factory=lambda: SimpleNamespace(
        name="drawn.engine", manifest={"backend": "torch", "precision": "fp32", "device": {"type": "cpu", "name": "pencil"}}))  # fmt: skip

    def __post_init__(self) -> None:
        self.poses = PoseSequence(np.stack([make_pose(), make_pose(2)]), SIZE, 25.0)
        self.frames = np.stack([draw_pose(pose, SIZE) for pose in self.poses])

    @contextlib.contextmanager
    def stream(self, **options: Any) -> Iterator[DrawnStream]:
        self.num_open += 1
        try:
            yield DrawnStream(self, SimpleNamespace(**{"steps": 1, "window": 1, "is_pipelined": False, **options}))
        finally:
            self.num_open -= 1


@dataclass
class Running:
    """A server that runs. port: where; app: its application."""

    port: int
    app: Any

    def url(self, path: str = "/", scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{path}"


@contextlib.contextmanager
def running(avatar: Any, options: ServeOptions, port: int = 0) -> Iterator[Running]:
    """Serve on a thread while the block lasts; port 0 takes any that is free."""
    app = create_app(avatar, options)
    server = uvicorn.Server(server_config(app))
    with listen("127.0.0.1", port) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            assert server.started
            yield Running(listener.getsockname()[1], app)
        finally:
            server.should_exit = True
            thread.join(timeout=60)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something that must come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def pose_bytes(sequence: int, shift: float = 0.0, *, nobody: bool = False) -> bytes:
    """A pose message, sent now."""
    return encode_pose(PoseMessage(sequence, time.time() * 1000, SIZE, None if nobody else make_pose(shift)))
