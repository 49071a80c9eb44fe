"""The listening socket: what accepted connections inherit, and refusals in words."""

from __future__ import annotations

import socket

import pytest

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.serve.listening import listen


def test_connections_keep_little_unsent() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getpeername() == client.getsockname()
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 16 * 1024
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * 256 * 1024  # Linux doubles it


def test_a_port_in_use_is_told() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(PoseCrafterError, match="in use") as refused:
        listen("127.0.0.1", listener.getsockname()[1])
    assert refused.value.hint


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_a_host_that_is_no_name_is_told(host: str) -> None:
    with pytest.raises(PoseCrafterError, match="there is no host") as refused:
        listen(host, 0)
    assert refused.value.hint


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(PoseCrafterError, match="cannot listen at 192.0.2.99"):
        listen("192.0.2.99", 0)
