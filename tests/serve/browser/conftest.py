"""Chromium, and pages that must neither complain nor ask anyone but their server.

Tests; fixtures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.browser.pages import LivePage

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = which("chromium")
ARGUMENTS = ["--no-sandbox"]
VIEWPORT = {"width": 800, "height": 600}  # small, for it is drawn without a GPU


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Browser]]:
    """launch(*arguments) -> a Chromium, until the tests end."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH: apt-get install chromium")
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(playwright.sync_playwright())

        def start(*arguments: str) -> Browser:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *arguments], timeout=180_000)
            stack.callback(browser.close)
            return browser

        yield start


@pytest.fixture(scope="session")
def browser(launch: Callable[..., Browser]) -> Browser:
    return launch()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., LivePage]]:
    """open_page(url, is_lost=False, **options of the context) -> LivePage.

    At the test's end no page may have complained, nor asked any other server. is_lost: the server will go away, which
    browsers report as errors of their own.
    """
    if not (Path(__file__).parents[3] / "posecrafter_rt/serve/static/index.html").is_file():
        pytest.skip("the page is not built: make web")
    with contextlib.ExitStack() as stack:
        pages: list[tuple[LivePage, bool]] = []

        def start(url: str, *, is_lost: bool = False, browser: Browser = browser, **options: Any) -> LivePage:
            context = browser.new_context(**{"viewport": VIEWPORT, **options})
            stack.callback(context.close)
            pages.append((LivePage(context.new_page(), url), is_lost))
            return pages[-1][0]

        yield start
        for page, is_lost in pages:
            assert page.foreign == []
            assert is_lost or page.complaints == []
