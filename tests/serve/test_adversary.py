"""What strangers may try: nonsense in every place, messages cut short, storms, and clients that never read.

However they end, nothing is left of them, the others are served, and the server's log has no traceback.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve import poses_api, server
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.protocol import close_reason, decode_frame
from posecrafter_rt.serve.security import Refusal, check_request
from tests.serve.drawn import SIZE, DrawnAvatar, Running, pose_bytes, running, wait_until

Serve = Callable[..., Running]
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


class Complaints(logging.Handler):
    """Errors in the server's log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture
def attacked(serve: Serve) -> Iterator[Running]:
    """A server that serves on after the test, with nobody left and nothing to complain of."""
    running = serve()
    complaints, loggers = Complaints(), [logging.getLogger(name) for name in ("uvicorn.error", "posecrafter_rt")]
    for logger in loggers:
        logger.addHandler(complaints)
    try:
        yield running
        wait_until(lambda: serves(running))
        wait_until(lambda: running.app.state.service.num_sessions == running.app.state.service.avatar.num_open == 0)
    finally:
        for logger in loggers:
            logger.removeHandler(complaints)
    assert complaints.texts == []


def serves(server: Running) -> bool:
    """Whether a client gets its frame; else its place is still that of one who has gone."""
    with connect(server.url("/ws", "ws")) as client:
        try:
            client.send(pose_bytes(7))
            while isinstance(message := client.recv(timeout=30), str):
                pass
        except ConnectionClosed as closed:
            assert closed.rcvd is not None and closed.rcvd.code == 1013
            return False
        return decode_frame(message)[0].sequence == 7


def raw(server: Running, request: bytes, then: bytes = b"") -> bytes:
    """What the server answers to bytes, and to those that follow its first answer, until it ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(request)
        answer = line.recv(65536)
        line.sendall(then)
        while data := line.recv(65536):
            answer += data
        return answer


def mutated(seed: int) -> bytes | str:
    """A pose or a command, with some bytes changed, cut off, or put twice."""
    rng = random.Random(seed)
    text = json.dumps({"type": rng.choice(["configure", "record", "reset"]), "on": True, "quality": 5, "fit": "canvas"})
    data = bytearray(rng.choice([pose_bytes(seed), pose_bytes(seed, nobody=True), text.encode()]))
    for _ in range(rng.randint(0, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    data = data[: rng.choice([len(data), rng.randrange(len(data) + 1)])] * rng.choice([1, 1, 1, 2])
    return bytes(data) if rng.random() < 0.6 else data.decode("latin-1")


def test_nonsense_is_refused_in_words_or_served(attacked: Running) -> None:
    """Every mutation either is a message, or ends this connection with a code and the reason."""
    codes = set()
    for seed in range(150):
        with connect(attacked.url("/ws", "ws"), compression=None) as client:
            client.send(mutated(seed))
            with suppress(ConnectionClosed):  # it may have been sent away already
                client.send(b"end")
            texts = []
            try:
                while True:
                    message = client.recv(timeout=30)
                    texts += [json.loads(message)] if isinstance(message, str) else []
            except ConnectionClosed as closed:
                assert closed.rcvd is not None and closed.rcvd.reason
                codes.add(closed.rcvd.code)
            assert texts[-1]["type"] == "error" and texts[-1]["message"] and "Traceback" not in texts[-1]["message"]
    assert codes == {1008}


@pytest.mark.parametrize(("frame", "code"), [
    (b"\x81\x82\0\0\0\0\xff\xfe", 1007),  # text that is none
    (b"\x01\x81\0\0\0\0\xff\x80\x81\0\0\0\0\xfe", 1007),  # the same in two fragments
    (b"\x82\xff\0\0\0\0\x40\0\0\0\0\0\0\0", 1009),  # a gigabyte to come
    (b"\x80\x81\0\0\0\0a", 1002), (b"\xf2\x81\0\0\0\0a", 1002), (b"\x82\x01a", 1002),  # no begin; reserved bits; no mask
    (b"\x89\xfe\0\x80\0\0\0\0" + bytes(128), 1002),  # a ping that is too long
])  # fmt: skip
def test_frames_that_are_none_end_the_connection(attacked: Running, frame: bytes, code: int) -> None:
    assert code.to_bytes(2, "big") in raw(attacked, UPGRADE + b"\r\n", frame)


@pytest.mark.parametrize(("begin", "small"), [(b"", b"\x89"), (b"", b"\x8a"), (b"\x02\x80\0\0\0\0", b"\x00")])
def test_a_flood_of_pings_pongs_or_fragments_ends_the_connection(attacked: Running, begin: bytes, small: bytes) -> None:
    """At once: else it would answer the close that follows."""
    close, small = b"\x88\x80\0\0\0\0", small + b"\x80\0\0\0\0"
    assert b"\x88" in raw(attacked, UPGRADE + b"\r\n", begin + 500 * small + close)
    with suppress(ConnectionError):
        assert b"\x88" not in raw(attacked, UPGRADE + b"\r\n", begin + 20_000 * small + close)


def test_a_message_that_is_cut_off_is_forgotten(attacked: Running) -> None:
    for cut in (1, 5, 100, 1600):
        client = connect(attacked.url("/ws", "ws"), compression=None)
        client.socket.sendall((b"\x82\xfe\x06\x60\0\0\0\0" + pose_bytes(1))[:cut])
        client.socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("header", [b"Host: [::1", b"Host: a]b", b"Host: \xff\xfe", b"Host: localhost\r\nOrigin: http://[",
                                    b"Host: localhost\r\nOrigin: " + b"\xe9" * 90])  # fmt: skip
def test_headers_that_are_none_are_refused(attacked: Running, header: bytes) -> None:
    plain = raw(attacked, b"GET /api/info HTTP/1.1\r\n" + header + b"\r\nConnection: close\r\n\r\n")
    assert plain.startswith(b"HTTP/1.1 4") and b'"hint"' in plain
    if b"Origin" in header:
        asked = UPGRADE.replace(b"Host: localhost", header)
        with socket.create_connection(("127.0.0.1", attacked.port), timeout=20) as line:
            line.sendall(asked + b"\r\n")
            answer = b""
            while b"\x03\xf0" not in answer:  # the code 1008
                answer += line.recv(65536)


@settings(suppress_health_check=list(HealthCheck), deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=60))
@example(b"[", b"http://[", b"token=%", b"Bearer \xff")
def test_no_request_does_anything_but_pass_or_be_refused(
    host: bytes, origin: bytes, query: bytes, token: bytes
) -> None:
    headers = [(b"host", host), (b"origin", origin), (b"authorization", token)]
    scope = {"type": "http", "path": "/api/info", "query_string": query, "headers": headers}
    for options in (ServeOptions(), ServeOptions(token="a secret of some length")):
        with pytest.raises(Refusal):
            check_request(scope, options)


@given(st.text(max_size=300))
def test_a_reason_fits_into_a_close(message: str) -> None:
    reason = close_reason(message)
    assert len(reason.encode()) <= 123 and message.startswith(reason)


def test_bodies_that_break_off_leave_nothing(attacked: Running) -> None:
    for path in (b"poses", b"offer"):
        with socket.create_connection(("127.0.0.1", attacked.port)) as line:
            line.sendall(b"POST /api/" + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 1000\r\n\r\n{")  # fmt: skip
            time.sleep(0.2)
    answer = wait_for_turn(attacked)
    assert answer.status_code == 400 and "not valid JSON" in answer.json()["message"]


def wait_for_turn(server: Running) -> httpx.Response:
    """The answer to a bad pose file once no other is being read."""
    answers: list[httpx.Response] = []

    def is_read() -> bool:
        headers = {"content-type": "application/json"}
        answers.append(httpx.post(server.url("/api/poses"), content=b"{", headers=headers, timeout=60))
        return answers[-1].status_code != 429

    wait_until(is_read)
    return answers[-1]


def test_a_body_that_never_ends_does_not_keep_others_from_theirs(
    attacked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poses_api, "_UPLOAD_TIMEOUT_S", 0.5)
    with socket.create_connection(("127.0.0.1", attacked.port)) as line:
        line.sendall(b"POST /api/poses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 1000\r\n\r\n{")  # fmt: skip
        line.settimeout(30)
        answer = b""
        while b"more than 0.5 s to come" not in answer:  # head and body may come apart
            data = line.recv(65536)
            assert data, answer
            answer += data
        assert wait_for_turn(attacked).status_code == 400


def test_who_leaves_does_not_keep_others_from_their_poses(
    attacked: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endless, begun = tmp_path / "endless", tmp_path / "begun"
    endless.write_text(f'#!/bin/sh\n: >"{begun}"\nexec sleep 300\n')
    endless.chmod(0o755)
    with monkeypatch.context() as patch, socket.create_connection(("127.0.0.1", attacked.port)) as line:
        patch.setattr(sys, "executable", str(endless))  # what reads the file
        line.sendall(b"POST /api/poses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 1\r\n\r\n{")  # fmt: skip
        wait_until(begun.exists)
    assert wait_for_turn(attacked).status_code == 400


def test_a_storm_of_connections_leaves_nothing(attacked: Running) -> None:
    def storm(seed: int) -> None:
        for number in range(40):
            with socket.create_connection(("127.0.0.1", attacked.port)) as line:
                line.sendall((UPGRADE + b"\r\n")[: 40 if number % 5 == seed else None])

    storms = [threading.Thread(target=storm, args=(seed,)) for seed in range(5)]
    for thread in storms:
        thread.start()
    for thread in storms:
        thread.join(timeout=60)


def never_reading(server: Running) -> socket.socket:
    """A client that asks for raw frames and takes none, until its connection is full."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    line.connect(("127.0.0.1", server.port))
    line.sendall(UPGRADE + b"\r\n")

    line.recv(2048)

    def send(opcode: int, data: bytes) -> None:
        line.sendall(bytes([0x80 | opcode, 0xFE]) + len(data).to_bytes(2, "big") + bytes(4) + data)

    send(1, b'{"type": "configure", "format": "rgb", "fit": "canvas"}'.ljust(126))
    for number in range(30):
        send(2, pose_bytes(number, shift=number))
        time.sleep(0.02)
    return line


def test_who_never_ends_a_requests_head_loses_the_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the begin, and after an answer; who has a WebSocket keeps it."""
    attacked = serve(token="a secret of some length")
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    monkeypatch.setattr(server, "_REST_S", 1.0)
    with connect(attacked.url("/ws?token=a+secret+of+some+length", "ws")) as client:
        monkeypatch.setattr(server, "_HEAD_S", 1.0)
        for is_second, begin in ((False, b""), (False, b"GET / HTT"), (True, b"GET / HTT")):
            with socket.create_connection(("127.0.0.1", attacked.port), timeout=20) as line:
                if is_second:
                    line.sendall(request)
                    assert line.recv(65536).startswith(b"HTTP/1.1 200")
                line.sendall(begin)
                with suppress(ConnectionResetError):
                    while line.recv(65536):
                        pass
        client.send(pose_bytes(1))
        while isinstance(message := client.recv(timeout=30), str):
            pass
        assert decode_frame(message)[0].sequence == 1


def upload(num_bytes: int) -> bytes:
    """The head of a request with a pose file."""
    return (f"POST /api/poses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {num_bytes}\r\n\r\n").encode()  # fmt: skip


def test_a_body_that_says_that_it_is_too_large_is_refused_before_it_comes(attacked: Running) -> None:
    with socket.create_connection(("127.0.0.1", attacked.port), timeout=20) as line:
        line.sendall(upload(2**30))
        assert line.recv(65536).startswith(b"HTTP/1.1 413")


def test_who_reads_an_answer_only_after_sending_the_body_gets_it(
    attacked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As browsers do; then the next request has its own time. A body that never ends does lose the connection."""
    monkeypatch.setattr(poses_api, "MAX_POSE_FILE_BYTES", 1000)
    with socket.create_connection(("127.0.0.1", attacked.port), timeout=20) as line:
        line.sendall(upload(2000))
        line.recv(1, socket.MSG_PEEK)
        monkeypatch.setattr(server, "_HEAD_S", 0.3)
        for _ in range(10):
            line.sendall(b" " * 100)
            time.sleep(0.05)
        monkeypatch.setattr(server, "_HEAD_S", 300.0)  # the machine may be slow
        line.sendall(b" " * 1000)
        assert line.recv(65536).startswith(b"HTTP/1.1 413")
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while b"200 OK" not in (data := line.recv(65536)):  # the first answer's body may come apart
            assert data
    monkeypatch.setattr(server, "_REST_S", 0.3)
    assert raw(attacked, upload(2000), b" ").startswith(b"HTTP/1.1 413")


def never_reading_answers(server: Running, request: bytes) -> socket.socket:
    """A client that asks for what it does not take."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    line.connect(("127.0.0.1", server.port))
    line.sendall(request)
    return line


def is_reset(line: socket.socket) -> bool:
    """Whether the server has cut a connection. It is sent the begin of a request, or a pong, neither of which ends it."""
    try:
        line.sendall(b"\x8a\x80\0\0\0\0")
    except OSError:
        return True
    return False


LONG = b"GET /api/poses HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def long_answer(avatar: DrawnAvatar) -> None:
    """17 MB: more than the system takes from a server whose client does not read."""
    avatar.poses = PoseSequence(np.repeat(avatar.poses.keypoints, 4000, axis=0), SIZE, 25.0)


def test_who_never_reads_an_answer_loses_the_connection(
    long_answer: None, attacked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_READING_S", 0.5)
    monkeypatch.setattr(server, "_HEAD_S", 300.0)
    with never_reading_answers(attacked, LONG) as line:
        wait_until(lambda: is_reset(line))


def test_who_asks_for_a_websocket_before_it_has_read_loses_the_connection(
    long_answer: None, attacked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: else what is sent there would be kept for it, without end."""
    monkeypatch.setattr(server, "_READING_S", 300.0)
    with never_reading_answers(attacked, LONG + UPGRADE + b"\r\n") as line:
        wait_until(lambda: is_reset(line), 15)


def test_who_reads_slowly_gets_all_of_an_answer(
    long_answer: None, attacked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_READING_S", 0.5)
    num_bytes, seconds = 0, 0.0
    with httpx.stream("GET", attacked.url("/api/poses")) as answer:
        for part in answer.iter_bytes(2**18):
            num_bytes += len(part)
            time.sleep(0.02)
            seconds += 0.02
    assert num_bytes == int(answer.headers["content-length"]) and seconds > 1.2


def test_who_never_reads_is_left_and_loses_the_connection(attacked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posecrafter_rt.serve.websocket._SEND_TIMEOUT_S", 1.0)
    monkeypatch.setattr(server, "_FAREWELL_S", 0.5)
    with never_reading(attacked) as line:
        wait_until(lambda: attacked.app.state.service.num_sessions == 0)
        wait_until(lambda: is_reset(line))


def test_the_server_ends_at_once_though_somebody_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else uvicorn complains, five seconds later."""
    monkeypatch.setattr(server, "_FAREWELL_S", 0.5)
    complaints = Complaints()
    with running(DrawnAvatar(), ServeOptions()) as attacked:
        logging.getLogger("uvicorn.error").addHandler(complaints)
        line = never_reading(attacked)
    logging.getLogger("uvicorn.error").removeHandler(complaints)
    line.close()
    assert complaints.texts == []
