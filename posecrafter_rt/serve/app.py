"""`create_app`: the routes of a served avatar.

Layer 7: FastAPI; each route is one call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.requests import ClientDisconnect

from posecrafter_rt.errors import BackendUnavailable, OutOfMemory, PoseCrafterError
from posecrafter_rt.serve.faults import ServerFault
from posecrafter_rt.serve.metrics import CONTENT_TYPE
from posecrafter_rt.serve.options import MAX_OFFER_BYTES, ServeOptions
from posecrafter_rt.serve.peers import Peers
from posecrafter_rt.serve.pictures import encode_picture
from posecrafter_rt.serve.poses_api import Busy, Left, NotSaved, PoseReader, TooLarge, pose_track
from posecrafter_rt.serve.protocol import JPEG
from posecrafter_rt.serve.security import PAGE_FOLDERS, Guard
from posecrafter_rt.serve.service import Service, SessionsFull
from posecrafter_rt.serve.websocket import serve_socket

if TYPE_CHECKING:
    from posecrafter_rt.avatar import Avatar

STATIC = Path(__file__).parent / "static"
NOT_BUILT = (
    "<!doctype html><html lang=en><title>posecrafter-rt</title><p>The server runs, but its page is not built: run "
    "<code>make web</code> and start again. Programs can use <code>/ws</code> as it is.</html>"
)
_STATUS: dict[type[PoseCrafterError], int] = {
    SessionsFull: 503, OutOfMemory: 503, ServerFault: 500, Busy: 429, TooLarge: 413, BackendUnavailable: 501,
    NotSaved: 507}  # fmt: skip


def create_app(avatar: Avatar, options: ServeOptions) -> FastAPI:
    """Make the ASGI application of one avatar. It starts the engine's thread with the server, unless that already runs.

    `app.state.service` is its `Service`. Call its `start` before, so that the server is not the one to raise errors.
    """
    service = Service(avatar, options)
    peers, reader = Peers(service), PoseReader()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        watching = asyncio.create_task(service.watch.run())
        try:
            yield
        finally:
            watching.cancel()
            await peers.close()
            await asyncio.to_thread(service.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, options=options)
    app.add_exception_handler(PoseCrafterError, _answer_error)
    for kind in (ClientDisconnect, Left):
        app.add_exception_handler(kind, _answer_nobody)
    _add_page(app)
    _add_facts(app, service)
    _add_poses(app, service, reader)
    _add_live(app, service, peers)
    return app


def _add_page(app: FastAPI) -> None:
    @app.get("/")
    def page() -> Response:
        index = STATIC / "index.html"
        return FileResponse(index) if index.is_file() else HTMLResponse(NOT_BUILT, 503)

    for folder in PAGE_FOLDERS:
        if (STATIC / folder).is_dir():
            app.mount(f"/{folder}", StaticFiles(directory=STATIC / folder))


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        is_ok = service.is_healthy
        facts = {"status": "ok" if is_ok else "failed", "sessions": service.num_sessions,
                 "max_sessions": service.options.max_sessions}  # fmt: skip
        return JSONResponse(facts, 200 if is_ok else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/api/info")
    async def info() -> dict[str, Any]:
        return service.info()

    @app.get("/api/reference.jpg")
    async def reference() -> Response:
        return Response(encode_picture(service.reference, JPEG, 90), media_type="image/jpeg")


def _add_poses(app: FastAPI, service: Service, reader: PoseReader) -> None:
    @app.get("/api/poses")
    async def own_poses() -> dict[str, Any]:
        return pose_track(service.avatar.poses)

    @app.post("/api/poses")
    async def read_poses(request: Request) -> Response:
        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        headers = request.headers
        num_bytes = int(headers.get("content-length", 0))
        track = await reader.read(headers.get("content-type", ""), num_bytes, request.stream(), leave)
        return Response(track, media_type="application/json")


def _add_live(app: FastAPI, service: Service, peers: Peers) -> None:
    @app.websocket("/ws")
    async def live(socket: WebSocket) -> None:
        await serve_socket(service, socket)

    @app.post("/api/offer")
    async def offer(request: Request) -> dict[str, str]:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_OFFER_BYTES:
                raise TooLarge(
                    f"an offer of more than {MAX_OFFER_BYTES} bytes", "one of a video and a channel is small"
                )
        return await peers.answer(body)

    @app.get("/api/recordings/{name}.mp4")
    async def recording(name: str) -> Response:
        path = service.recording(name)
        if path is None:
            return JSONResponse({"message": "there is no such recording", "hint": "the oldest are deleted"}, 404)
        return FileResponse(path, media_type="video/mp4", filename="avatar.mp4")


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """Answer a client that has left."""
    return Response(status_code=400)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PoseCrafterError)
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 400)
    headers = {"retry-after": "5"} if status in (429, 503) else None
    return JSONResponse({"message": str(error), "hint": error.hint}, status, headers)
