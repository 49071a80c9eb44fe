"""How long an event loop stood still: messages that it reads next may have waited at its sockets since.

Layer 7: asyncio.
"""

from __future__ import annotations

import asyncio
import time

_EVERY_S = 0.05
_LATE_S = 0.05  # a tick that is later than this was held up
_BACKLOG_S = 0.05  # how long after a standstill the loop still reads messages that came in it


class LoopWatch:
    """Ticks on an event loop. A busy machine, or one long computation, makes ticks late."""

    def __init__(self) -> None:
        self._tick_s = float("inf")  # not watched yet
        self._still_from_s = self._still_to_s = float("-inf")

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            self.tick(time.perf_counter())
            await asyncio.sleep(_EVERY_S)

    def tick(self, now_s: float) -> None:
        """Note that the loop runs."""
        if self._is_late(now_s):
            self._still_from_s, self._still_to_s = self._tick_s, now_s
        self._tick_s = now_s

    def earliest_s(self, now_s: float) -> float:
        """Return when a message read at `now_s` may have come at the earliest; both by `time.perf_counter`."""
        if self._is_late(now_s):  # the loop stood still, and no tick has noted it yet
            return self._tick_s
        return self._still_from_s if now_s - self._still_to_s <= _BACKLOG_S else now_s

    def _is_late(self, now_s: float) -> bool:
        return now_s - self._tick_s > _EVERY_S + _LATE_S
