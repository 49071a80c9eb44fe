"""The HTTP side: what is served, pose files, what is refused, and the numbers."""

from __future__ import annotations

import base64
import errno
import json
import os
import resource
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import cv2
import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from posecrafter_rt import video_io
from posecrafter_rt.errors import PoseCrafterError, PoseError, VideoError
from posecrafter_rt.poses import extract as extract_module
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve import app as app_module
from posecrafter_rt.serve import faults, pose_worker, poses_api
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.protocol import MAX_CANVAS_PX, MAX_COORDINATE, PoseMessage, decode_pose, encode_pose
from posecrafter_rt.serve.service import Service
from posecrafter_rt.video_io import write_video
from tests.serve.drawn import SIZE, DrawnAvatar, Running, make_pose, pose_bytes, wait_until

Serve = Callable[..., Running]


def decoded(track: dict) -> np.ndarray:
    assert set(track) == {"fps", "canvas", "num_frames", "keypoints"}
    return np.frombuffer(base64.b64decode(track["keypoints"]), "<f4").reshape(track["num_frames"], 134, 3)


def post(
    server: Running, content: bytes | Iterator[bytes], kind: str = "application/json", **options: object
) -> httpx.Response:
    return httpx.post(server.url("/api/poses"), content=content, headers={"content-type": kind}, timeout=300, **options)


def test_a_service_starts_once(avatar: DrawnAvatar) -> None:
    service = Service(avatar, ServeOptions())
    for _ in range(2):
        service.start()
    assert service.is_running and len(avatar.steps) == 2  # of one warm-up
    service.stop()
    with pytest.raises(PoseCrafterError, match="has ended"):
        service.start()


def test_health_and_info(serve: Serve) -> None:
    server = serve()
    assert httpx.get(server.url("/health")).json() == {"status": "ok", "sessions": 0, "max_sessions": 4}
    info = httpx.get(server.url("/api/info")).json()
    assert info["size"] == list(SIZE) and info["name"] == "drawn.engine" and info["steps"] == 1
    assert info["preset"] == "balanced"
    assert httpx.get(serve(stream={"preset": "fast"}).url("/api/info")).json()["preset"] == "fast"
    assert set(info) == {"name", "size", "preset", "backend", "precision", "device", "steps", "window", "in_flight", "max_sessions",
                         "sessions", "prompt", "has_pose_extraction"}  # fmt: skip
    assert httpx.get(server.url("/docs")).status_code == httpx.get(server.url("/openapi.json")).status_code == 404


def test_a_server_that_fails_at_every_step_is_not_healthy_until_it_renders_again(serve: Serve) -> None:
    server = serve()
    value_of = server.app.state.service.metrics.registry.get_sample_value

    def has_status(status: int) -> bool:
        return httpx.get(server.url("/health")).status_code == status

    with connect(server.url("/ws", "ws")) as client:
        client.send('{"type": "configure", "fit": "canvas"}')
        for number in range(faults.MANY):
            assert has_status(200)
            client.send(pose_bytes(number, shift=-1000))
            wait_until(partial(lambda count: value_of("posecrafter_step_errors_total") == count, number + 1))
        wait_until(lambda: has_status(503))
        client.send(pose_bytes(100))
        wait_until(lambda: has_status(200))


def test_a_dead_engine_thread_is_not_healthy(serve: Serve) -> None:
    server = serve()
    server.app.state.service.stop()
    answer = httpx.get(server.url("/health"))
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")


def test_metrics_are_counted(serve: Serve) -> None:
    server = serve()
    with connect(server.url("/ws", "ws")) as client:
        for number in range(10):
            client.send(pose_bytes(number))
            while isinstance(client.recv(timeout=30), str):
                pass
        lines = httpx.get(server.url("/metrics")).text.splitlines()
    assert "posecrafter_sessions 1.0" in lines and "posecrafter_poses_received_total 10.0" in lines
    values = {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#"}
    assert values["posecrafter_frame_age_seconds_count"] == values["posecrafter_render_seconds_count"] == 10
    assert 0 < values["posecrafter_frame_age_seconds_sum"] < 10
    wait_until(lambda: "posecrafter_sessions 0.0" in httpx.get(server.url("/metrics")).text)


def test_the_avatars_own_poses_and_picture(serve: Serve, avatar: DrawnAvatar) -> None:
    server = serve()
    track = httpx.get(server.url("/api/poses")).json()
    assert np.array_equal(decoded(track), avatar.poses.keypoints) and track["canvas"] == list(SIZE)
    picture = httpx.get(server.url("/api/reference.jpg"))
    assert picture.headers["content-type"] == "image/jpeg"
    assert cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR).shape == (*SIZE, 3)


def test_a_pose_file_is_read(serve: Serve, tmp_path: Path) -> None:
    poses = PoseSequence(np.stack([make_pose(shift) for shift in range(3)]), SIZE, 12.5)
    poses.save(tmp_path / "poses.json")
    answer = post(serve(), (tmp_path / "poses.json").read_bytes(), "application/json; charset=utf-8")
    track = answer.json()
    assert answer.status_code == 200 and track["fps"] == 12.5
    assert np.allclose(decoded(track), poses.keypoints, atol=0.01)


def test_a_frame_without_anybody_is_kept(serve: Serve, tmp_path: Path) -> None:
    PoseSequence(np.stack([make_pose(), make_pose()]), SIZE).save(tmp_path / "poses.json")
    document = json.loads((tmp_path / "poses.json").read_text())
    document["frames"][1] = {"people": []}
    track = post(serve(), json.dumps(document).encode()).json()
    assert decoded(track)[0].any() and not decoded(track)[1].any() and track["fps"] == 25


@pytest.mark.parametrize(("content", "kind", "status", "why"), [
    (b"{", "application/json", 400, "the file: not valid JSON"), (b"[]", "application/json", 400, "0 frames"),
    (b'{"people": [{"pose_keypoints_2d": [1, 2]}], "canvas_width": 9, "canvas_height": 9}', "application/json", 400, "2 values"),
    (b"no video", "video/mp4", 400, "the file cannot be read as a video"), (b"x", "text/plain", 400, "'text/plain'"),
    (b"", "", 400, "send OpenPose JSON"),
])  # fmt: skip
def test_what_is_no_pose_file_is_refused_in_words(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str, status: int, why: str
) -> None:
    monkeypatch.setattr(poses_api, "has_pose_extraction", lambda: True)
    answer = post(serve(), content, kind)
    said = answer.json()
    assert answer.status_code == status and why in said["message"] + said["hint"] and "/tmp" not in answer.text


def test_a_video_without_a_detector_names_what_to_install(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poses_api, "has_pose_extraction", lambda: False)
    answer = post(serve(), b"x", "video/mp4")
    assert answer.status_code == 501 and "pip install" in answer.json()["hint"]


def test_a_detector_that_cannot_start_is_not_the_files_fault(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The detector's process finds neither package here, whatever is installed."""
    write_video(tmp_path / "grey.mp4", np.full((3, 64, 64, 3), 90, np.uint8), 10)
    for package in ("rtmlib", "mediapipe"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not today')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(poses_api, "has_pose_extraction", lambda: True)
    answer = post(serve(), (tmp_path / "grey.mp4").read_bytes(), "video/mp4")
    assert (
        answer.status_code == 501 and "not today" in answer.json()["message"] and "pip install" in answer.json()["hint"]
    )


@pytest.mark.parametrize(("limit", "value", "why"), [
    ("MAX_FRAMES", 2, "more than 2 frames"), ("MAX_FRAME_PX", 64 * 64, "128x64 pixels are too large"),
    ("MAX_ASPECT", 1, "128x64 pixels are too narrow")])  # fmt: skip
def test_a_video_that_would_fill_the_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, value: int, why: str
) -> None:
    monkeypatch.setattr(pose_worker, limit, value)
    write_video(tmp_path / "grey.mp4", np.full((3, 64, 128, 3), 90, np.uint8), 10)
    with pytest.raises(VideoError, match=why):
        pose_worker.read_track(tmp_path / "grey.mp4")


def test_a_video_may_be_long_and_large_for_its_frames_are_read_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two gigabytes of frames in all; and what detects people in them has all the memory that there is."""
    frame = np.zeros((1080, 1920, 3), np.uint8)
    limits = []

    def extract(path: Path) -> PoseSequence:
        limits.append(resource.getrlimit(resource.RLIMIT_AS))
        return PoseSequence(make_pose()[np.newaxis], SIZE)

    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(video_io, "stream_video", lambda path: ((frame for _ in range(350)), 25.0))
    monkeypatch.setattr(extract_module, "extract_poses", extract)
    assert len(pose_worker.read_track(tmp_path / "long.mp4")) == 1 and limits == [before]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux, which tells how much memory it has given"
)
def test_a_video_that_asks_for_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    greedy = (np.empty(size, np.uint8) for size in [3 * 2**30])
    monkeypatch.setattr(video_io, "stream_video", lambda path: (greedy, 25.0))
    with pytest.raises(PoseError, match="memory"):
        pose_worker.read_track(tmp_path / "greedy.mp4")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("moment", [1, 2])
def test_a_video_that_libav_has_no_memory_for_is_not_called_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: int
) -> None:
    """When its rate is read, and when its frames are."""
    write_video(tmp_path / "grey.mp4", np.full((3, 64, 64, 3), 90, np.uint8), 10)
    open_file, opened = av.open, []

    def starved(*arguments: object, **named: object) -> object:
        opened.append(arguments)
        if len(opened) == moment:
            raise av.error.MemoryError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return open_file(*arguments, **named)

    monkeypatch.setattr(av, "open", starved)
    with pytest.raises(PoseError, match="too much memory"):
        pose_worker.read_track(tmp_path / "grey.mp4")
    assert len(opened) == moment


def test_too_much_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poses_api, "MAX_POSE_FILE_BYTES", 1000)
    server = serve()
    assert post(server, b" " * 3000).status_code == 413
    assert post(server, iter([b" " * 600] * 5)).status_code == 413  # of a size that was not told before
    assert httpx.post(server.url("/api/offer"), content=b" " * 100_000).status_code == 413


@pytest.mark.parametrize(("place", "message"), [("/dev/full", "no space"), ("/dev/null/there", "cannot take")])
def test_a_file_that_cannot_be_saved_is_the_servers_fault(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    class Folder(tempfile.TemporaryDirectory[str]):
        def __enter__(self) -> str:
            (Path(self.name) / "poses.json").symlink_to(place)
            return super().__enter__()

    server = serve()
    monkeypatch.setattr(poses_api.tempfile, "TemporaryDirectory", Folder)
    answer = post(server, b" " * 100_000)
    assert answer.status_code == 507 and message in answer.json()["message"] and answer.json()["hint"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_file_that_asks_for_too_much_memory_is_refused(serve: Serve) -> None:
    """Eight megabytes that say nothing, of people whose keypoints would take gigabytes."""
    many = b'{"canvas_width":64,"canvas_height":64,"people":[' + b",".join([b"{}"] * 2_500_000) + b"]}"
    answer = post(serve(), many)
    assert answer.status_code == 400 and "memory" in answer.json()["message"], answer.text


def test_too_many_frames_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pose_worker, "MAX_FRAMES", 3)
    for count in (3, 4):
        PoseSequence(np.stack([make_pose()] * count), SIZE).save(tmp_path / f"{count}.json")
    assert len(pose_worker.read_track(tmp_path / "3.json")) == 3
    with pytest.raises(PoseError, match="4 frames"):
        pose_worker.read_track(tmp_path / "4.json")


def test_a_canvas_that_no_pose_message_may_have_is_refused(tmp_path: Path) -> None:
    """Else the file is read, and its first pose ends the connection."""
    for side in (MAX_CANVAS_PX, MAX_CANVAS_PX + 1):
        PoseSequence(make_pose()[np.newaxis], (64, side)).save(tmp_path / f"{side}.json")
    track = pose_worker.read_track(tmp_path / f"{MAX_CANVAS_PX}.json")
    decode_pose(encode_pose(PoseMessage(1, 0.0, track.canvas, track.keypoints[0])))
    with pytest.raises(PoseError, match="16385x64 pixels is too large"):
        pose_worker.read_track(tmp_path / f"{MAX_CANVAS_PX + 1}.json")


def test_a_keypoint_that_no_pose_message_may_have_is_refused(tmp_path: Path) -> None:
    """Else the file is read, and the connection ends where that pose is played."""
    poses = np.stack([make_pose(), make_pose()])
    for x in (-MAX_COORDINATE, 2 * MAX_COORDINATE):
        poses[1, 0, 0] = x
        PoseSequence(poses, SIZE).save(tmp_path / f"{x:g}.json")
    track = pose_worker.read_track(tmp_path / f"{-MAX_COORDINATE:g}.json")
    decode_pose(encode_pose(PoseMessage(1, 0.0, track.canvas, track.keypoints[1])))
    with pytest.raises(PoseError, match="frame 1: the nose is too far from the picture"):
        pose_worker.read_track(tmp_path / f"{2 * MAX_COORDINATE:g}.json")


def test_reading_goes_on_beside_rendering(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that takes a while does not hold up frames; a second file is told to wait."""
    server, begun, may_end = serve(), tmp_path / "begun", tmp_path / "may end"
    slow = tmp_path / "python"
    slow.write_text(
        f'#!/bin/sh\n: >"{begun}"\nuntil [ -e "{may_end}" ]; do sleep 0.05; done\nexec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))  # what reads the file
    PoseSequence(np.stack([make_pose()] * 400), SIZE).save(tmp_path / "poses.json")
    answers: list[httpx.Response] = []
    reading = threading.Thread(target=lambda: answers.append(post(server, (tmp_path / "poses.json").read_bytes())))
    reading.start()
    try:
        wait_until(begun.exists)
        with connect(server.url("/ws", "ws")) as client:
            for number in range(5):
                client.send(pose_bytes(number, shift=number))
                while isinstance(client.recv(timeout=30), str):
                    pass
        assert post(server, b"{").status_code == 429 and not answers
    finally:
        may_end.touch()
        reading.join()
    assert answers[0].status_code == 200


def test_what_reads_a_file_takes_no_modules_from_the_servers_working_directory(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('anybody may put this into /tmp')")
    PoseSequence(make_pose()[np.newaxis], SIZE).save(tmp_path / "poses.json")
    monkeypatch.chdir(tmp_path)
    answer = post(serve(), (tmp_path / "poses.json").read_bytes())
    assert answer.status_code == 200, answer.text


def test_the_log_tells_why_reading_a_file_failed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\nseq 10000 >&2\necho 'KeyError: 7' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    answer = post(serve(), b"{}")
    assert answer.status_code == 400 and "with status 1" in answer.json()["message"] and "log" in answer.json()["hint"]
    assert "9999\n10000\nKeyError: 7" in caplog.text and len(caplog.text) < 5000


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"type": "answer", "sdp": ""}', b'{"type": "offer", "sdp": 3}',
                                  b'{"type": "offer", "sdp": "nonsense"}', b'{"type": "offer", "sdp": "v=0"}'])  # fmt: skip
def test_what_is_no_offer_is_refused(serve: Serve, body: bytes) -> None:
    server = serve()
    answer = httpx.post(server.url("/api/offer"), content=body)
    assert answer.status_code == 400 and answer.json()["message"]
    assert server.app.state.service.num_sessions == 0


def test_without_aiortc_there_is_the_websocket(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiortc", None)
    monkeypatch.delitem(sys.modules, "posecrafter_rt.serve.webrtc", raising=False)
    answer = httpx.post(serve().url("/api/offer"), json={"type": "offer", "sdp": ""})
    assert answer.status_code == 501 and "aiortc" in answer.json()["message"] and "/ws" in answer.json()["hint"]


def test_refusals_of_the_guard_reach_http(serve: Serve) -> None:
    server = serve(token="a secret of some length")
    assert httpx.get(server.url("/health")).status_code == 200
    assert httpx.get(server.url("/api/info")).headers["www-authenticate"] == "Bearer"
    assert httpx.get(server.url("/api/info?token=a+secret+of+some+length")).status_code == 200
    assert httpx.get(serve().url("/health"), headers={"host": "evil.example"}).status_code == 421
    refused = httpx.post(
        server.url("/api/poses?token=a+secret+of+some+length"), headers={"origin": "http://evil.example"})  # fmt: skip
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("name", ["x", "..%2F..%2Fetc%2Fpasswd", "."])
def test_recordings_that_are_not_there(serve: Serve, name: str) -> None:
    assert httpx.get(serve().url(f"/api/recordings/{name}.mp4")).status_code == 404


def test_the_page_and_its_files(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(app_module, "STATIC", tmp_path)
    answer = httpx.get(serve().url())
    assert answer.status_code == 503 and "make web" in answer.text
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html>the page")
    (tmp_path / "assets" / "main.js").write_text("1")
    (tmp_path / "secret.txt").write_text("no")
    server = serve()
    page = httpx.get(server.url())
    assert page.text == "<!doctype html>the page" and page.headers["cache-control"] == "no-cache"
    script = httpx.get(server.url("/assets/main.js"))
    assert "javascript" in script.headers["content-type"]
    again = httpx.get(server.url("/assets/main.js"), headers={"if-none-match": script.headers["etag"]})
    assert again.status_code == 304
    for path in ("/secret.txt", "/assets/../secret.txt", "/assets/%2e%2e/secret.txt"):
        assert httpx.get(server.url(path)).status_code == 404
