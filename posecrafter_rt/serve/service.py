"""A served avatar: its engine thread, its sessions, recordings and camera.

Layer 7: on the event loop, except for what it hands to the engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posecrafter_rt.errors import OutOfMemory, PoseCrafterError
from posecrafter_rt.machine import return_freed_memory
from posecrafter_rt.poses.fit import median_pose
from posecrafter_rt.serve.faults import MANY, Faults
from posecrafter_rt.serve.loop_watch import LoopWatch
from posecrafter_rt.serve.metrics import Metrics
from posecrafter_rt.serve.options import MAX_AGE_S, ServeOptions
from posecrafter_rt.serve.poses_api import has_pose_extraction
from posecrafter_rt.serve.protocol import error_message
from posecrafter_rt.serve.recording import AT_ITS_LIMIT, Recordings
from posecrafter_rt.serve.scheduler import Scheduler
from posecrafter_rt.serve.session import Session, Stream, Waiting, faster_hint, steps_in_flight
from posecrafter_rt.serve.virtual_camera import VirtualCamera

if TYPE_CHECKING:
    from posecrafter_rt.avatar import Avatar
    from posecrafter_rt.runtime.stream_options import StreamOptions

STATS_EVERY_S = 1.0
LEAVING_SHARE = 0.04  # of a turn's time: the most that a frame may take to leave before the next turn begins
_log = logging.getLogger(__name__)


class SessionsFull(PoseCrafterError):
    """As many clients are connected as the server takes."""


class Service:
    """Everything that lives as long as the server. reference: (H, W, 3) uint8, shown before the first pose.

    watch: of the event loop; whoever runs the loop must run it.
    """

    def __init__(self, avatar: Avatar, options: ServeOptions) -> None:
        self.avatar, self.options = avatar, options
        self.metrics = Metrics(lambda: self.num_sessions)
        self.watch = LoopWatch()
        self._faults = Faults()
        self.reference: np.ndarray = avatar.frames[0]
        self.stream_options: StreamOptions | None = None  # known once there was a stream
        self._reference_pose = median_pose(avatar.poses.keypoints)
        self._scheduler: Scheduler[Session, Waiting] = Scheduler(self._turn)
        self._sessions: dict[str, Session] = {}  # in the order in which they came
        self._num_opening = 0
        self._recordings: Recordings | None = None
        self._recording_of: dict[str, str] = {}  # session → recording
        self._camera: VirtualCamera | None = None

    @property
    def num_sessions(self) -> int:
        return len(self._sessions) + self._num_opening

    @property
    def is_running(self) -> bool:
        """Whether the engine's thread is alive."""
        return self._scheduler.is_running

    @property
    def is_healthy(self) -> bool:
        """Whether that thread is alive, and does not fail at everything it does."""
        return self.is_running and self._faults.num_in_a_row < MANY

    def start(self) -> None:
        """Start the engine's thread and do a first step; does nothing if it runs. Raises: PoseCrafterError."""
        if self.is_running:
            return
        if self._recordings is not None:
            raise PoseCrafterError("this service has ended", "make another")
        if self.options.has_virtual_camera:
            self._camera = VirtualCamera(self.avatar.size, self._first_frame)
        self._recordings = Recordings(self.options.max_sessions)
        self._scheduler.start()
        try:
            self._scheduler.call(self._warm_up).result()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _log.warning("interrupted; the server ends after its first step")
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the engine's thread, and delete the recordings. The sessions must have ended."""
        if self._camera is not None:
            self._camera.close()
        self._scheduler.stop()
        if self._recordings is not None:
            self._recordings.close()

    def offer(self, session: Session, waiting: Waiting) -> None:
        """Take a session's pose; it is rendered in its turn, unless a newer one comes first."""
        self.metrics.received.inc()
        overtaken = self._scheduler.put(session, waiting)
        if overtaken is not None and not overtaken.is_stepped:
            session.count_overtaken()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Open a client's session; it ends with the block. Raises: SessionsFull; PoseCrafterError from its stream."""
        if self.num_sessions >= self.options.max_sessions:
            self.metrics.refused.inc()
            raise SessionsFull(
                f"no place is free, of {self.options.max_sessions}", "try again later, or close another page"
            )
        self._num_opening += 1
        try:
            stream, resources = await asyncio.wrap_future(self._scheduler.call(self._open_stream))
        finally:
            self._num_opening -= 1
        session = Session(stream, self.reference, self._reference_pose, self.metrics, self._faults)
        self._sessions[session.id] = session
        session.texts.put(self._ready(session))
        stats = asyncio.create_task(_tell_stats(session))
        try:
            yield session
        finally:
            stats.cancel()
            self._forget(session)
            self._scheduler.call(resources.close)

    def record(self, session: Session, on: bool) -> None:
        """Begin or end a session's recording. Its client is told when it begins, and where the file is when it ends."""
        assert self._recordings is not None
        if not on:
            self._recordings.end(self._recording_of.pop(session.id, ""))
        elif not session.is_closed and session.id not in self._recording_of:  # a WebRTC peer is heard a moment longer
            loop = asyncio.get_running_loop()

            def on_end(name: str, error: PoseCrafterError | None) -> None:  # on the recording's thread, perhaps at once
                loop.call_soon_threadsafe(self._recorded, session, name, error)

            self._recording_of[session.id] = self._recordings.begin(session.id, lambda: session.latest, on_end)
            session.texts.put({"type": "recording", "on": True, "url": None})

    def recording(self, name: str) -> Path | None:
        """Return the file of a finished recording, or None."""
        return None if self._recordings is None else self._recordings.path(name)

    def info(self) -> dict[str, Any]:
        """Return what is served, as `/api/info` tells it."""
        manifest = self.avatar.folder.manifest
        return {
            "name": self.avatar.folder.name, "size": list(self.avatar.size), "prompt": self.avatar.prompt,
            "device": manifest["device"]["name"], "has_pose_extraction": has_pose_extraction(),
            "preset": self.options.stream.get("preset", "balanced"), **self._state(),
        }  # fmt: skip

    def _state(self) -> dict[str, Any]:
        manifest, options = self.avatar.folder.manifest, self.stream_options
        assert options is not None
        return {
            "backend": manifest["backend"], "precision": manifest["precision"], "steps": options.steps,
            "window": options.window, "in_flight": steps_in_flight(options),
            "sessions": self.num_sessions, "max_sessions": self.options.max_sessions,
        }  # fmt: skip

    def _ready(self, session: Session) -> dict[str, Any]:
        return {"type": "ready", "session": session.id, "size": list(self.avatar.size), **self._state()}

    def _turn(self, session: Session, waiting: Waiting) -> bool:
        """Take a session's turn; see `Session.render`. On the engine's thread.

        On a CPU the next step keeps all cores busy, and a frame would take two to five times as long to leave.
        """
        started_s = time.perf_counter()
        is_more = session.render(waiting)
        if self.avatar.folder.manifest["device"]["type"] == "cpu":
            session.wait_until_left(LEAVING_SHARE * (time.perf_counter() - started_s))
        return is_more

    def _open_stream(self) -> tuple[Stream, ExitStack]:
        """Open a stream, and return it with what frees it. On the engine's thread. Raises: PoseCrafterError."""
        resources = ExitStack()
        resources.callback(return_freed_memory)  # runs last; else freed memory adds up as clients come and go
        try:
            return resources.enter_context(self.avatar.stream(**self.options.stream)), resources
        except Exception as error:
            # Without memory for one more client, those who are here may be served well.
            is_counted = not isinstance(error, OutOfMemory)
            told = self._faults.note("opening the stream", error, is_counted=is_counted)
            raise told from None if told is error else error

    def _warm_up(self) -> None:
        """Do a first step, so that what it sets up is ready before the first client. On the engine's thread."""
        with self.avatar.stream(**self.options.stream) as stream:
            self.stream_options = stream.options
            stream.step(self.avatar.poses.keypoints[0])
            stream.reset()
            started_s = time.perf_counter()
            self.reference = stream.step(None)
            self._warn_if_slow(time.perf_counter() - started_s, stream.options)

    def _warn_if_slow(self, step_s: float, options: StreamOptions) -> None:
        """Warn if even a single client would hardly see a frame, because old frames are not shown."""
        num_steps = steps_in_flight(options)
        if num_steps * step_s > MAX_AGE_S:
            _log.warning("a frame comes %.1f s after its pose here, in turns of %.1f s, and none older than %g s is shown: %s",
                         num_steps * step_s, step_s, MAX_AGE_S, faster_hint(options))  # fmt: skip

    def _first_frame(self) -> np.ndarray:
        """Return what the camera shows: never another visitor, because the first one holds still."""
        sessions = list(self._sessions.values())
        return sessions[0].latest if sessions else self.reference

    def _forget(self, session: Session) -> None:
        self._sessions.pop(session.id, None)
        session.is_closed = True
        self._scheduler.discard(session)
        if self._recordings is not None:
            self._recordings.leave(session.id)  # first, so that a recording that ends from now on is not kept
        self.record(session, False)

    def _recorded(self, session: Session, name: str, error: PoseCrafterError | None) -> None:
        """Handle the end of a recording. On the event loop, like everything that uses `_recording_of`."""
        reason = None
        if self._recording_of.get(session.id) == name:  # it ended by itself: at its greatest length, or by an error
            self._recording_of.pop(session.id, None)
            reason = AT_ITS_LIMIT if error is None else None  # an error is told by its own message
        url = None if error is not None else f"/api/recordings/{name}.mp4"
        is_on = session.id in self._recording_of  # the client may have begun another meanwhile
        session.texts.put({"type": "recording", "on": is_on, "url": url, "reason": reason})
        if error is not None:
            session.texts.put(error_message(error))


async def _tell_stats(session: Session) -> None:
    """Send stats once per second. Clients also see by them that the connection lives."""
    while True:
        begin_s, num_before = time.perf_counter(), session.num_shown
        await asyncio.sleep(STATS_EVERY_S)
        session.texts.put(session.stats(time.perf_counter() - begin_s, num_before))
