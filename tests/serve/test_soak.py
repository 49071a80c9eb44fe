"""Four clients that join and leave: memory stays flat, no frame comes that is older than a second, places become free.

Six seconds by default, on `torch`; half an hour with `-m slow`, on `openvino` where it is installed. `-rP` shows the line
that each prints, and `--junitxml` has it as a property (not with xdist).
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.machine import return_freed_memory
from posecrafter_rt.runtime.stream import AvatarStream
from posecrafter_rt.serve.options import MAX_AGE_S, ServeOptions
from tests.serve.drawn import Running, running, wait_until
from tests.serve.soak_clients import Seen

NUM_CLIENTS = 4
MAX_GROWTH_BYTES = 30e6
WAY_MS = 300  # there and back; the server's own measure ends with the sending


@pytest.fixture(autouse=True)
def shows_old_frames() -> None:
    """Here their age counts."""


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


def openvino_engine(checkpoint: Path, folder: Path) -> Path:
    options = BuildOptions(backend="openvino", precision="fp32")
    return build_engine(checkpoint, folder / "openvino.engine", options).folder.path


@pytest.mark.parametrize("seconds", [6, pytest.param(1800, marks=pytest.mark.slow)])
def test_clients_come_and_go(
    tiny_engine: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    seconds: int,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    is_long = seconds > 60 and importlib.util.find_spec("openvino") is not None
    engine = openvino_engine(tiny_checkpoint, tmp_path) if is_long else tiny_engine
    options = ServeOptions(stream={"steps": 1, "window": 2}, max_sessions=NUM_CLIENTS)
    with Avatar.load(engine) as avatar, running(avatar, options) as server:
        serve_clients(server, max(2.0, seconds / 10))  # what is allocated once
        before = memory_bytes()
        seen = serve_clients(server, seconds)
        growth = memory_bytes() - before
        ages = server.app.state.service.metrics.registry.get_sample_value
        num_sent = ages("posecrafter_frame_age_seconds_count")
        num_sent_in_time = ages("posecrafter_frame_age_seconds_bucket", {"le": "1.0"})
        result = {"backend": avatar.folder.manifest["backend"], "seconds": seconds, "sessions": seen.num_sessions,
                  "frames": seen.num_frames, "oldest_frame_ms": round(seen.oldest_ms), "growth_mb": round(growth / 1e6, 1)}  # fmt: skip
    record_testsuite_property(f"soak_{seconds}_s", json.dumps(result))
    sys.stdout.write(f"soak: {json.dumps(result)}\n")
    facts = f"{result}, {seen}"
    assert seen.num_sessions > seconds / 2 and seen.num_frames > seconds, facts
    assert num_sent == num_sent_in_time and seen.oldest_ms < MAX_AGE_S * 1000 + WAY_MS, facts
    assert growth < MAX_GROWTH_BYTES, facts


def open_streams() -> list[AvatarStream]:
    """Streams that are not freed."""
    gc.collect()
    return [value for value in gc.get_objects() if type(value) is AvatarStream]
