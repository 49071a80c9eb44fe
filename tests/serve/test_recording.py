"""Recordings: what was shown is in the file, at the pace at which it was shown; bounded, and gone with the server."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from posecrafter_rt.errors import PoseCrafterError, VideoError
from posecrafter_rt.serve import recording, sampling
from posecrafter_rt.serve.recording import Recording, Recordings
from posecrafter_rt.video_io import read_video
from tests.serve.drawn import SIZE, Running, pose_bytes, wait_until


def told(client: ClientConnection, kind: str = "recording") -> dict:
    while True:
        message = client.recv(timeout=30)
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)


def test_it_shows_what_was_shown_when_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dark for 0.6 s and bright for 0.6 s, by a clock that each look at what is shown moves on to the next one's time."""
    shades: list[int] = []
    ended: list[PoseCrafterError | None] = []
    is_made = threading.Event()

    def look() -> np.ndarray:
        assert is_made.wait(60)
        shades.append(0 if len(shades) < 18 else 200)
        if len(shades) == 36:
            making.stop()
        return np.full((*SIZE, 3), shades[-1], np.uint8)

    monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter=lambda: len(shades) / 30))
    making = Recording(tmp_path / "a.mp4", look, ended.append)
    is_made.set()
    making.join()
    video = read_video(tmp_path / "a.mp4")
    means = video.frames.reshape(len(video), -1).mean(axis=1)
    assert ended == [None] and video.fps == 30 and np.round(means, -1).tolist() == shades == [0] * 18 + [200] * 18


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


def test_a_failure_of_any_kind_is_told(tmp_path: Path) -> None:
    ended: list[PoseCrafterError | None] = []

    def latest() -> np.ndarray:
        raise MemoryError

    Recording(tmp_path / "a.mp4", latest, ended.append).join()
    assert "MemoryError" in str(ended[0]) and not list(tmp_path.iterdir())


def test_a_failure_does_not_say_where_the_file_is(tmp_path: Path) -> None:
    path, ended = tmp_path / "a.mp4", []
    for failure in (OSError(errno.ENOSPC, "No space left on device"), VideoError(f"encoding {path} failed: x264")):

        def latest(failure: Exception = failure) -> np.ndarray:
            raise failure

        Recording(path, latest, ended.append).join()
    assert [(str(error), error.hint) for error in ended] == [
        ("the server has no space left for the recording", "free some space there and record again"),
        ("encoding the recording failed: x264", None)]  # fmt: skip


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recordings]:
    """Of a server for two clients, who keep two each."""
    monkeypatch.setattr(recording, "MAX_OF_CLIENT", 2)
    recordings = Recordings(max_clients=2)
    yield recordings
    recordings.close()


def record(recordings: Recordings, client: str, *, leaves: bool = False) -> str:
    """The name of a recording that a client has made, and perhaps left before it was whole."""
    done = threading.Event()
    name = recordings.begin(client, lambda: np.zeros((*SIZE, 3), np.uint8), lambda name, error: done.set())
    assert recordings.path(name) is None
    if leaves:
        recordings.leave(client)
    recordings.end(name)
    assert done.wait(60)
    return name


def kept(recordings: Recordings, *names: str) -> list[bool]:
    """Which of these can be downloaded; there are no other files."""
    paths = [recordings.path(name) for name in names]
    assert recordings._folder is not None
    assert {path for path in paths if path is not None} == set(recordings._folder.iterdir())
    return [path is not None for path in paths]


def test_nobody_but_a_client_itself_makes_its_recordings_go(recordings: Recordings) -> None:
    first = record(recordings, "a")
    others = [record(recordings, "b") for _ in range(5)]
    assert kept(recordings, first, *others) == [True, False, False, False, True, True]
    assert kept(recordings, first, *others[3:], record(recordings, "a")) == [True] * 4


def test_what_clients_who_left_have_made_is_bounded_too(recordings: Recordings) -> None:
    left = []
    for client in "abc":
        left += [record(recordings, client), record(recordings, client)]
        recordings.leave(client)
    assert kept(recordings, *left) == [False, False, True, True, True, True]
    there = [record(recordings, "d") for _ in range(2)]
    assert kept(recordings, *left[2:], *there) == [False, False, True, True, True, True]


def test_what_nobody_was_told_of_is_not_kept(recordings: Recordings) -> None:
    assert kept(recordings, record(recordings, "a", leaves=True)) == [False]


def test_all_go_in_the_end(recordings: Recordings) -> None:
    path = recordings.path(record(recordings, "a"))
    assert path is not None and path.is_file()
    running = recordings.begin("a", lambda: np.zeros((*SIZE, 3), np.uint8), lambda name, error: None)
    recordings.end("not there")
    recordings.close()
    assert not path.parent.exists() and running not in recordings._running


def test_a_folder_that_was_cleaned_up_is_made_anew_for_this_user_alone(recordings: Recordings) -> None:
    first = record(recordings, "a")
    before = recordings.path(first)
    assert before is not None
    shutil.rmtree(before.parent)
    assert recordings.path(first) is None
    again = recordings.path(record(recordings, "a"))
    assert again is not None and again.parent.stat().st_mode & 0o777 == 0o700


def test_a_start_removes_what_killed_servers_left_and_nothing_that_is_in_use(
    recordings: Recordings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    in_use = recordings.path(record(recordings, "a"))
    for name in ("posecrafter-recordings-left", "something-else"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").touch()
    (tmp_path / "posecrafter-recordings-link").symlink_to(tmp_path / "something-else")
    Recordings(max_clients=2).close()
    assert in_use is not None and in_use.is_file() and (tmp_path / "something-else" / "a.mp4").exists()
    assert not (tmp_path / "posecrafter-recordings-left").exists()


def test_without_a_temporary_folder_the_server_starts_and_refuses_recordings(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with connect(serve().url("/ws", "ws")) as client:
        client.send('{"type": "record", "on": true}')
        said = [told(client), told(client), told(client, "error")]
        assert [message.get("on") for message in said] == [True, False, None]
        assert said[2]["message"] == "the server has no folder for the recording" and said[2]["hint"]


def test_a_recording_that_was_cleaned_up_is_not_found(serve: Callable[..., Running]) -> None:
    server = serve()
    with connect(server.url("/ws", "ws")) as client:
        for on in ("true", "false"):
            client.send(f'{{"type": "record", "on": {on}}}')
        told(client)
        url = server.url(told(client)["url"])
        assert httpx.get(url).status_code == 200
        (finished,) = server.app.state.service._recordings._finished.values()
        finished.path.unlink()
        assert httpx.get(url).status_code == 404


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
        assert message["on"] is False and message["reason"] is None
        answer = httpx.get(server.url(message["url"]))
        assert answer.headers["content-type"] == "video/mp4" and b"ftyp" in answer.content[:16]
        client.send('{"type": "record", "on": false}')
        client.send('{"type": "record", "on": true}')
        assert told(client)["on"]


def test_who_has_recorded_for_as_long_as_one_may_is_told_so(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "Recording", partial(Recording, max_seconds=0.2))
    with connect(serve().url("/ws", "ws")) as client:
        client.send('{"type": "record", "on": true}')
        assert told(client)["on"]
        message = told(client)
        assert message["on"] is False and message["url"] and "at most ten minutes" in message["reason"]
        assert recording.MAX_SECONDS == 10 * 60


def test_one_that_ends_while_another_runs_says_that_one_is_on(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, making = Recordings.end, []

    def end_late(recordings: Recordings, name: str) -> None:
        if name:
            making.append(name)

    server = serve()
    with connect(server.url("/ws", "ws")) as client, monkeypatch.context() as patch:
        patch.setattr(Recordings, "end", end_late)
        for on in ("true", "false", "true"):
            client.send(f'{{"type": "record", "on": {on}}}')
        assert [told(client)["on"], told(client)["on"]] == [True, True]
        end(server.app.state.service._recordings, making[0])
        message = told(client)
        assert message["on"] is True and making[0] in message["url"]


def test_a_recording_that_fails_at_once_has_begun_and_ended(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In that order, even where its thread was faster; and another may be begun."""
    begin = Recordings.begin

    def fail_at_once(recordings: Recordings, client: str, latest: Callable, on_end: Callable) -> str:
        name = begin(recordings, client, lambda: np.zeros((3, 3), np.uint8), on_end)
        making = recordings._running.get(name)
        if making is not None:
            making.join()
        return name

    monkeypatch.setattr(Recordings, "begin", fail_at_once)
    with connect(serve().url("/ws", "ws")) as client:
        for _ in range(2):
            client.send('{"type": "record", "on": true}')
            said = [told(client), told(client), told(client, "error")]
            assert [message.get("on") for message in said] == [True, False, None] and said[1]["url"] is None


def test_a_recording_ends_with_its_client(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not kept, even where it is whole as soon as it is asked to end."""
    end = Recordings.end

    def end_at_once(recordings: Recordings, name: str) -> None:
        making = recordings._running.get(name)
        end(recordings, name)
        if making is not None:
            making.join()

    monkeypatch.setattr(Recordings, "end", end_at_once)
    server = serve()
    with connect(server.url("/ws", "ws")) as client:
        client.send('{"type": "record", "on": true}')
        told(client)
    service = server.app.state.service
    wait_until(lambda: not service._recording_of and not service._recordings._running)
    assert service.num_sessions == 0 and not service._recordings._clients
    assert not service._recordings._finished


def test_who_has_left_begins_no_recording(serve: Callable[..., Running]) -> None:
    """A WebRTC peer is heard until it is closed, after its session."""
    server = serve()
    service = server.app.state.service
    with connect(server.url("/ws", "ws")) as client:
        told(client, "ready")
        (session,) = service._sessions.values()
    wait_until(lambda: session.is_closed)
    service.record(session, True)
    assert not service._recording_of and not service._recordings._running and not service._recordings._clients
