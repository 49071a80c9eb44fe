"""Recordings of what clients are shown: mp4 files that live as long as the server.

Layer 7: a thread for each recording.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.serve.sampling import SAMPLES_PER_SECOND, sample
from posecrafter_rt.video_io import VideoWriter

MAX_SECONDS = 600
MAX_OF_CLIENT = 4  # finished; then the client's oldest goes

log = logging.getLogger(__name__)


class Recording:
    """One video in the making. on_end: told the error that ended it, or None; on the recording's thread."""

    def __init__(
        self,
        path: Path,
        latest: Callable[[], np.ndarray],
        on_end: Callable[[PoseCrafterError | None], None],
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self.path = path
        self._latest, self._on_end = latest, on_end
        self._stopped = threading.Event()
        self._count = max(1, round(max_seconds * SAMPLES_PER_SECOND))
        self._thread = threading.Thread(target=self._run, name="posecrafter-recording", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end; `on_end` is told when the file is whole."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until the file is whole."""
        self._thread.join()

    def _run(self) -> None:
        error: PoseCrafterError | None = None
        try:
            with VideoWriter(self.path, SAMPLES_PER_SECOND) as writer:
                writer.write(self._latest())
                sample(self._count - 1, lambda: writer.write(self._latest()), self._stopped)
        except PoseCrafterError as failure:
            error = failure
        except OSError as failure:
            error = PoseCrafterError(f"the recording failed: {failure.strerror}")
        except Exception as failure:  # or whoever records would wait for its end for good
            log.exception("a recording failed")
            error = PoseCrafterError(f"the recording failed: {type(failure).__name__}")
        self._on_end(error)


class Finished(NamedTuple):
    """A video that is whole, and the client who made it."""

    path: Path
    client: str


class Recordings:
    """All recordings of a server, in a temporary folder that goes with it. Begun and ended on one thread.

    Four finished ones are kept for each client that is there, whatever the others do. Those of clients who have left stay
    as long as there is room: four times `max_clients`, the clients at a time, in all; else their oldest go.
    """

    def __init__(self, max_clients: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="posecrafter-recordings-")
        self._max_finished = MAX_OF_CLIENT * max_clients
        self._clients: set[str] = set()  # who has recorded and is there
        self._running: dict[str, Recording] = {}
        self._finished: dict[str, Finished] = {}  # oldest first
        self._lock = threading.Lock()

    def begin(
        self, client: str, latest: Callable[[], np.ndarray], on_end: Callable[[str, PoseCrafterError | None], None]
    ) -> str:
        """Record what `latest` gives. Returns its name, which only this client is told; `on_end` is told it, too."""
        name = secrets.token_urlsafe(16)
        path = Path(self._folder.name) / f"{name}.mp4"
        with self._lock:
            self._clients.add(client)
            self._running[name] = Recording(path, latest, partial(self._ended, name, client, on_end))
        return name

    def end(self, name: str) -> None:
        """Finish one; nothing where it has ended."""
        with self._lock:
            recording = self._running.get(name)
        if recording is not None:
            recording.stop()

    def leave(self, client: str) -> None:
        """A client is gone: what it has finished may make room for others, and what it has not is not kept."""
        with self._lock:
            self._clients.discard(client)

    def path(self, name: str) -> Path | None:
        """A finished recording's file."""
        with self._lock:
            finished = self._finished.get(name)
        return None if finished is None else finished.path

    def close(self) -> None:
        """End all and delete the files."""
        with self._lock:
            running = list(self._running.values())
        for recording in running:
            recording.stop()
        for recording in running:
            recording.join()
        self._folder.cleanup()

    def _ended(
        self, name: str, client: str, on_end: Callable[[str, PoseCrafterError | None], None],
        error: PoseCrafterError | None,
    ) -> None:  # fmt: skip
        with self._lock:
            path = self._running.pop(name).path
            if client not in self._clients:  # nobody will be told where it is
                path.unlink(missing_ok=True)
            elif error is None:
                self._finished[name] = Finished(path, client)
                self._make_room(client)
        on_end(name, error)

    def _make_room(self, client: str) -> None:
        own = [name for name, finished in self._finished.items() if finished.client == client]
        self._delete(own[:-MAX_OF_CLIENT])
        left = [name for name, finished in self._finished.items() if finished.client not in self._clients]
        self._delete(left[: max(0, len(self._finished) - self._max_finished)])

    def _delete(self, names: list[str]) -> None:
        for name in names:
            self._finished.pop(name).path.unlink(missing_ok=True)
