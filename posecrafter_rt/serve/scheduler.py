"""The one thread that uses the engine: sessions in turns, and jobs between them.

Layer 7: knows nothing of sessions but that they take a turn.
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
    """Calls `turn(key, value)` for what was put, one at a time; an exception in one turn does not touch the next.

    What a turn returns True for gets another one, unless something newer was put.
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
        """Take back what was put."""
        self._mailbox.discard(key)

    def call(self, job: Callable[[], R]) -> Future[R]:
        """Do something on the engine's thread, soon: one turn may come before each job. Once stopped, the future is cancelled."""
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:  # whoever asked for it gets it
                    future.set_exception(error)

        if not self._mailbox.put_job(run):
            future.cancel()
        return future

    def stop(self) -> None:
        """Do the jobs that are left, and end once the turn at work is over."""
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
            except Exception:  # the thread's boundary: the others are served all the same
                _log.exception("a turn failed")
