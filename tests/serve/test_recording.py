"""Recordings: what was shown is in the file, at the pace at which it was shown; bounded, and gone with the server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.serve import recording
from posecrafter_rt.serve.recording import Recording, Recordings
from posecrafter_rt.video_io import read_video
from tests.serve.drawn import SIZE, Running, pose_bytes, wait_until


def told(client: ClientConnection, kind: str = "recording") -> dict:
    while True:
        message = client.recv(timeout=10)
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)


def test_it_shows_what_was_shown_when_it_was(tmp_path: Path) -> None:
    shade = [0]
    ended: list[PoseCrafterError | None] = []
    times = [time.perf_counter()]
    making = Recording(tmp_path / "a.mp4", lambda: np.full((*SIZE, 3), shade[0], np.uint8), ended.append)
    for value in (200, None):
        time.sleep(0.6)
        times.append(time.perf_counter())
        if value is None:
            making.stop()
        else:
            shade[0] = value
    making.join()
    video = read_video(tmp_path / "a.mp4")
    means = video.frames.reshape(len(video), -1).mean(axis=1)
    assert ended == [None] and video.fps == 30 and set(np.round(means, -1)) == {0, 200}
    dark_s, bright_s = np.diff(times)
    assert (means < 100).sum() / 30 == pytest.approx(dark_s, abs=0.4)
    assert (means > 100).sum() / 30 == pytest.approx(bright_s, abs=0.4)


def test_it_is_no_longer_than_it_may_be(tmp_path: Path) -> None:
    ended: list[PoseCrafterError | None] = []
    making = Recording(tmp_path / "a.mp4", lambda: np.zeros((*SIZE, 3), np.uint8), ended.append, max_seconds=0.4)
    making.join()
    assert len(read_video(tmp_path / "a.mp4")) == 12 and ended == [None]


def test_a_failure_is_told(tmp_path: Path) -> None:
    ended: list[PoseCrafterError | None] = []
    making = Recording(tmp_path / "a.mp4", lambda: np.zeros((3, 3), np.uint8), ended.append)
    making.join()
    assert isinstance(ended[0], PoseCrafterError) and not list(tmp_path.iterdir())


def test_the_oldest_files_go_and_all_go_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_FINISHED", 2)
    recordings, ended = Recordings(), []
    for _ in range(3):
        done = threading.Event()
        name = recordings.begin(lambda: np.zeros((*SIZE, 3), np.uint8), lambda name, error, done=done: done.set())
        assert recordings.path(name) is None
        recordings.end(name)
        assert done.wait(20)
        ended.append(name)
    paths = [recordings.path(name) for name in ended]
    assert paths[0] is None and paths[1] is not None and paths[2] is not None
    folder = paths[2].parent
    assert len(list(folder.iterdir())) == 2
    running = recordings.begin(lambda: np.zeros((*SIZE, 3), np.uint8), lambda name, error: None)
    recordings.end("not there")
    recordings.close()
    assert not folder.exists() and running not in recordings._running


def test_a_client_records_and_downloads(serve: Callable[..., Running]) -> None:
    server = serve()
    with connect(server.url("/ws", "ws")) as client:
        client.send('{"type": "record", "on": true}')
        assert told(client) == {"type": "recording", "on": True, "url": None}
        client.send('{"type": "record", "on": true}')  # it is on already
        for number in range(10):
            client.send(pose_bytes(number, shift=number))
            time.sleep(0.05)
        client.send('{"type": "record", "on": false}')
        message = told(client)
        assert message["on"] is False
        answer = httpx.get(server.url(message["url"]))
        assert answer.headers["content-type"] == "video/mp4" and b"ftyp" in answer.content[:16]
        client.send('{"type": "record", "on": false}')
        client.send('{"type": "record", "on": true}')
        assert told(client)["on"]


def test_a_recording_ends_with_its_client(serve: Callable[..., Running]) -> None:
    server = serve()
    with connect(server.url("/ws", "ws")) as client:
        client.send('{"type": "record", "on": true}')
        told(client)
    service = server.app.state.service
    wait_until(lambda: not service._recording_of)
    assert service.num_sessions == 0
