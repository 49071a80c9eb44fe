"""Recordings of what clients are shown: mp4 files that are deleted with the server.

Layer 7: a thread for each recording.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posecrafter_rt.errors import DiskFull, PoseCrafterError
from posecrafter_rt.locks import locked
from posecrafter_rt.serve.sampling import SAMPLES_PER_SECOND, sample
from posecrafter_rt.video_io import VideoWriter

MAX_SECONDS = 600
AT_ITS_LIMIT = "a recording has at most ten minutes"  # MAX_SECONDS
MAX_OF_CLIENT = 4  # finished ones; then the client's oldest is deleted
_PREFIX = "posecrafter-recordings-"

log = logging.getLogger(__name__)


class Recording:
    """One video in the making. on_end: called on the recording's thread with the error that ended it, or None."""

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
        """Ask it to end; `on_end` is called when the file is whole."""
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
        except DiskFull:
            error = DiskFull("the server has no space left for the recording", "free some space there and record again")
        except PoseCrafterError as failure:  # where the server keeps files is not for its clients
            error = PoseCrafterError(str(failure).replace(str(self.path), "the recording"), failure.hint)
        except OSError as failure:
            error = PoseCrafterError(f"the recording failed: {failure.strerror}", "check the server's disk")
        except Exception as failure:  # else the client would wait for its end forever
            log.exception("a recording failed")
            error = PoseCrafterError(f"the recording failed: {type(failure).__name__}", "the server's log says more")
        self._on_end(error)


class Finished(NamedTuple):
    """A finished video, and the client who made it."""

    path: Path
    client: str


class Recordings:
    """All recordings of a server, in a temporary folder that is deleted with it, or by the next server if it is killed.

    Begun and ended on one thread. Four finished ones are kept for each connected client, whatever the others do.
    Those of clients who have left stay until there are more than four times `max_clients` in all; then their oldest are
    deleted. max_clients: at a time.
    """

    def __init__(self, max_clients: int) -> None:
        _clear_leftovers()
        self._folder: Path | None = None  # made with the first recording
        self._held = ExitStack()  # the folder, and a lock on it
        self._max_finished = MAX_OF_CLIENT * max_clients
        self._clients: set[str] = set()  # connected clients that have recorded
        self._running: dict[str, Recording] = {}
        self._finished: dict[str, Finished] = {}  # oldest first
        self._lock = threading.Lock()

    def begin(
        self, client: str, latest: Callable[[], np.ndarray], on_end: Callable[[str, PoseCrafterError | None], None]
    ) -> str:
        """Record what `latest` returns. Returns a name that only this client gets; `on_end` is called with it, too."""
        name = secrets.token_urlsafe(16)
        try:
            path = self._make_folder() / f"{name}.mp4"
        except OSError as error:
            log.warning("no folder for recordings can be made: %s", error)
            on_end(name, PoseCrafterError("the server has no folder for the recording", "the server's log says why"))
            return name
        with self._lock:
            self._clients.add(client)
            self._running[name] = Recording(path, latest, partial(self._ended, name, client, on_end))
        return name

    def end(self, name: str) -> None:
        """Finish a recording; does nothing if it has ended."""
        with self._lock:
            recording = self._running.get(name)
        if recording is not None:
            recording.stop()

    def leave(self, client: str) -> None:
        """Note that a client has left. Its finished recordings may make room for others; a running one is not kept."""
        with self._lock:
            self._clients.discard(client)

    def path(self, name: str) -> Path | None:
        """Return a finished recording's file, or None."""
        with self._lock:
            finished = self._finished.get(name)
        return None if finished is None or not finished.path.is_file() else finished.path

    def close(self) -> None:
        """End all recordings and delete the files."""
        with self._lock:
            running = list(self._running.values())
        for recording in running:
            recording.stop()
        for recording in running:
            recording.join()
        self._held.close()

    def _make_folder(self) -> Path:
        """Return the folder, which only this user can read. It is made anew if it was removed: systems clean up /tmp.

        Raises: OSError.
        """
        while self._folder is None or not self._folder.exists():
            self._held.close()
            self._folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX)))
            with suppress(FileNotFoundError):  # another server has just taken it for a leftover
                self._held.enter_context(locked(self._folder, shared=True))
        return self._folder

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


def _clear_leftovers() -> None:
    """Remove the folders that killed servers of this user left. A server that lives holds its own."""
    with suppress(OSError):  # there may be no temporary folder at all
        for leftover in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with suppress(OSError):
                found = leftover.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                    continue
                with locked(leftover) as is_held:
                    if is_held:
                        shutil.rmtree(leftover, ignore_errors=True)
