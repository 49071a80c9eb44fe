"""One WebRTC client: its avatar as a video track, and the data channel `poses` for everything else.

Layer 7: aiortc.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import anyio
import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCDataChannel, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.serve.conversation import Conversation, Disconnect
from posecrafter_rt.serve.options import MAX_AGE_S
from posecrafter_rt.serve.protocol import ProtocolError, encode_frame, error_message
from posecrafter_rt.serve.service import Service
from posecrafter_rt.serve.session import Session, Shown

CHANNEL = "poses"
_CLOCK_HZ = 90_000  # of video in RTP
_CONNECT_TIMEOUT_S = 4.0  # the page gives up a little later; its place is then free for its WebSocket
_STILL_EVERY_S = 0.25  # then the last frame again, for a client that missed a packet or the first frame
_LAST_WORD_S = 0.5  # for the message that says why a client must go
_MAX_BUFFERED_BYTES = 16 * 1024
_FULL_S = 0.05  # between two looks at a channel with that much unsent


class AvatarTrack(MediaStreamTrack):
    """A session's newest frames, as they come. Frames that the encoder is too slow for are skipped, never queued."""

    kind = "video"

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._frame, self._is_first = session.latest, True
        self._begin_s = time.perf_counter()
        self.channel: RTCDataChannel | None = None

    async def recv(self) -> av.VideoFrame:
        """Return the next frame, with the time at which it is shown."""
        if self.readyState != "live":
            raise MediaStreamError
        if not self._is_first:
            await self._wait_for_news()
        self._is_first = False
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(self._frame), format="rgb24")
        picture.pts = round((time.perf_counter() - self._begin_s) * _CLOCK_HZ)
        picture.time_base = Fraction(1, _CLOCK_HZ)
        return picture

    async def _wait_for_news(self) -> None:
        """Take the next frame that is new enough. If none comes for a while, the last one is sent again."""
        with anyio.move_on_after(_STILL_EVERY_S):
            while (shown := await self._session.frames.take()).age_s > MAX_AGE_S:
                self._session.count_stale()
            self._frame = shown.frame
            self._announce(shown)

    def _announce(self, shown: Shown) -> None:
        """Tell the client which pose the next picture shows, because a video track cannot say."""
        channel = self.channel
        with self._session.sending(shown):
            if channel is not None and channel.readyState == "open" and channel.bufferedAmount < _MAX_BUFFERED_BYTES:
                channel.send(encode_frame(shown.header.without_picture(), b""))


async def serve_peer(service: Service, sdp: str, answered: asyncio.Future[dict[str, str]]) -> None:
    """Serve one client until it leaves or must go. answered: gets the answer to its offer.

    Raises: ProtocolError for an offer that cannot be answered; SessionsFull.
    """
    # No STUN or TURN server: nothing outside is asked, so the two ends must reach each other directly.
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    try:
        with _refusing():  # checked before the engine's thread opens a stream
            await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        if not any(transceiver.kind == "video" for transceiver in peer.getTransceivers()):
            raise ProtocolError("the offer has no video", "add a transceiver that receives video")
        async with service.session() as session:
            track = AvatarTrack(session)
            link = _Link(service, session, peer, track)
            with _refusing():
                for transceiver in peer.getTransceivers():
                    transceiver.direction = "inactive"  # else aiortc decodes what the client sends, and keeps it all
                peer.addTrack(track)
                await peer.setLocalDescription(await peer.createAnswer())
            answer = {"sdp": peer.localDescription.sdp, "type": peer.localDescription.type, "session": session.id}
            answered.set_result(answer)
            await link.run()
    finally:
        await peer.close()


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn whatever goes wrong with the text of an offer into ProtocolError."""
    try:
        yield
    except Exception as error:
        raise ProtocolError(
            f"the offer cannot be answered: {error or type(error).__name__}", "send what createOffer gives"
        ) from error


class _Link:
    """A peer's events, and the task that waits for its end."""

    def __init__(self, service: Service, session: Session, peer: RTCPeerConnection, track: AvatarTrack) -> None:
        self._session, self._peer, self._track = session, peer, track
        self._conversation = Conversation(service, session)
        self._channel: asyncio.Future[RTCDataChannel | None] = asyncio.get_running_loop().create_future()  # None: ended
        self._ended = asyncio.Event()
        self._is_refused = False
        peer.on("connectionstatechange", self._on_state)
        peer.on("datachannel", self._on_channel)

    async def run(self) -> None:
        """Return when the client is gone, or if it never came."""
        channel = None
        with anyio.move_on_after(_CONNECT_TIMEOUT_S):
            channel = await self._channel
        if channel is None:
            return
        tasks = [asyncio.create_task(job) for job in (self._tell(channel), self._watch_stream(channel))]
        try:
            await self._ended.wait()
        finally:
            for task in tasks:
                task.cancel()

    def _end(self) -> None:
        self._ended.set()
        if not self._channel.done():
            self._channel.set_result(None)

    def _on_state(self) -> None:
        if self._peer.connectionState in ("failed", "closed"):
            self._end()

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if channel.label == CHANNEL and not self._channel.done():
            channel.on("message", partial(self._hear, channel))
            channel.on("close", self._end)
            self._track.channel = channel
            self._channel.set_result(channel)

    def _hear(self, channel: RTCDataChannel, message: bytes | str) -> None:
        if self._is_refused:
            return
        try:
            self._conversation.hear(message)
        except Disconnect as refusal:
            self._part(channel, refusal.error)

    def _part(self, channel: RTCDataChannel, error: PoseCrafterError) -> None:
        """Tell the client why it must go, and end the connection."""
        self._is_refused = True
        _send(channel, error_message(error))
        asyncio.get_running_loop().call_later(_LAST_WORD_S, self._end)

    async def _watch_stream(self, channel: RTCDataChannel) -> None:
        self._part(channel, await self._session.failures.take())

    async def _tell(self, channel: RTCDataChannel) -> None:
        while True:
            message = await self._session.texts.take()
            while channel.readyState == "open" and channel.bufferedAmount >= _MAX_BUFFERED_BYTES:
                await asyncio.sleep(_FULL_S)  # answers must arrive; `Slots` bounds how many wait
            _send(channel, message)


def _send(channel: RTCDataChannel, message: dict[str, Any]) -> None:
    if channel.readyState == "open":
        channel.send(json.dumps(message))
