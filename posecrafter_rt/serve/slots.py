"""Where a thread leaves values for the event loop: the newest frame, and a few texts.

Layer 7: asyncio.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Newest(Generic[T]):
    """One place; a value that is not taken in time is replaced by the next. One taker, on the loop that made it.

    on_overtaken: called on the loop for each replaced value.
    """

    def __init__(self, on_overtaken: Callable[[], None]) -> None:
        self._on_overtaken = on_overtaken
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._value: T | None = None

    def put(self, value: T) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._set, value)

    def _set(self, value: T) -> None:
        if self._value is not None:
            self._on_overtaken()
        self._value = value
        self._filled.set()

    async def take(self) -> T:
        """Wait for a value and take it."""
        await self._filled.wait()
        self._filled.clear()
        value, self._value = self._value, None
        assert value is not None
        return value


class Texts(Generic[T]):
    """A short queue of messages; when it is full, the oldest is dropped. One taker, on the loop that made it."""

    def __init__(self, maxlen: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._values: deque[T] = deque(maxlen=maxlen)

    def put(self, value: T) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._append, value)

    def _append(self, value: T) -> None:
        self._values.append(value)
        self._filled.set()

    async def take(self) -> T:
        """Wait for the next message and take it."""
        await self._filled.wait()
        value = self._values.popleft()
        if not self._values:
            self._filled.clear()
        return value
