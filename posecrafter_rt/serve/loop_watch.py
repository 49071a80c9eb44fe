"""How long an event loop stood still: what it hears then may have waited at its sockets since.

Layer 7: asyncio.
"""

from __future__ import annotations

import asyncio
import time

_EVERY_S = 0.05
_LATE_S = 0.05  # a tick that comes later than this was held up
_BACKLOG_S = 0.05  # how long after a standstill the loop still hears what came in it


class LoopWatch:
    """Ticks on a loop. A machine that is short of time, or one long computation, makes ticks late."""

    def __init__(self) -> None:
        self._tick_s = float("inf")  # not watched yet
        self._still_from_s = self._still_to_s = float("-inf")

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            self.tick(time.perf_counter())
            await asyncio.sleep(_EVERY_S)

    def tick(self, now_s: float) -> None:
        """The loop goes round."""
        if self._is_late(now_s):
            self._still_from_s, self._still_to_s = self._tick_s, now_s
        self._tick_s = now_s

    def earliest_s(self, now_s: float) -> float:
        """When what is heard now may have come at the earliest; both by `time.perf_counter`."""
        if self._is_late(now_s):  # the tick that will tell of it is still to come
            return self._tick_s
        return self._still_from_s if now_s - self._still_to_s <= _BACKLOG_S else now_s

    def _is_late(self, now_s: float) -> bool:
        return now_s - self._tick_s > _EVERY_S + _LATE_S
