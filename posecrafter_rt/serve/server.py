"""How an application of this package runs: uvicorn's settings, and connections that keep nothing waiting.

Layer 7: uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from posecrafter_rt.serve.conversation import FLOOD_RATE
from posecrafter_rt.serve.options import MAX_MESSAGE_BYTES
from posecrafter_rt.serve.security import TokenBucket

_SHUTDOWN_S = 5
_HEAD_S = 10  # for the head of a request, from its first byte or the start of the connection
_REST_S = 300  # for the rest of a body that is answered already; many browsers read the answer only after it
_READING_S, _READ_BYTES = 20, 16 * 1024  # in this time, a client must take this much of an answer, or all of it
_FAREWELL_S = 3  # for a client to read the last message; one that does not read must not hold up the server


class PromptSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose `send` returns once the system has taken the whole message.

    uvicorn's own returns at once, keeps up to 64 KiB in memory, and waits before it writes the next message. On a slow
    line, frames would grow old there, out of reach. It also waits forever for a client to leave that does not read.
    Pings and fragments, which uvicorn handles itself, have the same limit as messages.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called when a client has connected."""
        super().connection_made(transport)
        self._control = TokenBucket(*FLOOD_RATE)
        stream = cast(asyncio.Transport, transport)
        stream.set_write_buffer_limits(high=0)
        if stream.get_write_buffer_size():  # its last answer is not read, so it could not be told when to wait
            stream.abort()

    def handle_ping(self) -> None:
        """Called for a ping."""
        if self._may_pass():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        """Called for a pong."""
        if self._may_pass():
            super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        """Called for each fragment of a message but the first."""
        if self._may_pass():
            super().handle_cont(event)

    def _may_pass(self) -> bool:
        """Whether to handle another ping, pong or fragment. If there were too many, cut the connection."""
        if self._control.take(time.perf_counter()):
            return True
        self.transport.abort()
        return False

    async def send(self, message: Any) -> None:
        """Write a message, and wait until the system has taken it."""
        await super().send(message)
        await self.writable.wait()

    async def run_asgi(self) -> None:
        """Serve the client, and end the connection."""
        await super().run_asgi()
        self._part()

    def shutdown(self) -> None:
        """Called when the server ends."""
        super().shutdown()
        self._part()

    def _part(self) -> None:
        self.loop.call_later(_FAREWELL_S, self.transport.abort)


class PromptHttp(H11Protocol):
    """HTTP that ends a connection if a request's head takes too long to arrive, or an answer too long to be taken.

    uvicorn's own waits forever, even for clients that have not shown a token yet. It only ends connections that are
    silent after an answer.
    """

    _waiting: asyncio.TimerHandle | None = None
    _waits_s = 0.0
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called when a client has connected."""
        super().connection_made(cast(asyncio.Transport, transport))
        self.transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called for short answers, too
        self._watch_arrival()

    def pause_writing(self) -> None:
        """Called when the system takes no more of an answer."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        """Called when the system has taken all of it."""
        super().resume_writing()
        self._stop_watching_reading()

    def data_received(self, data: bytes) -> None:
        """Called with the bytes that have arrived."""
        super().data_received(data)
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the client has gone."""
        super().connection_lost(exc)
        self._stop_watching()
        self._stop_watching_reading()

    def _watch_arrival(self) -> None:
        """Limit the time for what must arrive: a request's head, or the rest of a request that is answered already."""
        has_become_socket = self.transport.get_protocol() is not self
        if has_become_socket or (self.cycle is not None and not self.cycle.response_complete):
            self._stop_watching()
            return
        is_body = self.conn.their_state.__name__ == "SEND_BODY"  # by name, because only uvicorn depends on h11
        most_s = _REST_S if is_body else _HEAD_S
        if self._waiting is None or most_s != self._waits_s:
            self._stop_watching()
            self._waiting, self._waits_s = self.loop.call_later(most_s, self.transport.abort), most_s

    def _stop_watching(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _watch_reading(self) -> None:
        """Look again in a while; a slow client may take long for a long answer, but must take some of it."""
        most = self.transport.get_write_buffer_size() - _READ_BYTES
        self._reading = self.loop.call_later(_READING_S, self._check_reading, most)

    def _check_reading(self, most: int) -> None:
        if self.transport.get_write_buffer_size() > most:
            self.transport.abort()
        else:
            self._watch_reading()

    def _stop_watching_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


class _BadText(logging.Filter):
    """Drops what uvicorn logs, with a traceback, about text that is not UTF-8: the client is told and disconnected."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], UnicodeDecodeError)


_BAD_TEXT = _BadText()


def server_config(application: FastAPI) -> uvicorn.Config:
    """Return uvicorn's configuration for an application that `create_app` made."""
    config = uvicorn.Config(
        application, log_level="warning", http=PromptHttp, ws=PromptSocket, ws_max_size=MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False, timeout_graceful_shutdown=_SHUTDOWN_S,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").addFilter(_BAD_TEXT)  # after Config, which sets up this logger
    return config
