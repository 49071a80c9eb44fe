"""The camera's button, and what it tells: with a camera that is drawn and a tracker that finds one pose at once.

`test_webcam.py` has a real tracker.
"""

from __future__ import annotations

import pytest

from tests.serve.browser.pages import LivePage, OpenPage, Serve
from tests.serve.browser.walker import STILL

pytestmark = pytest.mark.browser

# `allow()` is the person who answers the browser's question; `commands` is what the page tells the server.
CAMERA = """
  window.commands = [];
  window.numAsked = 0;
  const { send } = WebSocket.prototype;
  WebSocket.prototype.send = function (data) {
    if (typeof data === "string") window.commands.push(JSON.parse(data).type);
    send.call(this, data);
  };
  navigator.mediaDevices.getUserMedia = () => new Promise((resolve) => (window.numAsked++, window.allow = () => {
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("2d");
    setInterval(() => context.fillRect(0, 0, 64, 48), 40);
    window.camera = canvas.captureStream();
    resolve(window.camera);
  }));
"""
TRACKER = """
  window.Holistic = class {
    setOptions() {}
    onResults(tell) { this.tell = tell; }
    async initialize() {}
    async send({ image }) {
      this.tell({ image, poseLandmarks: Array.from({ length: 33 }, (_, i) => ({ x: i / 40, y: i / 40, z: 0, visibility: 1 })) });
    }
  };
"""

# The next picture makes the tracker fail once `fail()` is called.
HELD_UP = """() => {
  const { send } = Holistic.prototype;
  Holistic.prototype.send = () => new Promise((_, reject) => (window.fail = () => {
    Holistic.prototype.send = send;
    reject(new Error("too late"));
  }));
}"""


@pytest.fixture
def page(serve: Serve, open_page: OpenPage) -> LivePage:
    """The page with its camera's panel open, and the focus on the button."""
    page = open_page(serve().url(), **STILL)
    page.page.route("**/tracker/holistic.js", lambda route: route.fulfill(body=TRACKER, content_type="text/javascript"))
    page.page.add_init_script(CAMERA)
    page.page.reload()
    page.wait_for_link("Live")
    page.choose("Webcam")
    page.page.locator("#camera").focus()
    return page


def start(page: LivePage) -> None:
    page.page.keyboard.press("Space")
    page.wait_for_text("#camera-status", "Waiting for the camera")
    page.page.evaluate("allow()")
    page.wait_for_text("#camera-status", "Following you")


def test_the_button_keeps_the_focus_while_the_camera_is_awaited(page: LivePage) -> None:
    page.page.keyboard.press("Space")
    page.wait_for_text("#camera-status", "Waiting for the camera")
    assert page.page.locator("#camera").is_disabled()
    assert page.page.evaluate("document.activeElement.id") == "camera"
    page.page.keyboard.press("Space")  # once more, which does nothing
    page.page.evaluate("allow()")
    page.wait_for_text("#camera-status", "Following you")
    assert page.page.evaluate("numAsked") == 1
    page.page.keyboard.press("Space")
    page.wait_for_text("#camera", "Start camera")
    assert page.page.text_content("#camera-status") == ""


def test_a_camera_that_is_unplugged_is_told_and_can_be_started_again(page: LivePage) -> None:
    start(page)
    page.page.evaluate("camera.getVideoTracks()[0].dispatchEvent(new Event('ended'))")
    page.wait_for_text("#camera-status", "The camera has stopped")
    assert page.page.text_content("#camera") == "Start camera"
    start(page)


def num_resets(page: LivePage) -> int:
    """How often the page told the server that the person changes, once it has told of all changes."""
    page.settle()
    return int(page.page.evaluate("commands.filter((type) => type === 'reset').length"))


def test_a_person_is_fitted_anew_once_mirrored_or_before_a_camera_that_starts_again(page: LivePage) -> None:
    start(page)
    num_before = num_resets(page)
    page.page.get_by_label("Mirror").uncheck()
    assert num_resets(page) == num_before + 1
    page.page.locator("#camera").press("Space")
    page.wait_for_text("#camera", "Start camera")
    start(page)
    assert num_resets(page) == num_before + 2


def test_an_error_about_a_camera_that_was_left_does_not_end_the_next_one(page: LivePage) -> None:
    start(page)
    page.page.evaluate(HELD_UP)
    page.wait_until(lambda: page.page.evaluate("'fail' in window"))
    page.page.keyboard.press("Space")
    page.wait_for_text("#camera", "Start camera")
    page.page.keyboard.press("Space")
    page.wait_for_text("#camera-status", "Waiting for the camera")
    page.page.evaluate("allow()")
    page.wait_for_text("#camera-status", "Looking for you")
    page.page.evaluate("fail()")
    page.wait_for_text("#camera-status", "Following you")
    assert page.page.text_content("#camera") == "Stop camera"
