"""WebRTC clients: their offers, and the connections that follow.

Layer 7: aiortc is imported with the first offer; without it, clients can use the WebSocket.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.serve.protocol import ProtocolError
from posecrafter_rt.serve.service import Service

OFFER = 'send {"type": "offer", "sdp": ...}'


class Peers:
    """All WebRTC clients of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, body: bytes) -> dict[str, str]:
        """Return the answer to an offer. Both are JSON objects with `sdp` and `type`; the answer also has `session`.

        Raises: BackendUnavailable without aiortc; ProtocolError for what is no offer; SessionsFull.
        """
        try:
            serve_peer = await asyncio.to_thread(_serve_peer)
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                f"WebRTC needs the package {error.name}", "pip install 'posecrafter-rt[serve]'; or use /ws"
            ) from error
        sdp = _parse_offer(body)
        answered: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(serve_peer(self._service, sdp, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        waited: list[asyncio.Future[Any]] = [task, answered]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            task.result()  # raises why there is no answer
        return answered.result()

    async def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _serve_peer() -> Callable[[Service, str, asyncio.Future[dict[str, str]]], Coroutine[Any, Any, None]]:
    """Import `serve_peer`. On another thread: aiortc and av take a second, in which the loop serves others."""
    from posecrafter_rt.serve.webrtc import serve_peer

    return serve_peer


def _parse_offer(body: bytes) -> str:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"an offer is not JSON: {error}", OFFER) from error
    if not isinstance(value, dict) or value.get("type") != "offer" or not isinstance(value.get("sdp"), str):
        raise ProtocolError("this is no offer", OFFER)
    return str(value["sdp"])
