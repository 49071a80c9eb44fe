"""The one thread that uses the engine: sessions take turns, with jobs between them.

Layer 7: knows of sessions only that they take turns.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from posecrafter_rt.serve.mailbox import K, Mailbox, V

R = TypeVar("R")
_log = logging.getLogger(__name__)


class Scheduler(Generic[K, V]):
    """Calls `turn(key, value)` for what was put, one at a time. An exception in one turn does not affect the next.

    If a turn returns True, its value gets another turn, unless a newer one was put.
    """

    def __init__(self, turn: Callable[[K, V], bool]) -> None:
        self._turn = turn
        self._mailbox: Mailbox[K, V] = Mailbox()
        self._thread = threading.Thread(target=self._run, name="posecrafter-engine", daemon=True)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def put(self, key: K, value: V) -> V | None:
        """Ask for a turn. Returns the value that this one overtakes, or None."""
        return self._mailbox.put(key, value)

    def discard(self, key: K) -> None:
        """Take back the value that was put."""
        self._mailbox.discard(key)

    def call(self, job: Callable[[], R]) -> Future[R]:
        """Run a job on the engine's thread soon: at most one turn comes before each job.

        Once the scheduler is stopped, the future is cancelled.
        """
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # `call`'s caller gets it
                    future.set_exception(error)

        if not self._mailbox.put_job(run):
            future.cancel()
        return future

    def stop(self) -> None:
        """Do the remaining jobs, and end the thread after the current turn."""
        self._mailbox.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while (item := self._mailbox.take()) is not None:
            if callable(item):
                item()
                continue
            try:
                if self._turn(*item):
                    self._mailbox.put_if_free(*item)
            except Exception:  # the thread must survive, to serve the other sessions
                _log.exception("a turn failed")
