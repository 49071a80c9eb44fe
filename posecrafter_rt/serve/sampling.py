"""A clock that shows the newest frame to something that wants so many a second: a recording, a camera.

Layer 7: a thread of its own, so that an encoder never holds up the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SAMPLES_PER_SECOND = 30


def sample(count: int | None, tick: Callable[[], None], stopped: threading.Event) -> None:
    """Call `tick` 30 times a second until stopped, or `count` times; late ticks are made up for."""
    begin_s, done = time.perf_counter(), 0
    while count is None or done < count:
        due_s = begin_s + done / SAMPLES_PER_SECOND
        if stopped.wait(max(0.0, due_s - time.perf_counter())):
            return
        tick()
        done += 1
