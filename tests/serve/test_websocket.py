"""A server and real WebSocket clients: frames that follow, the cap, refusals with their codes, limits, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from fastapi import WebSocket
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from posecrafter_rt.errors import NotFinite, OutOfMemory
from posecrafter_rt.poses.draw import draw_pose
from posecrafter_rt.serve import conversation, faults
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.protocol import RGB, FrameHeader, decode_frame
from posecrafter_rt.serve.websocket import Gone, _send
from tests.serve.drawn import SIZE, DrawnAvatar, DrawnStream, Running, make_pose, pose_bytes, running, wait_until

Serve = Callable[..., Running]


def speak(server: Running, path: str = "/ws", **options: Any) -> ClientConnection:
    return connect(server.url(path, "ws"), compression=None, **options)


def next_frame(client: ClientConnection) -> tuple[FrameHeader, bytes]:
    while isinstance(message := client.recv(timeout=30), str):
        pass
    return decode_frame(message)


def next_text(client: ClientConnection, kind: str) -> dict[str, Any]:
    while True:
        message = client.recv(timeout=30)
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)


def closing(client: ClientConnection) -> tuple[int | None, list[dict[str, Any]]]:
    """The code with which the server closes, and the texts before."""
    texts = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            message = client.recv(timeout=30)
            texts += [json.loads(message)] if isinstance(message, str) else []
    return (closed.value.rcvd.code if closed.value.rcvd else None), texts


def test_a_client_is_greeted_and_its_poses_are_shown(serve: Serve) -> None:
    with speak(serve(max_sessions=3)) as client:
        ready = json.loads(client.recv(timeout=30))
        assert ready["size"] == list(SIZE) and len(ready["session"]) >= 8
        expected = {"type": "ready", "backend": "torch", "precision": "fp32", "sessions": 1, "max_sessions": 3}
        assert expected.items() <= ready.items()
        client.send('{"type": "configure", "format": "rgb", "fit": "canvas"}')
        for number in range(5):
            client.send(pose_bytes(number, shift=number))
            header, picture = next_frame(client)
            assert (header.sequence, header.format, header.dropped) == (number, RGB, 0)
            frame = np.frombuffer(picture, np.uint8).reshape(*SIZE, 3)
            assert np.array_equal(frame, draw_pose(make_pose(number), SIZE))


def test_jpeg_shows_the_same_and_quality_counts(serve: Serve) -> None:
    with speak(serve()) as client:
        sizes = []
        for quality in (95, 20):
            client.send(json.dumps({"type": "configure", "quality": quality, "fit": "canvas"}))
            client.send(pose_bytes(1, shift=quality / 50))
            _, picture = next_frame(client)
            sizes.append(len(picture))
            image = cv2.cvtColor(cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            difference = np.abs(image.astype(int) - draw_pose(make_pose(quality / 50), SIZE))
            assert image.shape == (*SIZE, 3) and difference.mean() < 25
        assert sizes[1] < sizes[0] / 2


def test_late_poses_are_dropped_never_queued(serve: Serve) -> None:
    with speak(serve(DrawnAvatar(seconds=0.2))) as client:
        for number in range(20):
            client.send(pose_bytes(number, shift=number))
        headers = []
        while not headers or headers[-1].sequence < 19:
            headers.append(next_frame(client)[0])
        # One more may be overtaken after the last one's header was made, and one while the others are counted.
        assert len(headers) < 20 and 20 - len(headers) - headers[-1].dropped in (0, 1, 2)
        assert [header.sequence for header in headers] == sorted({header.sequence for header in headers})


def test_a_stream_that_closes_itself_ends_the_connection_and_the_next_client_gets_another(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(max_sessions=1)
    with monkeypatch.context() as patch, speak(server) as client:
        patch.setattr(DrawnStream, "step", DrawnStream.close_itself)
        client.send(pose_bytes(1))
        client.send(pose_bytes(2))
        assert next_text(client, "error")["message"] == "the networks cannot be loaded in float32"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=30)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011
    wait_until(lambda: server.app.state.service.num_sessions == 0)
    with speak(server) as client:
        client.send(pose_bytes(3))
        assert next_frame(client)[0].sequence == 3


@pytest.mark.parametrize(
    ("error", "status"), [
        (RuntimeError("the GPU is lost"), 503), (NotFinite("no numbers", "build /srv/me.engine again"), 503),
        (OutOfMemory("process 4711 has all"), 200),
    ],
)  # fmt: skip
def test_a_stream_that_cannot_be_opened_is_told_and_logged(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, status: int
) -> None:
    """A server that never opens one is not healthy, but one without memory for more clients may serve those it has."""
    monkeypatch.setattr(faults, "_LOG_EVERY_S", float("inf"))
    server = serve()

    def fail(avatar: DrawnAvatar, **options: object) -> None:
        raise error

    monkeypatch.setattr(DrawnAvatar, "stream", fail)
    for _ in range(faults.MANY):
        assert httpx.get(server.url("/health")).status_code == 200
        with speak(server) as client:
            code, (said,) = closing(client)
        assert code == 1011 and said["message"] == f"opening the stream failed: {type(error).__name__}" and said["hint"]
    assert httpx.get(server.url("/health")).status_code == status
    assert caplog.text.count("opening the stream failed") == 1 and str(error) in caplog.text


def test_sessions_take_turns(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client sends three times as many poses, and both more than can be rendered: they get the same."""
    avatar, may_step, step = DrawnAvatar(), threading.Semaphore(0), DrawnStream.step

    def step_once_let(stream: DrawnStream, pose: np.ndarray | None) -> np.ndarray:
        assert may_step.acquire(timeout=60)
        return step(stream, pose)

    server = serve(avatar)
    value_of = server.app.state.service.metrics.registry.get_sample_value
    monkeypatch.setattr(DrawnStream, "step", step_once_let)
    before = len(avatar.steps)

    def have_come(number: int) -> bool:
        return value_of("posecrafter_poses_received_total") == number

    def is_done(number: int) -> bool:
        return len(avatar.steps) == before + 2 * number

    with speak(server, max_queue=None) as greedy, speak(server, max_queue=None) as modest:
        for client in (greedy, modest):
            next_text(client, "ready")  # a step that waits for its permit would keep the other's session from beginning
        num_sent = 0
        for number in range(1, 16):
            for sender in (modest, greedy, greedy, greedy) * 2:
                sender.send(pose_bytes(number))
                num_sent += 1
                wait_until(partial(have_come, num_sent))  # on two connections they could come in another order
            may_step.release(2)
            wait_until(partial(is_done, number))
        may_step.release(100)
    steps = avatar.steps[before : before + 30]
    counts = [sum(stream == one for stream, _ in steps) for one in {stream for stream, _ in steps}]
    assert len(counts) == 2 and min(counts) >= max(counts) - 2
    assert len({thread for _, thread in steps}) == 1


def test_a_client_that_stalls_fills_no_memory_and_holds_up_nobody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "POSE_RATE", (120.0, 200.0))  # the machine may be fast
    server = serve()
    with speak(server, max_queue=1) as stalled, speak(server) as other:
        stalled.send('{"type": "configure", "format": "rgb"}')
        for number in range(150):
            stalled.send(pose_bytes(number, shift=number / 10))
            other.send(pose_bytes(number, shift=number / 10))
            assert next_frame(other)[0].sequence == number
        kept = []
        while not kept or kept[-1] < 149:
            kept.append(next_frame(stalled)[0].sequence)
        assert len(kept) < 150  # the rest was left out at the server


def test_over_the_cap_is_refused_clearly_and_a_place_becomes_free(serve: Serve, avatar: DrawnAvatar) -> None:
    server = serve(max_sessions=1)
    with speak(server):
        with speak(server) as second:
            code, (error,) = closing(second)
            assert code == 1013 and "no place is free, of 1" in error["message"] and error["hint"]
        assert avatar.num_open == 1
    wait_until(lambda: avatar.num_open == 0)
    with speak(server) as third:
        assert json.loads(third.recv(timeout=30))["type"] == "ready"


@pytest.mark.parametrize(("message", "code", "why"), [
    (b"\1\1\0", 1008, "3 bytes"), ("hello", 1008, "not JSON"), ('{"type": "quit"}', 1008, "'quit'"), (bytes(20_000), 1009, ""),
])  # fmt: skip
def test_bad_messages_end_the_connection(serve: Serve, message: bytes | str, code: int, why: str) -> None:
    with speak(serve()) as client:
        client.send(message)
        found, texts = closing(client)
        assert found == code
        assert not why or (texts[-1]["type"] == "error" and why in texts[-1]["message"])


def test_other_pages_and_strangers_are_turned_away(serve: Serve) -> None:
    server = serve(token="a secret of some length")
    with speak(server) as client:
        code, (error,) = closing(client)
        assert code == 1008 and "token" in error["message"]
    with speak(server, "/ws?token=a+secret+of+some+length", origin="http://evil.example") as client:
        assert closing(client)[0] == 1008
    headers = {"Authorization": "Bearer a secret of some length"}
    with speak(server, additional_headers=headers) as client:
        assert json.loads(client.recv(timeout=30))["type"] == "ready"


def test_poses_above_the_rate_are_dropped_and_a_flood_ends_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits that every machine reaches."""
    monkeypatch.setattr(conversation, "POSE_RATE", (1.0, 20.0))
    monkeypatch.setattr(conversation, "FLOOD_RATE", (1.0, 100.0))
    server = serve()
    value_of = server.app.state.service.metrics.registry.get_sample_value
    with speak(server) as client:
        for number in range(60):
            client.send(pose_bytes(number))
        wait_until(lambda: value_of("posecrafter_poses_dropped_total", {"reason": "limited"}) >= 30)
        assert json.loads(client.recv(timeout=30))["type"] == "ready"  # it is still there
        with contextlib.suppress(ConnectionClosed):
            for number in range(1000):
                client.send(pose_bytes(number))
        assert closing(client)[0] in (1008, None)  # None: what it had sent unread cut off the answer
    wait_until(lambda: server.app.state.service.num_sessions == 0)


def test_too_many_commands_end_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "COMMAND_RATE", (0.1, 40.0))  # the machine may be slow
    with speak(serve()) as client:
        with contextlib.suppress(ConnectionClosed):  # it may have been sent away already
            for _ in range(60):
                client.send('{"type": "configure"}')
        assert closing(client)[0] == 1008


def test_an_error_in_a_step_is_told_and_harms_nobody_else(serve: Serve) -> None:
    server = serve()
    with speak(server) as unlucky, speak(server) as other:
        for client in (unlucky, other):
            client.send('{"type": "configure", "fit": "canvas"}')
        unlucky.send(pose_bytes(1, shift=-1000))
        assert "RuntimeError" in next_text(unlucky, "error")["message"]
        for client in (other, unlucky):
            client.send(pose_bytes(2))
            assert next_frame(client)[0].sequence == 2


def test_stats_come_every_second_whether_poses_do_or_not(serve: Serve) -> None:
    with speak(serve()) as client:
        for number in range(60):
            client.send(pose_bytes(number, shift=number / 10))
            time.sleep(0.02)
        stats = next_text(client, "stats")
        assert stats["fps"] > 0 and 0 < stats["render_ms_p50"] <= stats["render_ms_p95"] and stats["dropped"] >= 0
        while next_text(client, "stats")["fps"] > 0:
            pass


def test_a_reset_is_for_this_session(serve: Serve, avatar: DrawnAvatar) -> None:
    with speak(serve()) as client:
        before = avatar.num_resets
        client.send('{"type": "reset"}')
        client.send(pose_bytes(1))
        next_frame(client)
        assert avatar.num_resets == before + 1


def test_sessions_end_with_the_server(serve: Serve, avatar: DrawnAvatar) -> None:
    with contextlib.ExitStack() as stack:
        with running(avatar, ServeOptions()) as server:
            client = stack.enter_context(speak(server))
            client.send(pose_bytes(1))
            next_frame(client)
        assert closing(client)[0] == 1012 and avatar.num_open == 0


def test_a_client_that_one_task_finds_gone_is_no_error_in_another() -> None:
    """Starlette then raises a RuntimeError, which it raises for mistakes as well."""

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        if message["type"] == "websocket.send":
            raise OSError("connection lost")

    async def both() -> None:
        socket = WebSocket({"type": "websocket"}, receive, send)
        await socket.accept()
        for _ in range(2):
            with pytest.raises(Gone):
                await _send(socket.send_text("hello"))

    asyncio.run(both())
