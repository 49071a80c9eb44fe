"""The options of a server, and the limits that hold for every client.

Layer 7: plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from posecrafter_rt.errors import PoseCrafterError

MAX_AGE_S = 1.0  # from a pose's arrival to the sending of its frame; older ones are never shown
MAX_MESSAGE_BYTES = 16 * 1024  # a pose has 1632
MAX_OFFER_BYTES = 64 * 1024
MAX_POSE_FILE_BYTES = 32 * 1024 * 1024
MAX_VIDEO_BYTES = 256 * 1024 * 1024
MAX_SESSIONS = 64
_OWN_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True)
class ServeOptions:
    """How an avatar is served.

    stream: options of `Avatar.stream` by name. max_sessions: the most clients at a time.
    token: the secret that requests must bring; None: none. allow_origins: pages of other hosts that may connect, such
        as `https://example.org`. is_loopback: the server is bound to this machine alone; without a token, requests must
        then name this machine as their host.
    has_virtual_camera: the first session's frames go to a camera device.
    Raises: PoseCrafterError for an impossible number of sessions, a token that is empty or that clients cannot send, a
        bad origin, or no token beyond loopback.
    """

    stream: Mapping[str, Any] = field(default_factory=dict)
    max_sessions: int = 4
    token: str | None = None
    allow_origins: tuple[str, ...] = ()
    is_loopback: bool = True
    has_virtual_camera: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_sessions <= MAX_SESSIONS:
            raise PoseCrafterError(f"{self.max_sessions} sessions cannot be served", f"give 1 to {MAX_SESSIONS}")
        if self.token is not None and not self.token.strip():
            raise PoseCrafterError("the token is empty", "give a long random one: openssl rand -hex 16")
        if self.token is not None and not _can_be_sent(self.token):
            raise PoseCrafterError(
                "the token has characters that clients cannot send, such as a line break or a space at its end",
                "give printable ASCII without spaces at the ends: openssl rand -hex 16",
            )
        object.__setattr__(self, "allow_origins", tuple(_as_browsers_send(origin) for origin in self.allow_origins))
        for origin in self.allow_origins:
            if not _is_origin(origin):
                raise PoseCrafterError(
                    f"{origin!r} is no origin", "give scheme and host alone, as browsers send them: https://example.org"
                )
        if not self.is_loopback and self.token is None:
            raise PoseCrafterError(
                "beyond this machine an avatar is served only to those who know a token",
                "add --token with a long random one (openssl rand -hex 16), or leave --host at 127.0.0.1",
            )


def _can_be_sent(token: str) -> bool:
    """Whether a header brings a token unchanged: its ends are stripped, and clients encode other text differently."""
    return token.isascii() and token.isprintable() and token == token.strip()


def _is_origin(text: str) -> bool:
    """Whether a browser may send this as a page's origin: scheme, host and port alone, names of other letters as xn--."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    host = parts.netloc if port is None else parts.netloc.removesuffix(f":{port}")
    if "*" in host or (not host and parts.scheme != "file"):  # of files, some browsers send "file://"
        return False
    return text.isascii() and f"{parts.scheme}://{parts.netloc}" == text and not host.endswith(":") and "@" not in host


def _as_browsers_send(origin: str) -> str:
    """Return an origin in lower case, and without the port that its scheme has by default."""
    origin = origin.lower()
    return origin.removesuffix(_OWN_PORTS.get(origin.partition("://")[0], ""))


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone: `localhost`, 127.x.x.x, ::1."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
