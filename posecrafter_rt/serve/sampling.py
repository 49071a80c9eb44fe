"""A clock for recordings and cameras, which want the newest frame at a fixed rate.

Layer 7: for a thread of its own, so that an encoder never holds up the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SAMPLES_PER_SECOND = 30


def sample(count: int | None, tick: Callable[[], None], stopped: threading.Event) -> None:
    """Call `tick` 30 times per second until stopped, or `count` times. Late ticks are made up for."""
    begin_s, done = time.perf_counter(), 0
    while count is None or done < count:
        due_s = begin_s + done / SAMPLES_PER_SECOND
        if stopped.wait(max(0.0, due_s - time.perf_counter())):
            return
        tick()
        done += 1
