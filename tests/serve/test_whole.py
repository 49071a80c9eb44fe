"""A real avatar, tuned and built on the tiny base: a WebSocket and a WebRTC client drive it through a real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aioice.ice
import httpx
import numpy as np
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from websockets.sync.client import connect

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.serve import webrtc
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.protocol import (
    HELD,
    NO_PICTURE,
    REPEAT,
    RGB,
    FrameHeader,
    PoseMessage,
    decode_frame,
    encode_pose,
)
from tests.serve.drawn import Running, running, wait_until

STREAM = {"steps": 2, "window": 2}


@pytest.fixture(scope="module")
def avatar(tiny_engine: Path) -> Iterator[Avatar]:
    with Avatar.load(tiny_engine) as avatar:
        yield avatar


@pytest.fixture(scope="module")
def server(avatar: Avatar) -> Iterator[Running]:
    with running(avatar, ServeOptions(stream=STREAM, max_sessions=2)) as server:
        yield server


def message(avatar: Avatar, number: int, shift: float = 0.0) -> bytes:
    """A training pose, moved to the right by some pixels."""
    pose = avatar.poses.keypoints[number % len(avatar.poses)] + np.float32([shift, 0, 0])
    return encode_pose(PoseMessage(number, 1000.0 + number, avatar.size, pose))


def test_the_frames_are_those_of_the_stream(avatar: Avatar, server: Running) -> None:
    shown: list[np.ndarray] = []
    flags = []
    with connect(server.url("/ws", "ws")) as client:
        ready = json.loads(client.recv(timeout=30))
        assert (ready["backend"], ready["steps"], ready["window"], ready["size"]) == ("torch", 2, 2, [32, 32])
        client.send('{"type": "configure", "format": "rgb", "fit": "canvas"}')
        messages = [message(avatar, number) for number in range(4)] + [message(avatar, 3)]
        for sent in [*messages, encode_pose(PoseMessage(9, 0.0, avatar.size, None))]:
            client.send(sent)
            while isinstance(received := client.recv(timeout=30), str):
                pass
            header, picture = decode_frame(received)
            assert header.format == RGB
            flags.append(header.flags)
            shown.append(np.frombuffer(picture, np.uint8).reshape(*avatar.size, 3))
    with avatar.stream(**STREAM) as stream:  # the server is at rest: nothing else uses the engine
        expected = [stream.step(avatar.poses.keypoints[number]) for number in range(4)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(shown[:4], expected, strict=True))
    assert flags == [0, 0, 0, 0, REPEAT, HELD | REPEAT] and np.array_equal(shown[4], shown[3])
    assert len({frame.tobytes() for frame in shown[:4]}) == 4


def test_sessions_do_not_see_each_other(avatar: Avatar, server: Running) -> None:
    """Two clients in turns get what each would alone: their memories are apart."""

    def frame(client: Any, sent: bytes) -> np.ndarray:
        client.send(sent)
        while isinstance(received := client.recv(timeout=30), str):
            pass
        return np.frombuffer(decode_frame(received)[1], np.uint8).reshape(*avatar.size, 3)

    with connect(server.url("/ws", "ws")) as first, connect(server.url("/ws", "ws")) as second:
        for client in (first, second):
            client.send('{"type": "configure", "format": "rgb", "fit": "canvas"}')
        both = [
            (frame(first, message(avatar, number)), frame(second, message(avatar, 3 - number))) for number in range(4)
        ]
    with avatar.stream(**STREAM) as one, avatar.stream(**STREAM) as other:
        for number, (ours, theirs) in enumerate(both):
            assert np.array_equal(ours, one.step(avatar.poses.keypoints[number]))
            assert np.array_equal(theirs, other.step(avatar.poses.keypoints[3 - number]))


def test_frames_of_a_pipelined_stream_name_their_own_poses(avatar: Avatar) -> None:
    """They come some steps later, the last ones without a further pose."""
    options = {**STREAM, "steps": 3, "is_pipelined": True}
    frames: dict[int, np.ndarray] = {}
    with (
        running(avatar, ServeOptions(stream=options)) as server,
        connect(server.url("/ws", "ws")) as client,
    ):
        value_of = server.app.state.service.metrics.registry.get_sample_value
        client.send('{"type": "configure", "format": "rgb", "fit": "canvas"}')
        for first in (0, 4):  # two bursts; each comes to its end
            for number in range(first, first + 4):
                client.send(message(avatar, number))
                wait_until(lambda: value_of("posecrafter_render_seconds_count") == number + 1)  # noqa: B023
                # So that no two frames come before the first is sent.
                wait_until(lambda: value_of("posecrafter_frame_age_seconds_count") >= number - 1)  # noqa: B023
            while first + 3 not in frames:
                received = client.recv(timeout=30)
                if not isinstance(received, str):
                    header, picture = decode_frame(received)
                    assert header.sequence not in frames
                    frames[header.sequence] = np.frombuffer(picture, np.uint8).reshape(*avatar.size, 3)
    with avatar.stream(**options) as stream:
        for number in (0, 1):
            stream.step(avatar.poses.keypoints[number])
        assert np.array_equal(frames[0], stream.step(avatar.poses.keypoints[2]))
    assert sorted(frames) == list(range(8))


def test_a_lone_pose_comes_through_a_pipeline(avatar: Avatar) -> None:
    options = ServeOptions(stream={**STREAM, "steps": 3, "is_pipelined": True})
    with running(avatar, options) as server, connect(server.url("/ws", "ws")) as client:
        client.send(message(avatar, 5))
        while isinstance(received := client.recv(timeout=30), str):
            pass
        assert decode_frame(received)[0].sequence == 5


def test_the_reference_is_shown_before_the_first_pose(avatar: Avatar, server: Running) -> None:
    with avatar.stream(**STREAM) as stream:
        expected = stream.step(None)
    assert np.array_equal(server.app.state.service.reference, expected)


def test_a_peer_sees_the_avatar_move(avatar: Avatar, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiortc at both ends. It leaves out loopback when it looks for addresses; here both ends are to use nothing else."""
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    monkeypatch.setattr(webrtc, "_CONNECT_TIMEOUT_S", 300.0)
    pictures, headers, texts = asyncio.run(_watch(avatar, server))
    assert texts[0]["type"] == "ready"
    assert all(header.format == NO_PICTURE and header.size == avatar.size for header in headers)
    sequences = [header.sequence for header in headers]
    assert is_enough(pictures, headers, texts) and sequences == sorted(set(sequences)) and max(sequences) >= 10
    assert pictures[0].shape == (*avatar.size, 3)
    wait_until(lambda: server.app.state.service.num_sessions == 0)


async def _watch(avatar: Avatar, server: Running) -> tuple[list[np.ndarray], list[FrameHeader], list[dict[str, Any]]]:
    """What a peer sees and is told while it sends 45 poses, or more on a machine that is slow to show them."""
    peer, tracks, messages = RTCPeerConnection(RTCConfiguration(iceServers=[])), asyncio.Queue(), []
    peer.on("track", tracks.put_nowait)
    peer.addTransceiver("video", direction="recvonly")
    channel = peer.createDataChannel("poses", ordered=False, maxRetransmits=0)
    channel.on("message", messages.append)
    opened = asyncio.Event()
    channel.on("open", opened.set)
    try:
        await peer.setLocalDescription(await peer.createOffer())
        offer = {"sdp": peer.localDescription.sdp, "type": "offer"}
        async with httpx.AsyncClient() as client:
            answer = (await client.post(server.url("/api/offer"), json=offer, timeout=30)).json()
        assert len(answer["session"]) >= 8 and "127.0.0.1" in answer["sdp"]
        await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
        track = await asyncio.wait_for(tracks.get(), 60)
        pictures: list[np.ndarray] = []

        async def look() -> None:
            while True:
                pictures.append((await track.recv()).to_ndarray(format="rgb24"))

        looking = asyncio.create_task(look())
        await asyncio.wait_for(opened.wait(), 60)
        number, until_s = 0, time.monotonic() + 60
        while number < 45 or (not is_enough(pictures, *heard(messages)) and time.monotonic() < until_s):
            channel.send(message(avatar, number, shift=number % 9))
            number += 1
            await asyncio.sleep(0.04)
        looking.cancel()
    finally:
        await peer.close()
    return pictures, *heard(messages)


def heard(messages: list[Any]) -> tuple[list[FrameHeader], list[dict[str, Any]]]:
    """Of both kinds."""
    headers = [decode_frame(data)[0] for data in messages if not isinstance(data, str)]
    return headers, [json.loads(data) for data in messages if isinstance(data, str)]


def is_enough(pictures: list[np.ndarray], headers: list[FrameHeader], texts: list[dict[str, Any]]) -> bool:
    """Several frames and pictures, and the numbers of a second."""
    return len(headers) >= 5 and len({picture.tobytes() for picture in pictures}) > 2 and texts[-1]["type"] == "stats"


def test_peers_count_as_sessions_and_bad_ones_are_sent_away(
    avatar: Avatar, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    monkeypatch.setattr(webrtc, "_CONNECT_TIMEOUT_S", 300.0)
    with connect(server.url("/ws", "ws")), connect(server.url("/ws", "ws")):
        wait_until(lambda: server.app.state.service.num_sessions == 2)
        status, _ = asyncio.run(_misbehave(server))
        assert status == 503
    wait_until(lambda: server.app.state.service.num_sessions == 0)
    status, texts = asyncio.run(_misbehave(server))
    assert status == 200 and texts[-1]["type"] == "error" and "not JSON" in texts[-1]["message"]
    wait_until(lambda: server.app.state.service.num_sessions == 0)


async def _misbehave(server: Running) -> tuple[int, list[dict[str, Any]]]:
    """The status of an offer, and what a peer is told that sends nonsense, until its channel closes."""
    peer, messages, closed = RTCPeerConnection(RTCConfiguration(iceServers=[])), [], asyncio.Event()
    peer.addTransceiver("video", direction="recvonly")
    channel = peer.createDataChannel("poses")
    channel.on("message", messages.append)
    channel.on("open", lambda: channel.send("nonsense"))
    channel.on("close", closed.set)
    try:
        await peer.setLocalDescription(await peer.createOffer())
        offer = {"sdp": peer.localDescription.sdp, "type": "offer"}
        async with httpx.AsyncClient() as client:
            answer = await client.post(server.url("/api/offer"), json=offer, timeout=30)
        if answer.status_code == 200:
            await peer.setRemoteDescription(RTCSessionDescription(answer.json()["sdp"], "answer"))
            await asyncio.wait_for(closed.wait(), 60)
    finally:
        await peer.close()
    return answer.status_code, [json.loads(data) for data in messages if isinstance(data, str)]
