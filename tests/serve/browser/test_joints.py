"""Joints that are moved by hand: with a mouse, with a finger, with keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from posecrafter_rt.poses.keypoints import FEET, PoseSequence, keypoint_name
from tests.serve.browser.pages import LivePage, OpenPage, Serve
from tests.serve.browser.walker import PHONE, STILL, assert_shows, person
from tests.serve.drawn import SIZE, DrawnAvatar

pytestmark = pytest.mark.browser
NOSE, NECK, LEFT_WRIST = 0, 1, 7
START = person(-4)


@pytest.fixture
def avatar() -> DrawnAvatar:
    avatar = DrawnAvatar()
    avatar.poses = PoseSequence(START[np.newaxis], SIZE)
    return avatar


def nod(pose: np.ndarray, x: float, y: float) -> np.ndarray:
    """The nose moved by some pixels, and eyes and ears with it, turned as the line from the neck to the nose turns."""
    points = pose[:18, 0] + 1j * pose[:18, 1]
    nose = points[NOSE] + x + 1j * y
    turn = (nose - points[NECK]) / (points[NOSE] - points[NECK])
    head = [NOSE, 14, 15, 16, 17]
    points[head] = nose + turn / abs(turn) * (points[head] - points[NOSE])
    nodded = pose.copy()
    nodded[:18, 0], nodded[:18, 1] = points.real, points.imag
    return nodded


def on_canvas(page: LivePage) -> Callable[[float, float], tuple[float, float]]:
    """(x, y) of the pose's canvas → where that is on the page, in its pixels."""
    box = page.page.locator("#pose").bounding_box()
    assert box is not None
    scale = box["height"] / SIZE[0]
    left = box["x"] + (box["width"] - SIZE[1] * scale) / 2
    return lambda x, y: (left + (x + 0.5) * scale, box["y"] + (y + 0.5) * scale)


def fingers_on(page: LivePage) -> tuple[Callable[..., None], Callable[[float, float], tuple[float, float]]]:
    """A phone's page with its joints in view → touch(kind, *places on the page, one per finger), and `on_canvas`."""
    page.wait_for_link("Live")
    page.choose("Joints")
    assert_shows(page, START)
    page.page.locator("#pose").scroll_into_view_if_needed()
    fingers = page.page.context.new_cdp_session(page.page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    return touch, on_canvas(page)


def test_joints_follow_a_finger_which_does_not_scroll_the_page(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), **PHONE)
    touch, at = fingers_on(page)
    scrolled = page.page.evaluate("scrollY")
    x, y = map(float, START[NECK, :2])
    touch("touchStart", at(x + 1, y + 1))  # fingers are broad: a pixel of the canvas beside it
    for share in np.linspace(0, 1, 8):
        touch("touchMove", at(x + 6 * share, y + 4 * share))
    touch("touchEnd")
    assert_shows(page, person(2, 4))
    assert page.page.evaluate("scrollY") == scrolled


def test_joints_follow_the_mouse_and_the_arrow_keys(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url())
    page.wait_for_link("Live")
    page.choose("Joints")
    assert_shows(page, START)
    at = on_canvas(page)
    x, y = map(float, START[NECK, :2])
    page.page.mouse.move(*at(x, y))
    page.page.mouse.down()
    page.page.mouse.move(*at(x + 3, y + 2), steps=4)
    page.page.mouse.move(*at(x + 6, y + 4), steps=4)
    page.page.mouse.up()
    moved = person(2, 4)
    assert_shows(page, moved)

    page.page.get_by_label("Joint", exact=True).select_option("nose")
    page.page.locator("#pose").focus()
    for key in ("Shift+ArrowUp", "ArrowRight"):
        page.page.keyboard.press(key)
    step = SIZE[1] / 100
    nodded = nod(moved, step, -5 * step)
    page.wait_for_text("#joint-place", "nose at {:.0f}, {:.0f}".format(*nodded[NOSE]))
    assert_shows(page, nodded)
    page.page.get_by_role("button", name="Start over").click()
    assert_shows(page, START)


def test_screen_readers_leave_the_keys_to_the_pose_only_while_it_can_be_moved(
    serve: Serve, open_page: OpenPage
) -> None:
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    for source, role in (("Demo", "img"), ("Joints", "application"), ("Demo", "img")):
        page.choose(source)
        assert page.page.get_attribute("#pose", "role") == role


def test_only_the_first_finger_and_the_main_button_hold_a_joint(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), **PHONE)
    touch, at = fingers_on(page)
    place = page.page.text_content("#joint-place")
    x, y = map(float, START[NECK, :2])
    far = at(1, 1)  # of every joint
    touch("touchStart", far)
    touch("touchStart", far, at(x, y))
    touch("touchMove", far, at(x + 6, y + 4))
    touch("touchMove", at(3, 1), at(x + 6, y + 4))
    touch("touchEnd")
    page.page.mouse.move(*at(x, y))
    page.page.mouse.down(button="right")
    page.page.mouse.move(*at(x + 6, y + 4), steps=4)
    page.page.mouse.up(button="right")
    page.page.wait_for_timeout(300)
    assert page.page.text_content("#joint-place") == place
    assert_shows(page, START)


def test_joints_that_are_not_drawn_are_not_offered(serve: Serve, open_page: OpenPage, avatar: DrawnAvatar) -> None:
    start = START.copy()
    start[LEFT_WRIST, 2] = 0.15
    start[FEET] = (24, 60, 1)
    avatar.poses = PoseSequence(start[np.newaxis], SIZE)
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    page.choose("Joints")
    offered = page.page.locator("#joint option").all_text_contents()
    drawn = np.flatnonzero(start[:, 2] == 1)
    assert offered == [keypoint_name(index) for index in drawn if index not in range(FEET.start, FEET.stop)]


def test_a_shortcut_of_the_browser_moves_no_joint(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    page.choose("Joints")
    place = page.page.text_content("#joint-place")
    for key in ("altKey", "ctrlKey", "metaKey"):
        is_passed_on = page.page.evaluate(
            """(key) => document.getElementById("pose").dispatchEvent(
              new KeyboardEvent("keydown", { key: "ArrowLeft", [key]: true, cancelable: true }))""",
            key,
        )
        assert is_passed_on and page.page.text_content("#joint-place") == place
