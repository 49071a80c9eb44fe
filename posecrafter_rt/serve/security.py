"""Who may use the server, and how much: token, host, origin, size and rate. Every answer gets strict headers.

Layer 7: ASGI and arithmetic.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from posecrafter_rt.serve.options import ServeOptions, is_loopback
from posecrafter_rt.serve.protocol import close_reason

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

POLICY_VIOLATION, TOO_BIG, TRY_AGAIN_LATER = 1008, 1009, 1013  # close codes of a WebSocket
PAGE_FOLDERS = ("assets", "tracker")  # the page's files, which it requests without token
_PAGE_FILES = tuple(f"/{folder}/" for folder in PAGE_FOLDERS)
# Nothing from elsewhere; WebAssembly and workers are for tracking people in the browser.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; img-src 'self' blob: data:; "
    "media-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # the page's address may hold the token
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


class Refusal(Exception):
    """A request that is refused. status: the HTTP status; a WebSocket is closed with 1008."""

    def __init__(self, status: int, message: str, hint: str) -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint


class TokenBucket:
    """Lets `rate` messages per second through, and `burst` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._at_s = burst, 0.0

    def take(self, now_s: float) -> bool:
        """Return whether one more may pass at `now_s`, which never goes back."""
        self._level = min(self._burst, self._level + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        if self._level < 1:
            return False
        self._level -= 1
        return True


def check_request(scope: Scope, options: ServeOptions) -> None:
    """Raise Refusal unless a request may be answered.

    If the server is bound to this machine and has no token, Host must name this machine. Another name that leads here
    belongs to a page that had its address changed (DNS rebinding). An Origin, which browsers send, must be that host or
    an allowed one. The token is read from `Authorization: Bearer` or `?token=`. `/health` needs none, nor do the page and
    its files: they hold no secret, and the page asks for a token that is missing or wrong.
    """
    headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
    host = headers.get("host", "")
    if options.is_loopback and options.token is None and not is_loopback(_host_name(host)):
        raise Refusal(
            421, f"this server is not {host!r:.80}",
            "it answers to localhost and 127.0.0.1 only; serve with --token to let a proxy use other names",
        )  # fmt: skip
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host and origin not in options.allow_origins:
        raise Refusal(403, f"pages of {origin!r:.80} may not use this server", "serve with --allow-origin to let them")
    if options.token is None or scope["path"] == "/health" or _is_page(scope["path"]):
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
    if not hmac.compare_digest(given.encode(), options.token.encode()):
        raise Refusal(
            401, "the token is missing or wrong", "add ?token=... to the address, or Authorization: Bearer ..."
        )


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith(_PAGE_FILES)


def _host_name(host: str) -> str:
    """Return the name in a Host header, without the port; empty if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """ASGI middleware: answers refused requests itself, and adds headers to every answer."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], options: ServeOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        with_headers = _adding_headers(scope["path"], send)
        try:
            check_request(scope, self._options)
        except Refusal as refusal:
            refuse = _refuse_socket if scope["type"] == "websocket" else _refuse_request
            await refuse(refusal, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)


def _adding_headers(path: str, send: Send) -> Send:
    """Add headers. Browsers may keep only the page and its files, and must ask each time whether they are current."""
    is_page = _is_page(path)

    async def added(message: Message) -> None:
        if message["type"] == "http.response.start":
            values = {**HEADERS, "cache-control": "no-cache" if is_page and message["status"] < 400 else "no-store"}
            message["headers"] = [*message.get("headers", ()), *((k.encode(), v.encode()) for k, v in values.items())]
        await send(message)

    return added


async def _refuse_request(refusal: Refusal, receive: Receive, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    body = json.dumps({"message": refusal.message, "hint": refusal.hint}).encode()
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse_socket(refusal: Refusal, receive: Receive, send: Send) -> None:
    """Accept, then close: a browser tells a page the close code, but not why it could not connect."""
    await receive()
    await send({"type": "websocket.accept"})
    text = json.dumps({"type": "error", "message": refusal.message, "hint": refusal.hint})
    await send({"type": "websocket.send", "text": text})
    await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": close_reason(refusal.message)})
