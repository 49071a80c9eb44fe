"""WebRTC's places: a bad offer costs no stream, and who does not come about, or goes, keeps no place; aiortc at both ends."""

from __future__ import annotations

import asyncio
import importlib.abc
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aioice.ice
import httpx
import pytest
from aiortc import AudioStreamTrack, RTCPeerConnection, RTCSessionDescription, VideoStreamTrack

from posecrafter_rt import serve as package
from posecrafter_rt.errors import BackendUnavailable, OutOfMemory
from posecrafter_rt.serve import webrtc
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.peers import Peers
from posecrafter_rt.serve.service import Service
from posecrafter_rt.serve.slots import Slots
from tests.serve.drawn import SIZE, DrawnAvatar, DrawnStream, Running, pose_bytes, wait_until

Serve = Callable[..., Running]
TRANSPORT = Path(package.__file__).parent / "web" / "src" / "transport.ts"


async def asked(server: Running, peer: RTCPeerConnection) -> httpx.Response:
    """What the server says to a peer that would see the avatar."""
    peer.addTransceiver("video", direction="recvonly")
    await peer.setLocalDescription(await peer.createOffer())
    offer = {"sdp": peer.localDescription.sdp, "type": "offer"}
    async with httpx.AsyncClient() as client:
        return await client.post(server.url("/api/offer"), json=offer, timeout=30)


async def offered(server: Running, peer: RTCPeerConnection) -> dict[str, str]:
    """The server's answer to such a peer."""
    answer = await asked(server, peer)
    assert answer.status_code == 200
    return answer.json()


def test_nothing_is_taken_from_who_sends_pictures_and_sound(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be decoded, and kept for a reader who never comes; the avatar is sent to it all the same."""
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    server = serve()

    async def send_and_see() -> tuple[list[str], tuple[int, int]]:
        peer, seen = RTCPeerConnection(), asyncio.get_running_loop().create_future()
        peer.on("track", lambda track: track.kind == "video" and not seen.done() and seen.set_result(track))
        peer.createDataChannel("poses")
        try:
            for track in (AudioStreamTrack(), VideoStreamTrack(), VideoStreamTrack()):
                peer.addTrack(track)
            answer = await offered(server, peer)
            await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
            picture = await asyncio.wait_for((await seen).recv(), 60)
            return re.findall(r"^a=(send\w+|recv\w+|inactive)\r$", answer["sdp"], re.M), (picture.height, picture.width)
        finally:
            await peer.close()

    assert asyncio.run(send_and_see()) == (["inactive", "sendonly", "inactive", "inactive"], SIZE)


@pytest.mark.parametrize("sdp", ["", "nonsense", "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n"])
def test_a_bad_offer_opens_no_stream(serve: Serve, monkeypatch: pytest.MonkeyPatch, sdp: str) -> None:
    server = serve()
    service: Service = server.app.state.service
    opened: list[object] = []
    monkeypatch.setattr(service, "session", lambda: opened.append(sdp))
    answer = httpx.post(server.url("/api/offer"), json={"type": "offer", "sdp": sdp})
    assert answer.status_code == 400 and answer.json()["hint"] and not opened


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("the GPU is lost"), 500), (OutOfMemory("process 4711 has all"), 503)]
)
def test_an_offer_for_which_no_stream_can_be_opened_is_answered_in_general_words(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    server = serve()

    def fail(avatar: DrawnAvatar, **options: object) -> None:
        raise error

    async def ask() -> httpx.Response:
        peer = RTCPeerConnection()
        try:
            return await asked(server, peer)
        finally:
            await peer.close()

    monkeypatch.setattr(DrawnAvatar, "stream", fail)
    answer = asyncio.run(ask())
    said = {"message": f"opening the stream failed: {type(error).__name__}", "hint": "the server's log says more"}
    assert (answer.status_code, answer.json()) == (status, said)


def test_a_peer_that_goes_before_its_channel_came_is_not_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    monkeypatch.setattr(webrtc, "_CONNECT_TIMEOUT_S", 300.0)
    server = serve()

    async def come_and_go() -> None:
        peer, connected = RTCPeerConnection(), asyncio.Event()
        peer.on("connectionstatechange", lambda: peer.connectionState == "connected" and connected.set())
        try:
            answer = await offered(server, peer)
            await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
            await asyncio.wait_for(connected.wait(), 60)
            assert server.app.state.service.num_sessions == 1
        finally:
            await peer.close()

    asyncio.run(come_and_go())
    wait_until(lambda: server.app.state.service.num_sessions == 0)


def test_a_stream_that_closes_itself_ends_the_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    server = serve()

    async def drive() -> list[dict[str, Any]]:
        peer, said, closed = RTCPeerConnection(), [], asyncio.Event()
        channel = peer.createDataChannel("poses")
        channel.on("open", lambda: channel.send(pose_bytes(1)))
        channel.on("message", lambda text: said.append(json.loads(text)))
        peer.on("connectionstatechange", lambda: peer.connectionState == "closed" and closed.set())
        try:
            answer = await offered(server, peer)
            await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
            await asyncio.wait_for(closed.wait(), 60)
        finally:
            await peer.close()
        return [message for message in said if message["type"] == "error"]

    monkeypatch.setattr(DrawnStream, "step", DrawnStream.close_itself)
    (error,) = asyncio.run(drive())
    assert error["message"] == "the networks cannot be loaded in float32"
    wait_until(lambda: server.app.state.service.num_sessions == 0)


def test_a_peer_that_never_connects_gives_its_place_back(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webrtc, "_CONNECT_TIMEOUT_S", 0.1)
    server = serve(max_sessions=1)

    async def ask() -> None:
        peer = RTCPeerConnection()
        try:
            await offered(server, peer)
        finally:
            await peer.close()

    asyncio.run(ask())
    wait_until(lambda: server.app.state.service.num_sessions == 0)


def test_the_server_gives_up_before_the_page_does() -> None:
    """Which then takes the WebSocket, and must find its own place free. Both count from the answer."""
    limits_ms = dict(re.findall(r"const (\w+_MS) = (\d+);", TRANSPORT.read_text()))
    assert int(limits_ms["OPENING_MS"]) > webrtc._CONNECT_TIMEOUT_S * 1000


def test_aiortc_is_not_imported_on_the_loops_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Watch(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name == webrtc.__name__:
                threads.append(threading.get_ident())

    monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, webrtc.__name__)
    monkeypatch.setitem(sys.modules, "aiortc", None)  # so that the import ends there
    with pytest.raises(BackendUnavailable, match="aiortc"):
        asyncio.run(Peers(Service(DrawnAvatar(), ServeOptions())).answer(b'{"type": "offer", "sdp": ""}'))
    assert len(threads) == 1 and threads[0] != threading.get_ident()


def test_an_answer_waits_for_a_channel_that_is_full() -> None:
    class Channel:
        readyState, bufferedAmount = "open", webrtc._MAX_BUFFERED_BYTES

        def __init__(self) -> None:
            self.sent: list[str] = []

        def send(self, message: str) -> None:
            self.sent.append(message)

    async def talk() -> list[str]:
        texts: Slots[dict[str, str]] = Slots(4)
        peer, channel = SimpleNamespace(_session=SimpleNamespace(texts=texts)), Channel()
        tell = asyncio.create_task(webrtc._Link._tell(peer, channel))  # type: ignore[arg-type]
        texts.put({"type": "recording"})
        await asyncio.sleep(3 * webrtc._FULL_S)
        assert channel.sent == []
        channel.bufferedAmount = 0
        await asyncio.sleep(3 * webrtc._FULL_S)
        tell.cancel()
        return channel.sent

    assert asyncio.run(talk()) == ['{"type": "recording"}']
