"""The page on a server of a real avatar, tuned and built on the tiny base."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve.options import ServeOptions
from tests.serve.browser.pages import OpenPage
from tests.serve.drawn import Running, running

pytestmark = pytest.mark.browser
STREAM = {"steps": 2, "window": 2}


@pytest.fixture(scope="module")
def avatar(tiny_engine: Path) -> Iterator[Avatar]:
    with Avatar.load(tiny_engine) as avatar:
        frame_s = seconds_a_frame(avatar)
        if frame_s > 0.15:
            pytest.skip(f"a frame takes {frame_s:.1f} s on this machine now, and a page shows none older than 1 s")
        yield avatar


@pytest.fixture(scope="module")
def server(avatar: Avatar) -> Iterator[Running]:
    with running(avatar, ServeOptions(stream=STREAM)) as server:
        yield server


def seconds_a_frame(avatar: Avatar) -> float:
    with avatar.stream(**STREAM) as stream:
        stream.step(avatar.poses.keypoints[0])  # makes ready what the others only use
        started_s = time.perf_counter()
        for _ in range(3):
            stream.step(None)
        return (time.perf_counter() - started_s) / 3


def test_the_demo_a_file_and_dragged_joints_move_the_avatar(
    avatar: Avatar, server: Running, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(server.url())
    page.wait_for_link("Live")
    page.wait_until(lambda: page.pixels().shape == (*avatar.size, 3) and page.count_looks() > 2)

    # Of two poses a stream that keeps their pace shows two frames for ever; of eight it shows more at any pace.
    shifts = np.zeros((8, 1, 3), np.float32)
    shifts[:, 0, 0] = np.linspace(-4, 4, 8)
    PoseSequence(avatar.poses.keypoints[0] + shifts, avatar.size, 10.0).save(tmp_path / "sway.json")
    page.choose("File")
    page.page.set_input_files("#file", tmp_path / "sway.json")
    page.wait_for_text("#file-status", "sway.json: 8 poses")
    page.wait_until(lambda: page.count_looks() > 2)

    page.choose("Joints")
    page.wait_until(lambda: page.count_looks() == 1)
    before = page.pixels()
    page.page.locator("#pose").focus()
    for _ in range(4):
        page.page.keyboard.press("Shift+ArrowRight")
    page.wait_for_change(before)
