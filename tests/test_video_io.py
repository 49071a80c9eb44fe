"""Writing videos and images: round trips, colours, odd sizes, nothing half-written, and one clear line for every failure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.error import FFmpegError

from posecrafter_rt.errors import DiskFull, OutputExists, ShapeError, VideoError
from posecrafter_rt.video_io import (
    VIDEO_SUFFIXES,
    Video,
    VideoWriter,
    count_frames,
    read_video,
    write_png,
    write_video,
)
from tests.video_clips import psnr, smooth


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4", smooth(20), 25.0)
    return tmp_path / "clip.mp4"


def test_a_name_that_looks_like_an_address_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("10:30.mp4", "pipe:1.mp4"):
        write_video(name, smooth(3), 25.0)
        assert len(read_video(name)) == count_frames(name) == 3
    assert sorted(os.listdir(tmp_path)) == ["10:30.mp4", "pipe:1.mp4"]


def test_a_name_goes_through_links_as_the_system_reads_it(tmp_path, monkeypatch):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "data" / "sub")
    monkeypatch.chdir(tmp_path / "here")
    write_video("link/../a.mp4", smooth(3), 25.0)
    assert len(read_video("link/../a.mp4")) == count_frames("link/../a.mp4") == 3
    assert os.listdir(tmp_path / "here") == ["link"] and sorted(os.listdir(tmp_path / "data")) == ["a.mp4", "sub"]


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
@pytest.mark.parametrize("fps", [25.0, 30000 / 1001, 12.5, 0.001])
def test_round_trip(tmp_path, suffix, fps):
    frames = smooth(12)
    write_video(tmp_path / f"clip{suffix}", frames, fps)
    video = read_video(tmp_path / f"clip{suffix}")
    assert isinstance(video, Video) and len(video) == 12 and video.frames.dtype == np.uint8
    assert video.frames.shape == frames.shape and video.fps == pytest.approx(fps, rel=1e-3)
    assert all(psnr(a, b) > 30 for a, b in zip(video.frames, frames, strict=True))
    assert os.listdir(tmp_path) == [f"clip{suffix}"]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (120, 90, 200)])
def test_colours_come_back(tmp_path, colour):
    frames = np.tile(np.uint8(colour), (3, 32, 32, 1))
    write_video(tmp_path / "a.mp4", frames, 25)
    assert np.abs(read_video(tmp_path / "a.mp4").frames.astype(int) - frames).max() <= 4


def test_colours_are_declared(clip):
    with av.open(str(clip)) as container:
        context = container.streams.video[0].codec_context
        assert context.pix_fmt == "yuv420p"
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize("size", [(33, 48), (32, 47), (31, 45), (1, 1)])
def test_odd_sizes_gain_a_copy_of_the_last_row_or_column(tmp_path, size):
    frames = smooth(4, size)
    write_video(tmp_path / "odd.mp4", frames, 25)
    read = read_video(tmp_path / "odd.mp4").frames
    assert read.shape[1:3] == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert psnr(read[:, : size[0], : size[1]], frames) > 28


def test_frames_one_by_one_or_several_at_once(tmp_path):
    frames = smooth(6)
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(frames[0])
        writer.write(frames[1:4])
        for frame in frames[4:]:
            writer.write(frame)
    write_video(tmp_path / "b.mp4", iter(frames), 25)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_the_same_frames_give_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}{suffix}", smooth(3), 25)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_frames_need_not_be_contiguous(tmp_path):
    frames = smooth(3, (64, 64))[:, ::2, ::-2, ::-1]
    write_video(tmp_path / "a.mp4", frames, 25)
    assert psnr(read_video(tmp_path / "a.mp4").frames, frames) > 28


def test_an_existing_file_is_kept_unless_forced(clip):
    before = clip.read_bytes()
    with pytest.raises(OutputExists):
        write_video(clip, smooth(2), 25)
    with pytest.raises(OutputExists):
        VideoWriter(clip, 25)
    assert clip.read_bytes() == before
    write_video(clip, smooth(2), 25, force=True)
    assert len(read_video(clip)) == 2


@pytest.mark.parametrize("error", [RuntimeError("mid-way"), KeyboardInterrupt()])
@pytest.mark.parametrize("written", [0, 3])
def test_a_failure_while_writing_leaves_nothing(tmp_path, error, written):
    with pytest.raises(type(error)), VideoWriter(tmp_path / "a.mp4", 25) as writer:
        if written:
            writer.write(smooth(written))
        raise error
    assert not os.listdir(tmp_path)


def test_a_failure_while_writing_keeps_the_file_that_was_there(clip):
    before = clip.read_bytes()
    with pytest.raises(RuntimeError), VideoWriter(clip, 25, force=True) as writer:
        writer.write(smooth(3))
        raise RuntimeError
    assert clip.read_bytes() == before and os.listdir(clip.parent) == [clip.name]


def test_nothing_stands_under_the_name_until_the_end(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 25) as writer:
        writer.write(smooth(30))
        assert not (tmp_path / "a.mp4").exists()
    assert (tmp_path / "a.mp4").exists()


def test_a_video_of_no_frame_is_refused(tmp_path):
    with pytest.raises(VideoError, match="no frame was written"):
        write_video(tmp_path / "a.mp4", [], 25)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, DiskFull), (errno.EIO, VideoError)])
@pytest.mark.parametrize("step", ["_encode", "_finish"])
def test_what_the_encoder_says_is_passed_on(tmp_path, monkeypatch, code, expected, step):
    def fail(self, *frame):
        raise FFmpegError(code, os.strerror(code))

    monkeypatch.setattr(VideoWriter, step, fail)
    with pytest.raises(expected) as caught:
        write_video(tmp_path / "a.mp4", smooth(2), 25)
    assert "a.mp4" in str(caught.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (av.error.MemoryError, "free some memory and run the same command again"),
        (av.error.ExternalError, "if memory is short, free some and run the same command again"),
        (av.error.BlockingIOError, "if memory is short, free some and run the same command again"),
        (av.error.InvalidDataError, None),
    ],
)
def test_an_encoder_without_memory_has_a_hint(tmp_path, monkeypatch, kind, hint):
    def fail(self, *frame):
        raise kind(errno.ENOMEM, "x264 says no more")

    monkeypatch.setattr(VideoWriter, "_encode", fail)
    with pytest.raises(VideoError, match=r"encoding .*a\.mp4 failed") as caught:
        write_video(tmp_path / "a.mp4", smooth(2), 25)
    assert caught.value.hint == hint


def test_refuses_frames_that_do_not_fit(tmp_path):
    for wrong in (smooth(2).astype(np.float32), smooth(2)[..., :1], smooth(2)[0, 0]):
        with pytest.raises(ShapeError), VideoWriter(tmp_path / "a.mp4", 25) as writer:
            writer.write(wrong)
    with (
        pytest.raises(ShapeError, match="32x32 follows frames of 64x96"),
        VideoWriter(tmp_path / "a.mp4", 25) as writer,
    ):
        writer.write(smooth(1))
        writer.write(smooth(1, (32, 32)))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 5000, 0.0004, 1e-300])
def test_refuses_an_impossible_rate(tmp_path, fps):
    with pytest.raises(VideoError, match="fps"):
        VideoWriter(tmp_path / "a.mp4", fps)


@pytest.mark.parametrize("name", ["a", "a.txt", "a.webm"])
def test_refuses_names_of_other_formats(tmp_path, name):
    with pytest.raises(VideoError, match="not the name of a video") as caught:
        VideoWriter(tmp_path / name, 25)
    assert ".mp4" in caught.value.hint


def test_png(tmp_path):
    image = smooth(1, (17, 23))[0]
    write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png"))[..., ::-1], image)
    with pytest.raises(OutputExists):
        write_png(tmp_path / "a.png", image)
    write_png(tmp_path / "a.png", image[::-1], force=True)
    np.testing.assert_array_equal(read_video(tmp_path / "a.png").frames[0], image[::-1])
    with pytest.raises(ShapeError):
        write_png(tmp_path / "b.png", image[..., 0])
    assert os.listdir(tmp_path) == ["a.png"]
