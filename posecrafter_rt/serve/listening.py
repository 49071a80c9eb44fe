"""The socket that a server listens on.

Layer 7: sockets.
"""

from __future__ import annotations

import errno
import socket

from posecrafter_rt.errors import PoseCrafterError

# What waits unsent in the kernel is old when it arrives. If little can wait, a slow line makes frames be skipped here.
_UNSENT_BYTES = 16 * 1024
_SEND_BUFFER_BYTES = 256 * 1024


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; port 0 takes any free port.

    Raises: PoseCrafterError that says why it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "that is no host's name"
        raise PoseCrafterError(f"there is no host {host!r}: {reason}", "take 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit these.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PoseCrafterError(f"port {port} is in use", "take another with --port, or --port 0 for any") from error
        raise PoseCrafterError(f"cannot listen at {host}:{port}: {error.strerror}", "see --host and --port") from error
    return listener
