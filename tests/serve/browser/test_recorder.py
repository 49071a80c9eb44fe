"""Recording on the page, in a real browser."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest

from posecrafter_rt.serve import recording
from posecrafter_rt.serve.options import ServeOptions
from tests.serve.browser.pages import LivePage, OpenPage, Serve
from tests.serve.browser.walker import walking_avatar
from tests.serve.drawn import SIZE, DrawnAvatar, running

pytestmark = pytest.mark.browser


@pytest.fixture
def avatar() -> DrawnAvatar:
    return walking_avatar()


def test_a_recording_can_be_saved(serve: Serve, open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    page.page.get_by_role("button", name="Record").click()
    page.wait_for_text("#record-label", re.compile(r"Stop 0:(0[1-9]|[1-5]\d)"))
    page.page.get_by_role("button", name="Stop").click()
    with page.page.expect_download() as download:
        page.page.get_by_role("link", name="Save recording").click()
    download.value.save_as(tmp_path / "avatar.mp4")
    with av.open(str(tmp_path / "avatar.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) > 5 and frames[0].shape == (*SIZE, 3)


def test_the_record_button_keeps_the_focus_so_that_space_stops_what_it_began(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    page.page.locator("#record").focus()
    page.page.keyboard.press("Space")
    page.wait_for_text("#record-label", "Stop")
    page.page.keyboard.press("Space")
    page.wait_for_text("#record-label", "Record")
    page.page.wait_for_selector("#recordings a")


def test_a_recording_that_is_lost_is_told_and_the_one_before_can_still_be_saved(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    button = page.page.locator("#record")
    for _ in range(2):
        button.click()
    page.page.wait_for_selector("#recordings a")
    assert page.page.text_content("#recording-note") == ""
    button.click()
    page.wait_for_text("#record-label", "Stop")
    assert page.page.is_visible("#recordings a")
    page.page.get_by_label("Connection").select_option("webrtc")
    page.wait_for_text("#recording-note", "The recording is lost")
    page.wait_for_text("#record-label", "Record")
    assert page.page.is_visible("#recordings a")


def test_word_of_an_older_recording_leaves_the_time_of_the_running_one(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url())
    page.page.route_web_socket("**/ws*", lambda page_side: hear(page_side, page_side.connect_to_server()))

    def hear(page_side: Any, server_side: Any) -> None:
        def pass_on(message: str | bytes) -> None:
            page_side.send(message)
            if isinstance(message, str) and json.loads(message)["type"] == "stats":
                page_side.send(json.dumps({"type": "recording", "on": True, "url": "/api/recordings/old.mp4"}))

        server_side.on_message(pass_on)

    page.page.reload()
    page.wait_for_link("Live")
    page.page.locator("#record").click()
    page.wait_for_text("#record-label", re.compile(r"Stop 0:0[3-9]"), seconds=20)
    assert "/old.mp4" in (page.page.get_attribute("#recordings a", "href") or "")


def test_a_recording_that_ends_at_its_greatest_length_is_told_of_until_the_next(
    serve: Serve, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(serve().url())
    page.page.add_init_script(
        "const set = setTimeout; window.setTimeout = (use, ms) => set(use, ms === 8000 ? 0 : ms);"
    )
    page.page.reload()
    page.wait_for_link("Live")
    with monkeypatch.context() as patch:
        patch.setattr(recording, "Recording", partial(recording.Recording, max_seconds=0.5))
        page.page.locator("#record").click()
        page.wait_for_text("#recording-note", "ten minutes")
    page.wait_for_text("#record-label", "Record")
    page.settle()
    page.wait_for_text("#recording-note", "ten minutes")  # longer than other notes
    assert page.page.is_visible("#recordings a")
    page.page.locator("#record").click()
    page.wait_for_text("#record-label", "Stop")
    assert page.page.text_content("#recording-note") == ""


def record(page: LivePage) -> None:
    """Make a recording, and wait for the offer to save it."""
    page.page.locator("#record").click()
    page.wait_for_text("#record-label", "Stop")
    page.page.locator("#record").click()
    page.wait_for_text("#record-label", "Record")


def test_each_recording_can_be_saved_until_it_is(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    links = page.page.locator("#recordings a")
    record(page)
    record(page)
    assert links.all_text_contents() == ["Save recording", "Save recording 2"]
    with page.page.expect_download():
        links.first.click()
    record(page)
    assert links.all_text_contents() == ["Save recording 2", "Save recording 3"]
    page.settle()  # ten commands a second are allowed
    for _ in range(3):
        record(page)
    # The server keeps four.
    assert links.all_text_contents() == [f"Save recording {number}" for number in range(3, 7)]


def test_a_recording_that_went_with_its_server_is_not_offered(open_page: OpenPage, avatar: DrawnAvatar) -> None:
    with running(avatar, ServeOptions()) as server:
        page = open_page(server.url(), is_lost=True)
        page.wait_for_link("Live")
        record(page)
        page.page.locator("#way").dispatch_event("change")  # a new connection to the same server
        page.wait_for_link("Live")
        page.settle()
        assert page.page.is_visible("#recordings a")
    page.wait_for_link("Reconnecting")
    with running(avatar, ServeOptions(), port=server.port):
        page.wait_for_link("Live")
        page.wait_until(lambda: page.page.locator("#recordings a").count() == 0)
