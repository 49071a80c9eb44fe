"""The page in a real browser, on a server whose avatar draws its poses, so that what is shown can be told exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import aioice.ice
import numpy as np
import pytest

from posecrafter_rt.poses.draw import draw_pose
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve import options, session, webrtc
from posecrafter_rt.serve.protocol import decode_pose
from tests.serve.browser.pages import OpenPage, Serve
from tests.serve.browser.walker import STILL, assert_shows, pause_demo, person, walking_avatar
from tests.serve.drawn import SIZE, DrawnAvatar

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

pytestmark = pytest.mark.browser
OPENING_MS = 6000  # after which a page gives up WebRTC
PATIENT = f"""const set = window.setTimeout;
window.setTimeout = (use, ms, ...given) => set(use, ms === {OPENING_MS} ? 90000 : ms, ...given);"""


@pytest.fixture
def avatar() -> DrawnAvatar:
    return walking_avatar()


def test_the_page_opens_and_says_what_it_shows(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    page.wait_for_text("#name", "drawn")
    assert page.page.title() == "drawn · posecrafter"
    page.wait_for_text("#backend", "torch fp32")
    page.wait_for_text("#sessions", "1 of 4")
    page.wait_until(lambda: page.page.text_content("#fps") not in ("–", "0"))
    page.wait_for_text("#latency", re.compile(r"\d+ ms"))
    assert page.bodies == []


def test_the_demo_plays_by_itself_and_the_avatar_follows(
    serve: Serve, open_page: OpenPage, avatar: DrawnAvatar
) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    page.wait_until(lambda: page.count_looks() > 2)
    pause_demo(page, 3)
    assert page.page.get_attribute("#play", "aria-pressed") is None  # its name says it already
    assert_shows(page, avatar.poses.keypoints[3])
    assert np.abs(page.pixels("pose").astype(int)).max() > 200  # and beside it is the pose
    page.page.get_by_label("Position").fill("0")
    assert_shows(page, avatar.poses.keypoints[0])
    page.page.keyboard.press("Space")
    page.wait_until(lambda: page.count_looks() > 2)


def test_nobody_is_told_and_the_pose_is_shown_over_the_avatar_if_wanted(
    serve: Serve, open_page: OpenPage, avatar: DrawnAvatar
) -> None:
    avatar.poses = PoseSequence(np.stack([person(), np.zeros((134, 3), np.float32)]), SIZE, 25.0)
    page = open_page(serve().url())
    pause_demo(page, 1)
    page.wait_for_text("#held", "Nobody is seen")
    page.page.get_by_label("Position").fill("0")
    assert_shows(page, person())
    assert not page.page.is_visible("#held")
    shown_as = "['held', 'note'].map((id) => getComputedStyle(document.getElementById(id)).display)"
    assert page.page.evaluate(shown_as) == ["block", "block"]  # else screen readers would not hear of their next text
    assert not page.page.is_visible("#avatar-pose")
    page.page.get_by_label("Show pose").check()
    page.wait_until(lambda: page.pixels("avatar-pose").max() > 200)


def test_the_pose_over_the_avatar_lies_where_the_avatar_does_or_is_not_shown(
    serve: Serve, open_page: OpenPage, tmp_path: Path
) -> None:
    """On a canvas taller than the avatar, which covers it; fitted, only the server knows where a pose lies."""
    PoseSequence(person(y=16)[np.newaxis], (SIZE[0] + 32, SIZE[1])).save(tmp_path / "tall.json")
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    page.page.get_by_label("Show pose").check()
    page.choose("File")
    page.page.set_input_files("#file", tmp_path / "tall.json")
    page.wait_for_text("#file-status", "tall.json: 1 pose")
    assert page.page.get_by_label("Show pose").is_disabled() and not page.page.is_visible("#avatar-pose")
    assert "fitted" in (page.page.get_attribute("#overlay-switch", "title") or "")
    page.page.get_by_label("Fit the person").uncheck()  # the pose that is there already is shown otherwise
    assert_shows(page, person())
    page.page.wait_for_selector("#avatar-pose")

    def box(pixels: np.ndarray) -> np.ndarray:
        """From where to where it is drawn on, (2, 2)."""
        places = np.argwhere(pixels.max(axis=-1) > 60)
        return np.stack([places.min(axis=0), places.max(axis=0) + 1]) if len(places) else np.zeros((2, 2))

    def is_in_place() -> bool:
        pixels = page.pixels("avatar-pose")
        scale = min(np.divide(pixels.shape[:2], SIZE))
        corner = (np.array(pixels.shape[:2]) - np.multiply(SIZE, scale)) / 2
        return bool(np.abs((box(pixels) - corner) / scale - box(draw_pose(person(), SIZE))).max() < 1.5)

    page.wait_until(is_in_place)


def test_what_was_chosen_is_not_shown_of_a_page_that_begins_anew(serve: Serve, open_page: OpenPage) -> None:
    """Browsers fill in what forms held when one comes back to them."""
    page = open_page(serve().url())
    page.wait_for_link("Live")
    page.page.get_by_label("Show pose").check()
    page.choose("Webcam")
    page.page.get_by_label("Connection").select_option("webrtc")
    page.page.goto("about:blank")
    page.page.go_back()
    page.wait_for_link("Live")
    assert page.page.get_by_role("radio", name="Demo").is_checked()
    assert not page.page.get_by_label("Show pose").is_checked()
    assert page.page.get_by_label("Connection").input_value() == "websocket"


def test_webrtc_shows_the_avatar(
    serve: Serve, open_page: OpenPage, launch: Callable[..., Browser], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends leave out loopback when they look for addresses, unless told; here they are to use nothing else.

    And both wait for each other as long as a busy machine takes.
    """
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    monkeypatch.setattr(webrtc, "_CONNECT_TIMEOUT_S", 90.0)
    browser = launch("--allow-loopback-in-peer-connection", "--disable-features=WebRtcHideLocalIpsWithMdns")
    page = open_page(serve().url(), browser=browser)
    page.page.add_init_script(PATIENT)
    page.page.reload()
    page.wait_for_link("Live")
    offer = page.hold_offer()
    page.wait_for_link("Connecting")
    offer.continue_()
    page.wait_for_link("Live")
    page.wait_until(lambda: page.count_looks() > 2)
    page.wait_until(lambda: page.page.text_content("#latency") != "–")
    assert (page.page.get_attribute("#latency-figure", "title") or "").startswith("Approximate")
    assert page.page.get_by_label("Connection").input_value() == "webrtc"


def test_where_webrtc_does_not_come_about_the_websocket_takes_over(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), is_lost=True)
    page.wait_for_link("Live")
    refused: list[Route] = []

    def refuse(route: Route) -> None:
        refused.append(route)
        route.fulfill(status=501, json={"message": "no aiortc", "hint": ""})

    page.page.route("**/api/offer", refuse)
    page.page.evaluate("""() => {  // a later note would hide it
      window.notes = [];
      const note = document.getElementById("note");
      new MutationObserver(() => notes.push(note.textContent)).observe(note, { childList: true, characterData: true, subtree: true });
    }""")
    page.page.get_by_label("Connection").select_option("WebRTC")
    page.wait_until(lambda: refused)
    page.wait_until(lambda: page.page.get_by_label("Connection").input_value() == "websocket")
    page.wait_for_link("Live")
    page.wait_until(lambda: page.count_looks() > 2)
    assert "WebRTC did not connect, so the page uses the WebSocket: no aiortc." in page.page.evaluate("notes")


def test_who_wants_less_motion_is_not_moved_at(serve: Serve, open_page: OpenPage, avatar: DrawnAvatar) -> None:
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    assert_shows(page, avatar.poses.keypoints[0])
    assert page.count_looks() == 1
    page.page.get_by_role("button", name="Play", exact=True).click()
    page.wait_until(lambda: page.count_looks() > 2)


def test_a_pose_whose_frame_was_too_late_is_shown_in_the_end(
    serve: Serve, open_page: OpenPage, avatar: DrawnAvatar, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    assert_shows(page, avatar.poses.keypoints[0])
    monkeypatch.setattr(session, "MAX_AGE_S", options.MAX_AGE_S)
    avatar.seconds = 1.3
    page.page.get_by_label("Position").fill("3")
    page.wait_for_text("#note", "older than 1 s are not shown")
    avatar.seconds = 0
    assert_shows(page, avatar.poses.keypoints[3])


def test_poses_that_a_slow_server_cannot_take_are_counted(
    serve: Serve, open_page: OpenPage, avatar: DrawnAvatar
) -> None:
    avatar.seconds = 0.5  # any page has more than two poses a second
    page = open_page(serve().url())
    page.wait_for_link("Live")

    def dropped() -> int:
        return int((page.page.text_content("#dropped") or "").replace("–", "0"))

    few = page.wait_until(dropped)
    page.wait_until(lambda: dropped() > few + 5)


def test_a_pipelined_avatar_gets_a_new_pose_for_about_every_step(
    serve: Serve, open_page: OpenPage, avatar: DrawnAvatar
) -> None:
    """With two poses on their way at most, half of four steps at a time would be spent on poses that were there before."""
    avatar.seconds = 0.3  # three poses a second are what any page has that is drawn without a GPU
    # In 0.2 s the five poses have come round: then each step would be of the same one.
    avatar.poses = PoseSequence(np.stack([person(x) for x in np.linspace(-4, 4, 32)]), SIZE, 25.0)
    server = serve(stream={"steps": 4, "is_pipelined": True})
    page = open_page(server.url())
    page.wait_for_link("Live")
    registry = server.app.state.service.metrics.registry

    def counts() -> np.ndarray:
        """Frames that were sent, and steps, so far."""
        return np.array([registry.get_sample_value("posecrafter_frame_age_seconds_count"), len(avatar.steps)])

    def is_fed() -> bool:
        before = counts()
        page.wait_until(lambda: counts()[1] >= before[1] + 16)
        frames, steps = counts() - before
        return bool(frames / steps > 0.75)

    assert any(is_fed() for _ in range(6))  # a machine that is busy with other things may keep the page from its work
    avatar.seconds = 0.02  # four steps of 0.3 s take longer than the second after which nothing is shown
    page.wait_until(lambda: page.count_looks() > 2)


def test_what_the_page_sends_is_what_it_shows(serve: Serve, open_page: OpenPage, avatar: DrawnAvatar) -> None:
    page = open_page(serve().url())
    pause_demo(page, 2)
    assert_shows(page, avatar.poses.keypoints[2])
    sent = [decode_pose(message) for message in page.poses]
    assert np.array_equal(sent[-1].keypoints, avatar.poses.keypoints[2]) and sent[-1].canvas == SIZE
    assert [pose.sequence for pose in sent] == list(range(1, len(sent) + 1))
