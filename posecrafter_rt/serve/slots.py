"""Where a thread leaves values for the event loop: the newest frame, and a few texts.

Layer 7: asyncio.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Slots(Generic[T]):
    """A short queue; when it is full, the oldest value makes room for the next. One taker, on the loop that made it.

    on_overtaken: called on the loop for each value that was never taken.
    """

    def __init__(self, count: int, on_overtaken: Callable[[], None] = lambda: None) -> None:
        self._on_overtaken = on_overtaken
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._values: deque[T] = deque(maxlen=count)

    def put(self, value: T) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._append, value)

    def _append(self, value: T) -> None:
        if len(self._values) == self._values.maxlen:
            self._on_overtaken()
        self._values.append(value)
        self._filled.set()

    async def take(self) -> T:
        """Wait for the next value and take it."""
        await self._filled.wait()
        value = self._values.popleft()
        if not self._values:
            self._filled.clear()
        return value
