"""An open page: what it shows, and what it does behind the scenes.

Tests; Playwright.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from tests.serve.drawn import Running

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page, Request, Route, WebSocket

TIMEOUT_S = 90  # a busy machine without a GPU is slow to draw
_HAS_SIZE = "id => document.getElementById(id).width * document.getElementById(id).height > 0"
_PIXELS = """id => {
  const canvas = document.getElementById(id);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let text = "";
  for (const value of data) text += String.fromCharCode(value);
  return { height: canvas.height, width: canvas.width, pixels: btoa(text) };
}"""


class LivePage:
    """A page of a served avatar.

    complaints: errors in its console, and those that it did not catch. foreign: addresses elsewhere that it asked.
    bodies: what it sent by HTTP. poses: the binary messages that it sent by WebSocket.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.bodies: list[bytes] = []
        self.poses: list[bytes] = []
        self._host = urlsplit(url).netloc
        page.set_default_timeout(TIMEOUT_S * 1000)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._on_request)
        page.on("websocket", self._on_socket)
        page.goto(url)

    def pixels(self, canvas: str = "avatar") -> np.ndarray:
        """What a canvas shows: uint8 (H, W, 3); waits for one that was hidden to get its size."""
        self.page.wait_for_function(_HAS_SIZE, arg=canvas)
        shown = self.page.evaluate(_PIXELS, canvas)
        rows = np.frombuffer(base64.b64decode(shown["pixels"]), np.uint8)
        return rows.reshape(shown["height"], shown["width"], 4)[..., :3]

    def wait_for_link(self, text: str) -> None:
        """Wait until the header says this of the connection."""
        self.wait_for_text("#link", text)

    def wait_for_text(self, selector: str, text: str | re.Pattern[str], seconds: float = TIMEOUT_S) -> None:
        """Wait until an element holds this text."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_contain_text(text, timeout=seconds * 1000)

    def wait_until(self, condition: Any, seconds: float = TIMEOUT_S) -> Any:
        """Ask until the answer is true, while the page goes on; returns the answer."""
        deadline = time.monotonic() + seconds
        while not (answer := condition()):
            assert time.monotonic() < deadline, "it did not come true"
            self.page.wait_for_timeout(50)
        return answer

    def settle(self) -> None:
        """Wait until timers of up to half a second that the page has set so far are over, however slow the machine is."""
        self.page.evaluate("() => new Promise((resolve) => setTimeout(resolve, 600))")

    def wait_for_change(self, before: np.ndarray) -> np.ndarray:
        """Wait until the avatar looks otherwise than before; returns how."""
        self.wait_until(lambda: not np.array_equal(self.pixels(), before))
        return self.pixels()

    def count_looks(self, samples: int = 12) -> int:
        """How many different frames the avatar shows in a while; looked at in no pace that poses might keep, too."""
        seen = set()
        for number in range(samples):
            seen.add(hashlib.sha256(self.pixels().tobytes()).digest())
            self.page.wait_for_timeout(30 + 9 * number)
        return len(seen)

    def hold_offer(self) -> Route:
        """Choose WebRTC, and return the page's offer, which the server gets or not as the caller wishes."""
        held: list[Route] = []
        self.page.route("**/api/offer", lambda route: held.append(route))
        self.page.get_by_label("Connection").select_option("WebRTC")
        self.wait_until(lambda: held)
        return held[0]

    def choose(self, source: str) -> None:
        """Drive the avatar with `Demo`, `File`, `Webcam` or `Joints`."""
        self.page.get_by_role("radio", name=source).check()
        self.page.wait_for_selector(f"#{source.lower()}-panel")  # that of Joints once the avatar's own poses are there

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _on_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("blob", "data") and parts.netloc != self._host:
            self.foreign.append(request.url)
        if request.post_data_buffer:
            self.bodies.append(request.post_data_buffer)

    def _on_socket(self, socket: WebSocket) -> None:
        if urlsplit(socket.url).netloc != self._host:
            self.foreign.append(socket.url)
        socket.on("framesent", lambda payload: isinstance(payload, bytes) and self.poses.append(payload))


Serve = Callable[..., Running]  # the type of the fixture `serve`
OpenPage = Callable[..., LivePage]  # that of `open_page`
