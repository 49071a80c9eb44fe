"""Pose files on the page, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from posecrafter_rt.poses.keypoints import PoseSequence
from tests.serve.browser.pages import OpenPage, Serve
from tests.serve.browser.walker import assert_shows, person, walking_avatar
from tests.serve.drawn import SIZE, DrawnAvatar

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = pytest.mark.browser


@pytest.fixture
def avatar() -> DrawnAvatar:
    return walking_avatar()


def test_a_pose_file_drives_the_avatar(serve: Serve, open_page: OpenPage, tmp_path: Path) -> None:
    poses = PoseSequence(np.stack([person(y=-5), person(y=5)]), SIZE, 5.0)
    poses.save(tmp_path / "walk.json")
    page = open_page(serve().url())
    page.wait_for_link("Live")
    page.choose("File")
    page.page.get_by_label("Fit the person").uncheck()
    page.page.set_input_files("#file", tmp_path / "walk.json")
    page.wait_for_text("#file-status", "walk.json: 2 poses")
    page.page.get_by_role("button", name="Pause").click()
    for index in (1, 0):
        page.page.get_by_label("Position").fill(str(index))
        assert_shows(page, poses.keypoints[index])


def test_a_file_may_be_dropped_anywhere_and_a_bad_one_is_refused_with_the_reason(
    serve: Serve, open_page: OpenPage, tmp_path: Path
) -> None:
    PoseSequence(person(3)[np.newaxis], SIZE).save(tmp_path / "still.json")
    page = open_page(serve().url(), is_lost=True)  # browsers complain of answers that refuse
    page.wait_for_link("Live")
    for text in ((tmp_path / "still.json").read_text(), '{"shoes": 2}'):
        transfer = page.page.evaluate_handle(
            "text => { const t = new DataTransfer(); t.items.add(new File([text], 'still.json')); return t; }", text
        )
        page.page.dispatch_event("body", "drop", {"dataTransfer": transfer})
        page.wait_for_text("#file-status", "still.json: 1 pose" if "people" in text else "people")
    assert page.page.get_by_role("radio", name="File").is_checked()
    assert "is-error" in (page.page.get_attribute("#file-status", "class") or "")


def test_a_file_that_is_left_while_it_is_read_is_not_told_of_any_more(
    serve: Serve, open_page: OpenPage, tmp_path: Path
) -> None:
    PoseSequence(person()[np.newaxis], SIZE).save(tmp_path / "still.json")
    page = open_page(serve().url())
    page.page.route("**/api/poses", lambda route: None if route.request.method == "POST" else route.continue_())
    page.wait_for_link("Live")
    page.choose("File")
    page.page.set_input_files("#file", tmp_path / "still.json")
    page.wait_for_text("#file-status", "Reading the poses of still.json")
    page.choose("Demo")
    page.choose("File")
    assert page.page.text_content("#file-status") == ""


def test_a_file_waits_a_moment_for_a_server_that_is_still_at_another(
    serve: Serve, open_page: OpenPage, tmp_path: Path
) -> None:
    PoseSequence(person()[np.newaxis], SIZE).save(tmp_path / "still.json")
    page = open_page(serve().url(), is_lost=True)  # browsers complain of answers that refuse
    busy = json.dumps({"message": "another file is being read", "hint": "try again in a moment"})
    refused = []

    def refuse_once(route: Route) -> None:
        if refused:
            return route.continue_()
        refused.append(route.request.method)
        return route.fulfill(status=429, body=busy)

    page.wait_for_link("Live")
    page.wait_for_text("#name", "drawn")  # the demo's poses are there
    page.page.route("**/api/poses", refuse_once)
    page.choose("File")
    page.page.set_input_files("#file", tmp_path / "still.json")
    page.wait_for_text("#file-status", "still.json: 1 pose")
    assert refused == ["POST"]


def test_a_file_for_a_server_that_is_gone_is_refused_in_plain_words(
    serve: Serve, open_page: OpenPage, tmp_path: Path
) -> None:
    PoseSequence(person()[np.newaxis], SIZE).save(tmp_path / "still.json")
    page = open_page(serve().url(), is_lost=True)
    page.wait_for_link("Live")
    page.page.route("**/api/poses", lambda route: route.abort())
    page.choose("File")
    page.page.set_input_files("#file", tmp_path / "still.json")
    page.wait_for_text("#file-status.is-error", "The server cannot be reached")
