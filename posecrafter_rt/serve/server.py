"""How an application of this package is run: uvicorn's settings, and WebSockets in which no frame waits unseen.

Layer 7: uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from posecrafter_rt.serve.options import MAX_MESSAGE_BYTES

_SHUTDOWN_S = 5
_FAREWELL_S = 3  # for a client to take the last message; who does not read must not keep its connection, or the server


class PromptSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose `send` returns once the system has taken all of the message.

    uvicorn's own returns at once, keeps up to 64 KiB in memory, and waits before the next message is written: on a slow
    line frames would grow old there, out of reach. It also waits without end for a client that does not read to go.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called when there is a client."""
        super().connection_made(transport)
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)

    async def send(self, message: Any) -> None:
        """Write a message, and wait until it is on its way."""
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


class _BadText(logging.Filter):
    """Leaves out what uvicorn logs, with a traceback, of text that is not UTF-8: the client is told, and sent away."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], UnicodeDecodeError)


_BAD_TEXT = _BadText()


def server_config(application: FastAPI) -> uvicorn.Config:
    """How uvicorn runs an application that `create_app` made."""
    config = uvicorn.Config(
        application, log_level="warning", ws=PromptSocket, ws_max_size=MAX_MESSAGE_BYTES, ws_per_message_deflate=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").addFilter(_BAD_TEXT)  # which sets that up itself
    return config
