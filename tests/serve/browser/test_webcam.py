"""The webcam's tracking in a real browser: a still camera, one frame of the demonstration's footage.

Without a GPU the tracker takes half a minute to load and a second or more a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from posecrafter_rt.demo.footage import load_poses, video_path
from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.poses.keypoints import FACE
from posecrafter_rt.serve.app import STATIC
from posecrafter_rt.serve.protocol import PoseMessage, decode_pose
from posecrafter_rt.video_io import read_video
from tests.serve.browser.pages import LivePage
from tests.serve.drawn import Running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CAMERA = (480, 640)
SHOULDERS, FACE_POINTS = [2, 5], range(FACE.start, FACE.stop)
LOADING_S = 300


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A camera's picture, and the person in it as MediaPipe for Python finds it, float32 (134, 3)."""
    try:
        frame = read_video(video_path()).frames[0]
    except BackendUnavailable as error:
        pytest.skip(str(error))
    height, width = CAMERA
    scale = height / frame.shape[0]
    left = (width - round(frame.shape[1] * scale)) // 2
    picture = cv2.resize(frame[..., ::-1], (round(frame.shape[1] * scale), height), interpolation=cv2.INTER_CUBIC)
    picture = cv2.copyMakeBorder(picture, 0, 0, left, width - left - picture.shape[1], cv2.BORDER_REPLICATE)
    camera = tmp_path_factory.mktemp("camera") / "still.mjpeg"
    camera.write_bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    pose = load_poses().resized(height, round(frame.shape[1] * scale)).keypoints[0].copy()
    pose[:, 0] += left
    return camera, pose


@pytest.fixture
def page(
    serve: Callable[..., Running], open_page: Callable[..., LivePage], launch: Callable[..., Browser],
    seen: tuple[Path, np.ndarray],
) -> LivePage:  # fmt: skip
    if not (STATIC / "tracker/holistic.js").is_file():
        pytest.skip("the tracker's files are not built: make web")
    browser = launch("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
                     f"--use-file-for-fake-video-capture={seen[0]}")  # fmt: skip
    page = open_page(serve().url(), browser=browser)
    page.page.set_default_timeout(LOADING_S * 1000)  # the page does not answer while shaders compile
    return page


def track(page: LivePage, *, is_mirrored: bool) -> PoseMessage:
    """Start the camera, wait until the person is found, and stop it; returns the last pose that was sent."""
    page.page.get_by_label("Mirror").set_checked(is_mirrored)
    page.page.get_by_role("button", name="Start camera").click()
    page.wait_for_text("#camera-status", "Following you", LOADING_S)
    num_sent = len(page.poses)
    page.wait_until(lambda: len(page.poses) > num_sent + 1, LOADING_S)
    page.page.get_by_role("button", name="Stop camera").click()
    return decode_pose(page.poses[-1])


def distance(pose: PoseMessage, expected: np.ndarray, points: object) -> float:
    """The mean distance of some keypoints in pixels, each of which must have been found."""
    assert pose.keypoints is not None and pose.canvas == CAMERA
    assert (pose.keypoints[points, 2] > 0.3).all()  # type: ignore[index]
    return float(np.linalg.norm(pose.keypoints[points, :2] - expected[points, :2], axis=-1).mean())  # type: ignore[index]


def test_a_camera_that_is_left_while_the_tracker_loads_is_off(page: LivePage) -> None:
    """Even where its panel is open again when the tracker is there."""
    held: list[Route] = []
    page.page.route("**/tracker/holistic.js", lambda route: held.append(route))
    page.wait_for_link("Live")
    page.choose("Webcam")
    page.page.get_by_role("button", name="Start camera").click()
    page.wait_until(lambda: held, LOADING_S)
    page.choose("Joints")
    page.choose("Webcam")
    held[0].continue_()
    button = page.page.locator("#camera")
    page.wait_until(button.is_enabled, LOADING_S)
    assert button.inner_text() == "Start camera" and page.page.locator("#camera-status").inner_text() == ""
    track(page, is_mirrored=False)


def test_the_person_before_the_camera_is_followed_and_only_keypoints_leave_the_page(
    page: LivePage, seen: tuple[Path, np.ndarray]
) -> None:
    page.wait_for_link("Live")
    page.choose("Webcam")
    expected = seen[1]
    plain = track(page, is_mirrored=False)
    assert distance(plain, expected, FACE_POINTS) < 8 and distance(plain, expected, SHOULDERS) < 30
    mirrored = track(page, is_mirrored=True)
    # A mirror shows another person: its right shoulder is the left one, at the other side.
    there = expected[[5, 2]] * [-1, 1, 1] + [CAMERA[1] - 1, 0, 0]
    flipped = expected.copy()
    flipped[SHOULDERS] = there
    assert distance(mirrored, flipped, SHOULDERS) < 30
    assert {len(message) for message in page.poses} <= {24, 24 + 12 * 134}
    assert page.bodies == []
