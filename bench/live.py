"""One live run: sends poses at a camera's pace to a stream in this process or to a server, and records what is shown.

Bench: imported by latency.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import urlsplit

import cv2
import numpy as np
import torch

from bench.runs import Stages
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.engines.base import Engine
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.runtime import stream as stream_module
from posecrafter_rt.runtime.stream import AvatarStream
from posecrafter_rt.runtime.stream_options import StreamOptions
from posecrafter_rt.serve.mailbox import Mailbox
from posecrafter_rt.serve.protocol import REPEAT, PoseMessage, decode_frame, encode_pose
from posecrafter_rt.spec import SHALLOW_STREAM, STREAM_NETWORKS

SLACK_S = 0.001  # a camera's thread may be delayed between reading its clock and leaving the pose
MIN_FRAMES = 4
LAST_FRAME_S = 1.0  # how long to wait for another frame
BUDGET_FRAMES = 20
Row = dict[str, Any]


class Shown(NamedTuple):
    """A frame that was shown.

    number: of its pose. at_s: when it was available as an array. is_repeat: nothing was computed for it. took_s:
    seconds of the step that made it.
    """

    number: int
    at_s: float
    is_repeat: bool
    took_s: float


class Trace(NamedTuple):
    """What was seen of one run. offered: when each pose was available, in seconds of the same clock as `Shown.at_s`."""

    offered: list[float]
    shown: list[Shown]


class RunFailed(Exception):
    """Almost nothing was shown, or the server did not start or broke off."""


def percentiles(seconds: np.ndarray, *ranks: int) -> dict[str, float]:
    """Return percentiles in milliseconds by name, such as `p50`; 100 is `max`."""
    values = np.percentile(seconds, ranks) * 1e3
    return {"max" if rank == 100 else f"p{rank}": round(float(value), 2)
            for rank, value in zip(ranks, values, strict=True)}  # fmt: skip


def summarise(trace: Trace) -> Row:
    """Summarise a run; times are in milliseconds.

    latency: from when a pose is available to when its frame is. jitter: how much the intervals between frames change
    from one to the next. dropped: poses between the first and the last shown one that have no frame. behind: how much
    older a frame's pose is than the newest pose when the frame comes. overdue: frames that come longer after the next
    pose than after the frame before. frame: the step that made the frame; for a server, as the server reports it.
    Raises: RunFailed if fewer than MIN_FRAMES frames were shown.
    """
    if len(trace.shown) < MIN_FRAMES:
        raise RunFailed(f"{len(trace.shown)} frames were shown in all")
    number, at, is_repeat, took = (np.array(values) for values in zip(*trace.shown, strict=True))
    offered = np.array(trace.offered)
    newest = np.searchsorted(offered, at, side="right") - 1
    following = offered[np.minimum(number + 1, len(offered) - 1)]
    waited = np.where(newest > number, at - following, 0.0)
    intervals = np.diff(at)
    changes = np.diff(intervals)
    return {
        "num_frames": len(at), "num_repeats": int(is_repeat.sum()),
        "num_dropped": int(number[-1] - number[0] + 1 - len(number)), "num_poses": int(number[-1] - number[0] + 1),
        "fps": round((len(at) - 1) / float(at[-1] - at[0]), 2),
        "latency_ms": percentiles(at - offered[number], 50, 95, 99),
        "frame_ms": percentiles(took, 50, 95, 99),
        "jitter_ms": {"std": round(float(changes.std() * 1e3), 2), **percentiles(np.abs(changes), 95)},
        "behind_ms": percentiles(offered[newest] - offered[number], 50, 95, 100),
        "num_overdue": int((waited[1:] > intervals + SLACK_S).sum()),
    }  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """Poses on the avatar's canvas, played back and forth so that none jumps: `rate` per second, for `seconds`."""

    poses: PoseSequence
    rate: float
    seconds: float

    def pose(self, number: int) -> np.ndarray:
        """Return pose number `number`: (134, 3)."""
        last = len(self.poses) - 1
        return self.poses.keypoints[last - abs(number % (2 * last) - last)]

    def play(self, offer: Callable[[], None]) -> None:
        """Call `offer` at the camera's rate; after a delay it catches up."""
        start = time.perf_counter()
        for number in range(max(1, round(self.rate * self.seconds))):
            time.sleep(max(0.0, start + number / self.rate - time.perf_counter()))
            offer()


def num_behind(options: StreamOptions) -> int:
    """Return how many calls later a pose's frame comes."""
    return options.steps - 1 if options.is_pipelined else 0


def follow(stream: AvatarStream, camera: Camera) -> Trace:
    """Stream live: another thread offers poses, of which the newest wins; this thread takes them and steps."""
    mailbox: Mailbox[str, int] = Mailbox()
    trace = Trace([], [])

    def offer() -> None:
        trace.offered.append(time.perf_counter())
        mailbox.put("pose", len(trace.offered) - 1)

    def film() -> None:
        try:
            camera.play(offer)
        finally:
            mailbox.close()

    flying: deque[int] = deque(maxlen=num_behind(stream.options) + 1)
    threading.Thread(target=film, daemon=True).start()
    while (taken := mailbox.take()) is not None:
        assert isinstance(taken, tuple)
        flying.append(taken[1])
        begin = time.perf_counter()
        stream.step(camera.pose(taken[1]))
        end = time.perf_counter()
        if len(flying) == flying.maxlen:
            trace.shown.append(Shown(flying[0], end, stream.last.is_repeat, end - begin))
    return trace


def measure_stream(avatar: Avatar, options: StreamOptions, camera: Camera) -> Row:
    """Measure one way of streaming in this process.

    open_s: from opening the first stream with these options, which samples the reference, to its first frame.
    first_frame_s: the same for a later stream.
    """
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        with avatar.stream(options) as stream:
            for number in range(num_behind(options) + 1):
                stream.step(camera.pose(number))
            seconds.append(time.perf_counter() - begin)
    with avatar.stream(options) as stream:
        stages = measure_stages(stream, camera)
    with avatar.stream(options) as stream:
        trace = follow(stream, camera)
    open_s, first_frame_s = (round(value, 3) for value in seconds)
    return {"open_s": open_s, "first_frame_s": first_frame_s, "stages_ms": stages, **summarise(trace)}


class Watched:
    """An engine whose calls are timed as a stage."""

    def __init__(self, engine: Engine, stages: Stages, name: str) -> None:
        self.engine, self.spec, self.device, self.stages, self.name = engine, engine.spec, engine.device, stages, name
        self.has_own_threads = engine.has_own_threads

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.stages(self.name):
            return self.engine(**inputs)

    def swap_weights(self, tensors: Any) -> set[str]:
        return self.engine.swap_weights(tensors)


def measure_stages(stream: AvatarStream, camera: Camera) -> dict[str, float]:
    """Return the mean milliseconds of a frame by stage, without a camera; it waits for the GPU at each stage's end.

    Embedding a pose includes drawing it, and decoding includes the conversion to a picture.
    """
    stages = Stages()
    names = {**{network: network.removesuffix("_stream") for network in STREAM_NETWORKS}, SHALLOW_STREAM: "unet"}
    engines = {name: Watched(engine, stages, names[name]) if name in names else engine
               for name, engine in stream.engines.items()}  # fmt: skip

    def timed(name: str) -> Callable[..., Any]:
        function = getattr(stream_module, name)

        def call(*arguments: Any) -> Any:
            with stages(name):
                made = function(*arguments)
                return iter(list(made)) if isinstance(made, Iterator) else made  # a generator runs only when it is read

        return call

    watched = AvatarStream(engines, stream.reference, stream.options)
    with ExitStack() as patches, watched:
        for name in ("edit_latents", "embed_poses", "decode"):
            patches.enter_context(patch.object(stream_module, name, timed(name)))
        for number in range(BUDGET_FRAMES + 2 * stream.options.steps):
            if number == 2 * stream.options.steps:  # warm, and the pipeline is full
                stages.seconds.clear()
                begin = time.perf_counter()
            watched.step(camera.pose(number))
        total = time.perf_counter() - begin
    by_name = {"edit": "edit_latents", "pose embedding": "embed_poses", "controlnet": "controlnet", "unet": "unet",
               "decode": "decode"}  # fmt: skip
    seconds = {label: stages.seconds[name] for label, name in by_name.items()}
    seconds |= {"the rest": total - sum(seconds.values()), "all": total}
    return {name: round(value / BUDGET_FRAMES * 1e3, 2) for name, value in seconds.items()}


@contextmanager
def serving(engine: Path, options: StreamOptions) -> Iterator[tuple[str, float]]:
    """Run a server in a process of its own. Yields: the address of its WebSocket, and the seconds until it serves.

    Args: options: those that `serve` has as command-line options are used. Raises: RunFailed with the server's message.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-m", "posecrafter_rt", "serve", str(engine), "--port", "0", "--json",
               "--steps", str(options.steps), "--window", str(options.window), "--unet-every", str(options.unet_every),
               *(["--decoder", options.decoder] if options.decoder else []),
               *(["--pipelined"] if options.is_pipelined else [])]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            line = server.stdout.readline()  # printed once it serves; empty if it ends
            if not line:
                server.wait()
                log.seek(0)
                said = [text.strip() for text in log if text.startswith(("error:", "hint:"))]
                raise RunFailed("; ".join(said) or f"the server ended with {server.returncode}")
            url = urlsplit(json.loads(line)["url"])
            yield url._replace(scheme="ws", path="/ws").geturl(), time.perf_counter() - begin
        finally:
            server.terminate()


class Client:
    """One client of a server. offered: when each pose was available, by number."""

    def __init__(self, socket: Any, camera: Camera) -> None:
        self.socket, self.camera = socket, camera
        self.offered: list[float] = []
        socket.send(json.dumps({"type": "configure", "format": "jpeg", "fit": "canvas"}))

    def offer(self) -> None:
        number, now = len(self.offered), time.perf_counter()
        self.offered.append(now)
        message = PoseMessage(number, now * 1e3, self.camera.poses.canvas, self.camera.pose(number))
        self.socket.send(encode_pose(message))

    def next_frame(self, timeout_s: float) -> Shown | None:
        """Return the next frame, decoded, or None if none comes in time. The server's errors are printed to stderr."""
        until = time.perf_counter() + timeout_s
        while (left := until - time.perf_counter()) > 0:
            try:
                message = self.socket.recv(timeout=left)
            except TimeoutError:
                return None
            if not isinstance(message, str):
                header, picture = decode_frame(message)
                frame = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
                assert frame is not None
                cv2.cvtColor(frame, cv2.COLOR_BGR2RGB, frame)
                is_repeat = bool(header.flags & REPEAT)
                return Shown(header.sequence, time.perf_counter(), is_repeat, header.render_ms / 1e3)
            if json.loads(message)["type"] == "error":
                print(message, file=sys.stderr)
        return None


def measure_serve(engine: Path, options: StreamOptions, camera: Camera) -> Row:
    """Measure a server (see `serving`) with one client, over loopback.

    start_s: from starting the process to serving; first_frame_s: from connecting to the first frame.
    Raises: RunFailed also if the package websockets is missing, or the connection ends.
    """
    try:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect
    except ModuleNotFoundError as error:
        raise RunFailed(f"left out: {error.name} is not installed") from error

    with serving(engine, options) as (url, start_s):
        begin = time.perf_counter()
        shown: list[Shown] = []
        try:
            with connect(url, compression=None) as socket:
                client = Client(socket, camera)
                film = threading.Thread(target=camera.play, args=(client.offer,), daemon=True)
                film.start()
                while (frame := client.next_frame(LAST_FRAME_S)) is not None or film.is_alive():
                    shown += [frame] if frame is not None else []
        except WebSocketException as error:
            raise RunFailed(f"the connection ended: {error}") from error
    summary = summarise(Trace(client.offered, shown))
    return {"start_s": round(start_s, 3), "first_frame_s": round(shown[0].at_s - begin, 3), **summary}
