"""Servers to speak to, of an avatar that draws its poses.

Tests; fixtures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from posecrafter_rt.serve import session, websocket
from posecrafter_rt.serve.options import ServeOptions
from tests.serve.drawn import DrawnAvatar, Running, running


@pytest.fixture(autouse=True)
def shows_old_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may stand still for a second, and what a test waits for would be too old to be shown.

    What is of that age overrides this.
    """
    for module in (session, websocket):
        monkeypatch.setattr(module, "MAX_AGE_S", 60.0)


@pytest.fixture
def avatar() -> DrawnAvatar:
    return DrawnAvatar()


@pytest.fixture
def serve(avatar: DrawnAvatar) -> Iterator[Callable[..., Running]]:
    """serve(max_sessions=2, avatar=...) -> Running, until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(avatar: Any = avatar, **options: Any) -> Running:
            return stack.enter_context(running(avatar, replace(ServeOptions(), **options)))

        yield start
