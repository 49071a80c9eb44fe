"""The page's connection: what a server gets when sources change, and what the page says when a server is of no use."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve import app, webrtc
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.protocol import decode_pose
from tests.serve.browser.pages import LivePage, OpenPage, Serve
from tests.serve.browser.walker import STILL
from tests.serve.drawn import DrawnAvatar, DrawnStream, make_pose, running

if TYPE_CHECKING:
    from playwright.sync_api import WebSocket, WebSocketRoute

pytestmark = pytest.mark.browser
# A peer that never connects.
UNCONNECTED = """window.RTCPeerConnection = class extends EventTarget {
  iceGatheringState = "complete";
  localDescription = { type: "offer", sdp: "" };
  createDataChannel() { return { readyState: "connecting" }; }
  addTransceiver() {}
  async createOffer() {}
  async setLocalDescription() {}
  async setRemoteDescription() {}
  close() {}
};"""
# As often as a key that is held for two seconds.
IN_TURNS = """for (let n = 0; n < 60; n++) {
  document.querySelector(`[name=source][value=${n % 2 ? "joints" : "file"}]`).click();
}"""


def reload_listening(page: LivePage) -> list[str | bytes]:
    """Load a page again; what it then sends by WebSocket is added to the list, in order."""
    sent: list[str | bytes] = []

    def listen(socket: WebSocket) -> None:
        socket.on("framesent", lambda message: sent.append(message))

    page.page.on("websocket", listen)
    page.page.reload()
    page.wait_for_link("Live")
    return sent


def is_reset(message: str | bytes) -> bool:
    return isinstance(message, str) and json.loads(message)["type"] == "reset"


def test_after_a_reset_no_pose_of_the_person_before_is_sent(
    serve: Serve, open_page: OpenPage, avatar: DrawnAvatar, tmp_path: Path
) -> None:
    """Else a fit could settle on that person; on a slow server one always waits to be sent."""
    for name, shift in (("before", 0.0), ("after", 100.0)):
        steps = np.stack([make_pose(shift + x) for x in np.linspace(0, 4, 50)])
        PoseSequence(steps, (200, 200), 25.0).save(tmp_path / f"{name}.json")
    page = open_page(serve().url(), **STILL)
    sent = reload_listening(page)
    page.choose("File")
    page.page.set_input_files("#file", tmp_path / "before.json")
    page.wait_for_text("#file-status", "before.json: 50 poses")
    avatar.seconds = 0.4
    num_sent = len(sent)
    page.wait_until(lambda: len(sent) > num_sent + 4)

    def person(message: str | bytes) -> str:
        assert isinstance(message, bytes)
        keypoints = decode_pose(message).keypoints
        assert keypoints is not None
        return "after" if keypoints[:, 0].min() > 100 else "before"

    def after_reset() -> list[str]:
        last = max(index for index, message in enumerate(sent) if is_reset(message))
        return [person(message) for message in sent[last:] if isinstance(message, bytes)]

    num_resets = sum(map(is_reset, sent))
    page.page.set_input_files("#file", tmp_path / "after.json")
    page.wait_until(lambda: sum(map(is_reset, sent)) > num_resets and "after" in after_reset())
    assert set(after_reset()) == {"after"}


def test_a_key_that_is_held_on_the_sources_is_one_change(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), **STILL)
    sent = reload_listening(page)
    page.wait_for_text("#name", "drawn")
    page.settle()
    sent.clear()
    page.page.evaluate(IN_TURNS)
    page.wait_until(lambda: any(map(is_reset, sent)))
    page.settle()
    assert page.page.text_content("#link") == "Live"
    assert sum(map(is_reset, sent)) == 1


def test_a_server_that_is_lost_before_it_is_ready_is_noticed(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), is_lost=True, **STILL)
    page.wait_for_link("Live")
    page.page.route_web_socket("**/ws*", lambda socket: None)  # it opens, and nothing comes
    page.page.route("**/api/info", lambda route: route.abort())
    page.page.reload()
    page.wait_for_text("#notice-title", "The server does not answer")


def test_a_server_that_stands_still_is_noticed_and_so_is_that_it_goes_on(serve: Serve, open_page: OpenPage) -> None:
    server, goes_on = serve(), threading.Event()
    service = server.app.state.service
    page = open_page(server.url(), is_lost=True, **STILL)
    page.wait_for_link("Live")
    page.wait_for_text("#name", "drawn")
    info = service.info

    def stand_still() -> Any:  # with the event loop
        goes_on.wait(120)
        return info()

    with ExitStack() as stack:
        stack.callback(goes_on.set)
        service.info = stand_still
        page.wait_for_link("Reconnecting")
        page.wait_for_text("#notice-title", "The server does not answer")
    page.wait_for_link("Live")
    assert not page.page.is_visible("#notice")


def test_a_connection_that_is_dead_while_requests_are_answered_is_noticed(serve: Serve, open_page: OpenPage) -> None:
    """As when a phone changes its network: nothing comes over the old connection any more, not even its end."""
    sockets: list[WebSocketRoute] = []
    dead: list[WebSocketRoute] = []

    def pass_on(socket: WebSocketRoute) -> None:
        sockets.append(socket)
        socket.connect_to_server().on_message(lambda message: None if socket in dead else socket.send(message))

    page = open_page(serve().url(), **STILL)
    page.page.route_web_socket("**/ws*", pass_on)
    page.page.reload()
    page.wait_for_link("Live")
    assert len(sockets) == 1
    dead.append(sockets[0])
    page.wait_until(lambda: len(sockets) > 1)
    page.wait_for_link("Live")


def test_a_proxy_that_does_not_pass_on_the_websocket_is_told_of(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), is_lost=True, **STILL)  # browsers complain of handshakes that fail
    page.page.add_init_script(
        "WebSocket = class extends WebSocket { constructor() { super(`ws://${location.host}/api/info`); } };"
    )
    page.page.reload()
    page.wait_for_text("#notice-text", "A proxy in between must pass on Upgrade and Connection.")
    page.page.route(
        "**/api/info", lambda route: route.fulfill(status=502)
    )  # as a proxy answers for a server that is gone
    page.wait_for_text("#notice-title", "The server does not answer")


def test_a_proxy_that_takes_the_handshake_and_keeps_silent_is_told_of(
    serve: Serve, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    async def keep_silent(service: Any, socket: Any) -> None:
        while not goes_on.is_set():
            await asyncio.sleep(0.05)

    with monkeypatch.context() as patch, ExitStack() as stack:
        stack.callback(goes_on.set)
        patch.setattr(app, "serve_socket", keep_silent)
        page = open_page(serve().url(), is_lost=True, **STILL)
        page.wait_for_text("#notice-text", "A proxy in between must pass on Upgrade and Connection.")
    page.wait_for_link("Live")


def test_a_wrong_token_can_be_corrected(open_page: OpenPage, avatar: DrawnAvatar) -> None:
    with running(avatar, ServeOptions(token="open sesame")) as server:
        page = open_page(server.url(), is_lost=True, **STILL)  # browsers complain of answers that refuse
        for token in ("wrong", "open sesame"):
            page.wait_for_text("#notice-text", "The token is missing or wrong.")
            page.page.get_by_label("Token").fill(token)
            page.page.keyboard.press("Enter")
            page.page.wait_for_url(f"**/?token={token.replace(' ', '+')}")
        page.wait_for_link("Live")


def test_why_no_stream_can_be_opened_is_told_until_one_can(
    serve: Serve, open_page: OpenPage, avatar: DrawnAvatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()

    def stream(**options: Any) -> Any:
        raise PoseCrafterError("the GPU has no memory left", "end other programs")

    with monkeypatch.context() as patch:
        patch.setattr(avatar, "stream", stream)
        page = open_page(server.url(), **STILL)
        page.wait_for_text("#notice-title", "The server cannot show the avatar")
        page.wait_for_text(
            "#notice-text", "The GPU has no memory left. End other programs. The page tries again by itself."
        )
    page.wait_for_link("Live")
    assert not page.page.is_visible("#notice")


def test_why_a_stream_has_closed_itself_is_told_until_there_is_another(
    serve: Serve, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    with monkeypatch.context() as patch:
        patch.setattr(DrawnStream, "step", DrawnStream.close_itself)
        page.wait_for_text("#notice-title", "The server cannot show the avatar")
        page.wait_for_text("#notice-text", "The networks cannot be loaded in float32. Free some memory.")
    page.wait_for_link("Live")
    assert not page.page.is_visible("#notice")


def test_a_stream_that_closes_itself_each_time_is_opened_less_and_less_often(
    serve: Serve, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one costs the server the loading of networks."""
    closed_s: list[float] = []

    def close_itself(stream: DrawnStream, pose: np.ndarray | None) -> np.ndarray:
        closed_s.append(time.monotonic())
        return stream.close_itself(pose)

    page = open_page(serve().url())
    page.wait_for_link("Live")
    monkeypatch.setattr(DrawnStream, "step", close_itself)
    page.wait_until(lambda: len(closed_s) > 4)
    assert closed_s[4] - closed_s[3] > 0.9 * 0.4 * 1.6**3  # no page comes sooner than backoff.ts says


def test_a_page_that_did_not_answer_in_time_does_not_say_that_the_avatar_cannot_be_shown(
    serve: Serve, open_page: OpenPage
) -> None:
    sockets: list[WebSocketRoute] = []

    def pass_on(socket: WebSocketRoute) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    page = open_page(serve().url(), **STILL)
    page.page.route_web_socket("**/ws*", pass_on)
    page.page.reload()
    page.wait_for_link("Live")
    sockets[0].close(code=1011, reason="keepalive ping timeout")  # as uvicorn does
    page.wait_for_text("#notice-title", "The server does not answer")
    page.wait_for_link("Live")


def test_a_browser_without_webrtc_uses_the_websocket_and_says_why(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), **STILL)
    page.page.add_init_script("delete window.RTCPeerConnection")
    page.page.reload()
    page.wait_for_link("Live")
    page.page.get_by_label("Connection").select_option("WebRTC")
    page.wait_for_text("#note", "uses the WebSocket: this browser has none")
    page.wait_for_link("Live")
    assert page.page.get_by_label("Connection").input_value() == "websocket"


def test_webrtc_that_does_not_come_about_is_given_up_after_the_server_has_given_it_up(
    serve: Serve, open_page: OpenPage
) -> None:
    """The server begins to wait with its answer, which may take a while. Its place is then free for the WebSocket."""
    page = open_page(serve().url(), **STILL)
    page.page.add_init_script(UNCONNECTED)
    page.page.reload()
    page.wait_for_link("Live")
    offer = page.hold_offer()
    page.page.wait_for_timeout(3000)
    answered_s = time.monotonic()
    offer.fulfill(json={"type": "answer", "sdp": ""})
    page.wait_until(lambda: page.page.get_by_label("Connection").input_value() == "websocket")
    assert time.monotonic() - answered_s > webrtc._CONNECT_TIMEOUT_S
    page.wait_for_link("Live")
