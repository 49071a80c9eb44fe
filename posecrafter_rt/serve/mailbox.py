"""One place per sender, taken in the order in which they were filled: the newest wins, nobody waits twice.

Layer 7: between the event loop, which puts, and the worker, which takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Mailbox(Generic[K, V]):
    """One value per key, and jobs; `take` alternates between the two. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._values: dict[K, V] = {}  # in the order of their turns: a dict keeps a key's place when its value changes
        self._jobs: list[Callable[[], None]] = []
        self._was_job = False  # whether a job was taken last
        self._is_closed = False

    def put(self, key: K, value: V) -> V | None:
        """Leave a value. Returns the one that it overtakes, whose turn it takes, or None."""
        with self._changed:
            overtaken = self._values.get(key)
            self._values[key] = value
            self._changed.notify()
            return overtaken

    def put_if_free(self, key: K, value: V) -> None:
        """Leave a value unless the key has one."""
        with self._changed:
            self._values.setdefault(key, value)
            self._changed.notify()

    def put_job(self, job: Callable[[], None]) -> bool:
        """Leave a job to do between two values. Returns False if the mailbox is closed: nobody will do it."""
        with self._changed:
            if self._is_closed:
                return False
            self._jobs.append(job)
            self._changed.notify()
            return True

    def discard(self, key: K) -> None:
        """Remove a key's value."""
        with self._changed:
            self._values.pop(key, None)

    def take(self) -> Callable[[], None] | tuple[K, V] | None:
        """Wait for the next job, or value with its key. Returns None once it is closed and every job is taken.

        A job goes first, but after a job a value does, so each waits for at most one of the other kind.
        """
        with self._changed:
            while True:
                has_value = bool(self._values) and not self._is_closed
                if self._jobs and not (self._was_job and has_value):
                    self._was_job = True
                    return self._jobs.pop(0)
                if self._is_closed:
                    return None
                if has_value:
                    self._was_job = False
                    key = next(iter(self._values))
                    return key, self._values.pop(key)
                self._changed.wait()

    def close(self) -> None:
        """End `take` once the waiting jobs are taken; values are not taken any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
