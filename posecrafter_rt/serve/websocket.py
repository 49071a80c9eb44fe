"""A client on a WebSocket: poses and commands in, frames and messages out.

Layer 7: FastAPI.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable

import anyio
from fastapi import WebSocket, WebSocketDisconnect

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.serve.conversation import Conversation, Disconnect
from posecrafter_rt.serve.options import MAX_AGE_S
from posecrafter_rt.serve.pictures import encode_picture
from posecrafter_rt.serve.protocol import close_reason, encode_frame, error_message
from posecrafter_rt.serve.security import TRY_AGAIN_LATER
from posecrafter_rt.serve.service import Service, SessionsFull
from posecrafter_rt.serve.session import Session

_INTERNAL_ERROR = 1011
_SEND_TIMEOUT_S = 20.0  # after that, nobody reads at the other end


class Gone(Exception):
    """The client has left, or no longer reads."""


async def serve_socket(service: Service, socket: WebSocket) -> None:
    """Serve one client until it leaves or must go."""
    await socket.accept()
    try:
        async with service.session() as session:
            await _converse(service, session, socket)
    except SessionsFull as error:
        await _close(socket, error, TRY_AGAIN_LATER)
    except Disconnect as refusal:
        await _close(socket, refusal.error, refusal.code)
    except PoseCrafterError as error:
        await _close(socket, error, _INTERNAL_ERROR)


async def _converse(service: Service, session: Session, socket: WebSocket) -> None:
    """Return when the client is gone. Raises: Disconnect; PoseCrafterError if the stream has closed itself."""
    line = asyncio.Lock()  # whoever holds it may send, and holds it until the message is on its way
    tasks = [asyncio.create_task(job) for job in (
        _hear(Conversation(service, session), socket), _show(session, socket, line), _tell(session, socket, line),
        _watch_stream(session))]  # fmt: skip
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    except Gone:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hear(conversation: Conversation, socket: WebSocket) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        text = message.get("text")
        conversation.hear(message["bytes"] if text is None else text)


async def _show(session: Session, socket: WebSocket, line: asyncio.Lock) -> None:
    while True:
        shown = await session.frames.take()
        picture = await asyncio.to_thread(encode_picture, shown.frame, shown.header.format, session.quality)
        async with line:
            if shown.age_s > MAX_AGE_S:  # a slow line held up what was sent before
                session.count_stale()
                continue
            with session.sending(shown):
                await _send(socket.send_bytes(encode_frame(shown.header, picture)))


async def _tell(session: Session, socket: WebSocket, line: asyncio.Lock) -> None:
    while True:
        message = await session.texts.take()
        async with line:
            await _send(socket.send_text(json.dumps(message)))


async def _watch_stream(session: Session) -> None:
    raise await session.failures.take()


async def _send(sending: Awaitable[None]) -> None:
    """Await a send. Raises: Gone if nobody is at the other end, or nobody reads."""
    try:
        with anyio.fail_after(_SEND_TIMEOUT_S):
            await sending
    except (
        WebSocketDisconnect,
        RuntimeError,
        TimeoutError,
    ) as error:  # RuntimeError: another task noticed it first
        raise Gone from error


async def _close(socket: WebSocket, error: PoseCrafterError, code: int) -> None:
    with contextlib.suppress(Gone):
        await _send(socket.send_text(json.dumps(error_message(error))))
        await _send(socket.close(code, close_reason(str(error))))
