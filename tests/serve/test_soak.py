"""Four clients that join and leave: memory stays flat, no frame comes that is older than a second, places become free.

Ten seconds by default; half an hour with `-m slow`.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.machine import return_freed_memory
from posecrafter_rt.runtime.stream import AvatarStream
from posecrafter_rt.serve.options import MAX_AGE_S, ServeOptions
from tests.serve.drawn import Running, running, wait_until
from tests.serve.soak_clients import Seen

NUM_CLIENTS = 4
MAX_GROWTH_BYTES = 30e6
WAY_MS = 100  # there and back; the server's own measure ends with the sending


def serve_clients(server: Running, seconds: float) -> Seen:
    """What clients of another process see in so many seconds; nothing is left of them."""
    call = [sys.executable, "-m", "tests.serve.soak_clients", server.url("/ws", "ws"), str(seconds), str(NUM_CLIENTS)]
    clients = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=seconds + 120)
    assert clients.returncode == 0, clients.stderr
    seen = Seen(**json.loads(clients.stdout))
    assert not seen.problems, seen.problems
    # Those who said no farewell are noticed, too.
    wait_until(lambda: server.app.state.service.num_sessions == 0 and not open_streams(), 60)
    return seen


def memory_bytes() -> int:
    gc.collect()
    return_freed_memory()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("seconds", [10, pytest.param(1800, marks=pytest.mark.slow)])
def test_clients_come_and_go(tiny_engine: Path, seconds: int) -> None:
    options = ServeOptions(stream={"steps": 1, "window": 2}, max_sessions=NUM_CLIENTS)
    with Avatar.load(tiny_engine) as avatar, running(avatar, options) as server:
        serve_clients(server, max(4.0, seconds / 10))  # what is allocated once
        before = memory_bytes()
        seen = serve_clients(server, seconds)
        growth = memory_bytes() - before
        ages = server.app.state.service.metrics.registry.get_sample_value
        num_sent = ages("posecrafter_frame_age_seconds_count")
        num_sent_in_time = ages("posecrafter_frame_age_seconds_bucket", {"le": "1.0"})
        facts = f"{seen}, memory grew by {growth / 1e6:.1f} MB"
    logging.getLogger(__name__).info(facts)
    assert seen.num_sessions > seconds / 2 and seen.num_frames > seconds, facts
    assert num_sent == num_sent_in_time and seen.oldest_ms < MAX_AGE_S * 1000 + WAY_MS, facts
    assert growth < MAX_GROWTH_BYTES, facts


def open_streams() -> list[AvatarStream]:
    """Streams that are not freed."""
    gc.collect()
    return [value for value in gc.get_objects() if type(value) is AvatarStream]
