"""The page's looks and its keyboard, whatever the avatar: phones, dark and light, the Tab key."""

from __future__ import annotations

import pytest

from tests.serve.browser.pages import LivePage, OpenPage, Serve
from tests.serve.browser.walker import PHONE, STILL

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("source", ["Demo", "File", "Webcam", "Joints"])
def test_a_phone_scrolls_down_only(serve: Serve, open_page: OpenPage, source: str) -> None:
    page = open_page(serve().url(), **PHONE)
    page.wait_for_link("Live")
    page.choose(source)
    assert page.page.evaluate("document.documentElement.scrollWidth") == 360
    too_wide = """[...document.querySelectorAll("main *, header *, footer *")].filter((element) => {
      const { left, right, width } = element.getBoundingClientRect();
      return width > 1 && (left < 0 || right > 360);
    }).map((element) => element.outerHTML)"""
    assert page.page.evaluate(too_wide) == []


def test_dark_and_light_follow_the_system_until_one_is_chosen(serve: Serve, open_page: OpenPage) -> None:
    url = serve().url()

    def brightness(page: LivePage) -> int:
        colour = page.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    dark, light = open_page(url, color_scheme="dark", **STILL), open_page(url, color_scheme="light", **STILL)
    assert brightness(dark) < 50 and brightness(light) > 200
    button = dark.page.get_by_role("button", name="Theme")
    button.click()
    assert dark.page.get_by_role("button", name="Theme: light").is_visible() and brightness(dark) > 200
    dark.page.reload()
    assert brightness(dark) > 200
    button.click()
    assert brightness(dark) < 50


def test_a_browser_that_blocks_storage_shows_the_avatar_all_the_same(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), color_scheme="dark", **STILL)
    page.page.add_init_script(
        'Object.defineProperty(window, "localStorage", { get() { throw new DOMException("denied", "SecurityError"); } })'
    )
    page.page.reload()
    page.wait_for_link("Live")
    page.page.get_by_role("button", name="Theme").click()
    assert page.page.get_by_role("button", name="Theme: light").is_visible()


@pytest.mark.parametrize(("source", "own"), [
    ("Demo", ["overlay", "record", "source: demo", "play", "scrub", "repeat", "speed"]),
    ("File", ["record", "source: file", "file", "fit"]),
    ("Webcam", ["record", "source: webcam", "camera", "mirror", "fit"]),
    ("Joints", ["pose", "overlay", "record", "source: joints", "joint", "joints-reset"]),
])  # fmt: skip
def test_every_control_can_be_reached_with_the_tab_key(
    serve: Serve, open_page: OpenPage, source: str, own: list[str]
) -> None:
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    page.choose(source)
    if source == "Demo":
        page.page.wait_for_selector("#player")  # once the avatar's own poses are there
    page.page.locator("#theme").focus()
    reached: list[str] = []
    while reached[-1:] != ["way"] and len(reached) < 20:
        page.page.keyboard.press("Tab")
        reached.append(
            page.page.evaluate("(({ id, name, value }) => id || `${name}: ${value}`)(document.activeElement)")
        )
    assert reached == [*own, "way"]


def test_arrow_keys_choose_what_drives_the_avatar(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve().url(), **STILL)
    page.wait_for_link("Live")
    page.page.get_by_role("radio", name="Joints").focus()
    page.page.keyboard.press("ArrowLeft")
    page.page.wait_for_selector("#webcam-panel")
    page.page.keyboard.press("ArrowRight")
    page.page.wait_for_selector("#joints-panel")
