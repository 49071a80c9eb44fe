"""A video file in a real browser: the demonstration's footage, and files that cannot be played.

Without a GPU the tracker takes minutes to load and seconds a picture, so what needs it is slow.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from posecrafter_rt.demo.footage import load_poses, video_path
from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.poses.keypoints import FACE, PoseSequence
from posecrafter_rt.serve import service
from posecrafter_rt.serve.app import STATIC
from posecrafter_rt.serve.poses_api import pose_track
from posecrafter_rt.serve.protocol import PoseMessage, decode_pose
from posecrafter_rt.video_io import read_video
from tests.serve.browser.pages import LivePage, OpenPage, Serve
from tests.serve.browser.test_camera import HELD_UP, TRACKER
from tests.serve.browser.walker import PHONE, STILL, assert_shows
from tests.serve.drawn import SIZE

pytestmark = pytest.mark.browser
LOADING_S = 400

# As on an iPhone, which loads no picture before it is told to. `video` is the one that plays.
PHONE_VIDEO = """
{ const { load, play, addEventListener } = HTMLVideoElement.prototype;
  Object.assign(HTMLVideoElement.prototype, {
    load() { this.isTold = true; load.call(this); },
    play() { window.video = this; return play.call(this); },
    addEventListener(name, ...given) { if (name !== "loadeddata" || this.isTold) addEventListener.call(this, name, ...given); },
  }); }
"""
# The page is no longer seen, or seen again.
SEEN = """(isSeen) => {
  Object.defineProperty(document, "hidden", { value: !isSeen, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.fixture(scope="module")
def footage() -> Path:
    try:
        return video_path()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def endless(footage: Path, tmp_path: Path) -> Path:
    """The footage as a browser records: WebM that does not tell how long it is."""
    path = tmp_path / "re corded.webm"
    video = read_video(footage)
    with av.open(str(path), "w", options={"live": "1"}) as file:
        stream = file.add_stream("libvpx", rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.time_base = 144, 176, "yuv420p", Fraction(1, 30)
        for number, frame in enumerate(video.frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


def open_file(page: LivePage, path: Path) -> None:
    page.wait_for_link("Live")
    page.choose("File")
    page.page.set_input_files("#file", path)


def assert_helps(page: LivePage, why: str, command: str) -> None:
    page.wait_for_text("#file-status.is-error", why)
    page.wait_for_text("#file-help:not([hidden]) #file-command", command)
    assert page.page.is_hidden("#player")


def test_what_the_browser_cannot_play_is_told_with_what_to_do(
    serve: Serve, open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "has_pose_extraction", lambda: False)
    broken = tmp_path / "my clip.mp4"
    broken.write_bytes(b"no video")
    page = open_page(serve().url(), **PHONE)
    open_file(page, broken)
    assert_helps(page, "This browser cannot play my clip.mp4",
                 "posecrafter-rt poses extract './my clip.mp4' -o './my clip.json'")  # fmt: skip
    assert page.page.is_hidden("#file-send") and page.bodies == []
    assert page.page.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
    PoseSequence(load_poses().keypoints[:2], (144, 176)).save(tmp_path / "good.json")
    page.page.set_input_files("#file", tmp_path / "good.json")
    page.wait_for_text("#file-status:not(.is-error)", "good.json: 2 poses")
    assert page.page.is_hidden("#file-help") and page.page.is_visible("#player")


def test_a_server_that_finds_poses_is_sent_the_video_only_when_people_say_so(
    serve: Serve, open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "has_pose_extraction", lambda: True)
    broken = tmp_path / "old.avi"
    broken.write_bytes(b"no video")
    page = open_page(serve().url(), **STILL)
    track = json.dumps(pose_track(PoseSequence(load_poses().keypoints[:3], (144, 176), 10.0)))
    page.page.route("**/api/poses", lambda route: (
        route.fulfill(body=track, content_type="application/json") if route.request.method == "POST" else route.continue_()))  # fmt: skip
    open_file(page, broken)
    assert_helps(page, "This browser cannot play old.avi", "posecrafter-rt poses extract old.avi -o old.json")
    assert page.bodies == []
    page.page.get_by_role("button", name="Let the server find them").click()
    page.wait_for_text("#file-status", "old.avi: 3 poses")
    assert page.page.is_hidden("#file-help") and page.bodies == [b"no video"]


def test_without_a_tracker_what_to_do_is_told(serve: Serve, open_page: OpenPage, footage: Path) -> None:
    page = open_page(serve().url(), is_lost=True, **STILL)
    page.page.route("**/tracker/**", lambda route: route.fulfill(status=404))
    open_file(page, footage)
    assert_helps(page, "This installation has no tracker of people",
                 "posecrafter-rt poses extract carphone_pristine.mp4 -o carphone_pristine.json")  # fmt: skip
    assert page.bodies == []


def follow(page: LivePage, footage: Path) -> None:
    """Open the footage on a page whose tracker finds one pose at once."""
    page.page.route("**/tracker/holistic.js", lambda route: route.fulfill(body=TRACKER, content_type="text/javascript"))
    open_file(page, footage)
    page.wait_for_text("#file-status", "carphone_pristine.mp4: following the person")


def test_a_video_plays_on_a_phone_and_only_while_the_page_is_seen(
    serve: Serve, open_page: OpenPage, footage: Path
) -> None:
    page = open_page(serve().url(), **STILL)
    page.page.add_init_script(PHONE_VIDEO)
    page.page.reload()
    follow(page, footage)
    assert page.page.locator("#repeat option[value=swing]").is_disabled()  # no video plays back and forth
    page.page.evaluate(SEEN, False)
    page.page.wait_for_timeout(1000)
    place = page.page.evaluate("video.currentTime")
    page.page.wait_for_timeout(300)
    assert page.page.evaluate("[video.paused, video.currentTime]") == [True, place]
    assert page.page.get_by_role("button", name="Pause").is_visible()
    page.page.evaluate(SEEN, True)
    page.wait_until(lambda: page.page.evaluate("video.currentTime") != place)


def test_an_error_about_a_video_that_was_left_does_not_end_what_is_shown_now(
    serve: Serve, open_page: OpenPage, footage: Path
) -> None:
    page = open_page(serve().url(), **STILL)
    follow(page, footage)
    page.page.evaluate(HELD_UP)
    page.wait_until(lambda: page.page.evaluate("'fail' in window"))
    page.choose("Demo")
    page.page.evaluate("fail()")
    page.settle()
    assert page.page.is_visible("#player")
    page.choose("File")
    num_sent = len(page.poses)
    page.wait_until(lambda: len(page.poses) > num_sent + 1)


def test_other_files_are_neither(serve: Serve, open_page: OpenPage, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    page = open_page(serve().url(), **STILL)
    open_file(page, tmp_path / "notes.txt")
    page.wait_for_text("#file-status.is-error", "notes.txt is neither OpenPose JSON nor a video")
    assert page.page.is_hidden("#file-help")


def next_pose(page: LivePage) -> PoseMessage:
    """The next pose that the page sends."""
    num_before = len(page.poses)
    page.wait_until(lambda: len(page.poses) > num_before, LOADING_S)
    return decode_pose(page.poses[-1])


def nearest(pose: PoseMessage) -> tuple[int, float]:
    """The frame of the footage whose face lies nearest to a pose's, and the mean distance in pixels."""
    assert pose.keypoints is not None
    stretch = pose.canvas[1] / 176  # its pixels are not square, which browsers know
    expected = load_poses().keypoints[:, FACE, :2] * (stretch, 1)
    distances = np.linalg.norm(pose.keypoints[FACE, :2] - expected, axis=-1).mean(axis=1)
    return int(distances.argmin()), float(distances.min())


def assert_avatar_follows(page: LivePage) -> None:
    """The avatar is the drawing of the last pose that was sent."""
    pose = decode_pose(page.poses[-1])
    assert pose.keypoints is not None
    assert_shows(page, transform_keypoints(PoseSequence(pose.keypoints[np.newaxis], pose.canvas), SIZE).keypoints[0])


@pytest.mark.slow
def test_the_person_in_a_video_is_followed_and_only_keypoints_leave_the_page(
    serve: Serve, open_page: OpenPage, footage: Path, endless: Path
) -> None:
    if not (STATIC / "tracker/holistic.js").is_file():
        pytest.skip("the tracker's files are not built: make web")
    page = open_page(serve().url(), **STILL)
    page.page.set_default_timeout(LOADING_S * 1000)  # the page does not answer while shaders compile
    open_file(page, footage)
    page.wait_for_text("#file-status", "loading the tracker")
    page.page.get_by_label("Fit the person").uncheck()
    page.wait_for_text("#file-status", "carphone_pristine.mp4: following the person", LOADING_S)
    found = [nearest(next_pose(page)) for _ in range(4)]
    frames, distances = zip(*found, strict=True)
    assert max(distances) < 2.5 and list(frames) == sorted(frames) and frames[-1] > frames[0], found

    page.page.get_by_role("button", name="Pause").click()
    page.page.wait_for_timeout(3000)  # for the picture that the tracker may be at
    assert_avatar_follows(page)
    page.page.get_by_label("Position").fill("75")
    frame, distance = nearest(next_pose(page))
    assert abs(frame - 90) <= 3 and distance < 2.5, (frame, distance)
    assert_avatar_follows(page)
    num_sent = len(page.poses)
    page.page.wait_for_timeout(3000)
    assert len(page.poses) == num_sent  # it rests

    page.page.set_input_files("#file", endless)
    page.wait_for_text("#file-status", "re corded.webm: following the person", LOADING_S)
    page.wait_for_text("#time", "/ 4.0 s")
    page.page.get_by_label("Repeat").select_option("Once")
    position = page.page.get_by_label("Position")
    position.fill("90")
    page.page.get_by_role("button", name="Play", exact=True).wait_for()
    page.wait_until(lambda: position.input_value() == position.get_attribute("max"))
    assert nearest(decode_pose(page.poses[-1]))[1] < 2.5
    assert {len(message) for message in page.poses} <= {24, 24 + 12 * 134} and page.bodies == []
