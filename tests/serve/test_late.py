"""A server that is short of time, and lines that are slow: frames are left out, none comes late."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.sync.client import connect
from websockets.uri import parse_uri

from posecrafter_rt.serve import loop_watch
from posecrafter_rt.serve.protocol import RGB, FrameHeader, decode_frame
from tests.serve.drawn import SIZE, DrawnAvatar, Running, pose_bytes, wait_until

Serve = Callable[..., Running]
FRAME_BYTES = 32 + SIZE[0] * SIZE[1] * 3


@pytest.fixture(autouse=True)
def shows_old_frames() -> None:
    """Here their age counts."""


class SlowLine:
    """A client that takes `bytes_per_s` from its connection, of which the system keeps little in store."""

    def __init__(self, url: str, bytes_per_s: float) -> None:
        self._protocol = ClientProtocol(parse_uri(url), max_size=None)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((urlsplit(url).hostname, urlsplit(url).port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._bytes_per_s, self._taken, self._begin_s = bytes_per_s, 0, time.monotonic()
        self._protocol.send_request(self._protocol.connect())
        self._flush()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: bytes | str) -> None:
        if isinstance(message, str):
            self._protocol.send_text(message.encode())
        else:
            self._protocol.send_binary(message)
        self._flush()

    def receive(self) -> Iterator[bytes]:
        """The binary messages that have come by now."""
        allowed = int((time.monotonic() - self._begin_s) * self._bytes_per_s) - self._taken
        if allowed > 0:
            self._socket.settimeout(0.01)
            try:
                data = self._socket.recv(min(allowed, 4096))
            except TimeoutError:
                self._taken += allowed  # what was not used is gone, as on a line
                return
            self._taken += len(data)
            self._protocol.receive_data(data)
            self._flush()
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.BINARY:
                yield event.data

    def _flush(self) -> None:
        self._socket.settimeout(10)
        for data in self._protocol.data_to_send():
            self._socket.sendall(data)


@contextmanager
def slow_line(server: Running, bytes_per_s: float) -> Iterator[SlowLine]:
    line = SlowLine(server.url("/ws", "ws"), bytes_per_s)
    try:
        deadline_s = time.monotonic() + 10
        while line._protocol.state.name != "OPEN":
            list(line.receive())
            assert time.monotonic() < deadline_s
        yield line
    finally:
        line.close()


def test_on_a_slow_line_frames_are_left_out_and_none_grows_old(serve: Serve) -> None:
    """A line for six frames a second, and a client that sends 25 poses in it.

    They are its clock, so that a machine that stands still makes nothing old: of a second are frames 25 poses back.
    """
    server, ages, headers = serve(), [], []
    with slow_line(server, 6 * FRAME_BYTES) as line:
        line.send('{"type": "configure", "format": "rgb", "fit": "canvas"}')
        begin_s, next_s, number = time.monotonic(), 0.0, 0
        while (now_s := time.monotonic()) < begin_s + 6:
            if now_s >= next_s:
                line.send(pose_bytes(number, shift=number % 40 / 4))
                next_s, number = now_s + 1 / 25, number + 1
            for message in line.receive():
                headers.append(decode_frame(message)[0])
                ages.append(number - headers[-1].sequence)
            time.sleep(0.002)
    assert 15 < len(headers) < 50 and headers[-1].format == RGB  # the line is used, and is slow
    assert max(ages) < 25, ages
    # Every pose is shown or counted as dropped, but for those that were overtaken while the last header was written.
    assert 0 <= headers[-1].sequence + 1 - len(headers) - headers[-1].dropped <= 2


def test_a_server_that_is_too_slow_to_show_anything_says_so(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """When it starts, and to its clients."""
    serve()
    assert not caplog.text
    server = serve(DrawnAvatar(seconds=0.36), stream={"steps": 3, "is_pipelined": True})
    assert re.search(r"in turns of \d\.\d s, .*serve without --pipelined", caplog.text)
    message = {"type": "none yet", "message": ""}
    with connect(server.url("/ws", "ws"), compression=None) as client:
        while "a frame took" not in message["message"]:  # or a pose has waited too long for its turn
            client.send(pose_bytes(0))
            while (message := json.loads(client.recv(timeout=30)))["type"] != "error":
                pass
    assert (
        re.search(r"a frame took 3 turns of \d\.\d s", message["message"]) and "without --pipelined" in message["hint"]
    )


def test_poses_that_came_while_the_server_stood_still_are_not_shown_late(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_watch, "_BACKLOG_S", 1.0)  # a busy machine takes its time to hear what came
    server = serve()
    with connect(server.url("/ws", "ws"), compression=None) as client:

        def next_frame() -> FrameHeader:
            while isinstance(message := client.recv(timeout=60), str):
                texts.append(json.loads(message))
            return decode_frame(message)[0]

        texts: list[dict] = []
        client.send(pose_bytes(0))
        assert next_frame().sequence == 0
        service, begun = server.app.state.service, threading.Event()
        (session,) = service._sessions.values()

        def stand_still() -> None:
            begun.set()
            time.sleep(1.4)

        session.frames._loop.call_soon_threadsafe(stand_still)
        assert begun.wait(60)
        client.send(pose_bytes(1, shift=1))
        wait_until(lambda: session.num_dropped)
        wait_until(lambda: service.watch.earliest_s(now_s := time.perf_counter()) == now_s)  # it hears at once again
        client.send(pose_bytes(2, shift=2))
        header = next_frame()
    assert (header.sequence, header.dropped) == (2, 1)
    (told,) = (text["message"] for text in texts if text["type"] == "error")
    waited = re.match(r"a pose waited (\d+\.\d) s for its turn", told)
    assert waited is not None and float(waited[1]) >= 1.4
