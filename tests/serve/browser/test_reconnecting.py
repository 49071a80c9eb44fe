"""What the page does when its server goes, changes, is full or asks for a token, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from websockets.sync.client import connect

from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve.options import ServeOptions
from tests.serve.browser.pages import LivePage, OpenPage, Serve
from tests.serve.browser.walker import STILL, walking_avatar
from tests.serve.drawn import SIZE, DrawnAvatar, running

pytestmark = pytest.mark.browser


@pytest.fixture
def avatar() -> DrawnAvatar:
    return walking_avatar()


def test_the_page_comes_back_when_the_server_does(open_page: OpenPage, avatar: DrawnAvatar) -> None:
    with running(avatar, ServeOptions()) as server:
        page = open_page(server.url(), is_lost=True)
        page.wait_for_link("Live")
    page.wait_for_link("Reconnecting")
    page.wait_for_text("#notice-title", "The server does not answer")
    avatar.poses = PoseSequence(avatar.poses.keypoints + np.float32([0, 3, 0]), SIZE, 25.0)
    with running(avatar, ServeOptions(), port=server.port):
        page.wait_for_link("Live")
        assert not page.page.is_visible("#notice")
        page.wait_until(lambda: page.count_looks() > 2)


def test_another_avatar_behind_the_same_address_is_taken_up(open_page: OpenPage, avatar: DrawnAvatar) -> None:
    with running(avatar, ServeOptions()) as server:
        page = open_page(server.url(), is_lost=True)
        page.wait_for_text("#name", "drawn")
        page.wait_for_link("Live")
    avatar.folder.name = "painted.engine"
    with running(avatar, ServeOptions(), port=server.port):
        page.wait_for_text("#name", "painted")
        page.wait_for_link("Live")


@contextmanager
def full_page(serve: Serve, open_page: OpenPage) -> Iterator[LivePage]:
    """A page that finds the only place taken; it is free again after the block."""
    server = serve(max_sessions=1)
    with connect(server.url("/ws", "ws")) as other:
        assert json.loads(other.recv(timeout=60))["type"] == "ready"
        page = open_page(server.url(), **STILL)
        page.wait_for_link("Full")
        yield page


def test_over_the_cap_the_page_says_so_and_gets_in_once_there_is_room(serve: Serve, open_page: OpenPage) -> None:
    with full_page(serve, open_page) as page:
        page.wait_for_text("#notice-title", "The avatar is busy")
        page.wait_for_text("#notice-text", "No place is free, of 1.")
    page.page.evaluate(
        "document.getElementById('retry').click()"
    )  # which a page that has tried by itself no longer shows
    page.wait_for_link("Live")


def test_the_button_that_tries_again_keeps_the_focus_during_a_try(serve: Serve, open_page: OpenPage) -> None:
    with full_page(serve, open_page) as page:
        page.page.route_web_socket("**/ws*", lambda socket: None)  # it opens, and nothing comes
        page.page.focus("#retry")
        page.page.keyboard.press("Enter")
        page.wait_for_link("Connecting")
        page.settle()
        assert page.page.evaluate("document.activeElement.id") == "retry"


def test_a_token_is_asked_for_when_it_is_wrong(open_page: OpenPage, avatar: DrawnAvatar) -> None:
    with running(avatar, ServeOptions(token="open sesame")) as server:
        page = open_page(server.url("/?token=open+sesame"), is_lost=True)
        page.wait_for_link("Live")
        page.wait_until(lambda: page.count_looks() > 2)
    with running(avatar, ServeOptions(token="another"), port=server.port):
        page.wait_for_link("Refused")
        page.wait_for_text("#notice-title", "A token is needed")
        page.page.get_by_label("Token").fill("another")
        page.page.keyboard.press("Enter")
        page.wait_for_link("Live")
