"""Reading videos, GIFs and folders of images: ranges, sizes, orientation, and one clear line for every broken input."""

from __future__ import annotations

import json
import re
import shlex
import struct
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition

from posecrafter_rt.errors import VideoError
from posecrafter_rt.framing import resize_to
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.video_io import (
    count_frames,
    read_video,
    stream_video,
    video_size,
    write_png,
    write_video,
)
from tests.video_clips import psnr, smooth


def assert_one_line(caught):
    """And it has a hint."""
    assert "\n" not in str(caught.value) and caught.value.hint


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4", smooth(20), 25.0)
    return tmp_path / "clip.mp4"


def test_a_file_without_frames_is_not_said_to_begin_later(tmp_path):
    """As a recording that was cut at once."""
    with av.open(str(tmp_path / "empty.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 64, 48
        container.start_encoding()
    with pytest.raises(VideoError, match="has no frame") as caught:
        video_size(tmp_path / "empty.avi")
    assert caught.value.hint == "check that the file is whole"


def test_a_range_of_frames(clip):
    everything = read_video(clip).frames
    np.testing.assert_array_equal(read_video(clip, start=5, stop=9).frames, everything[5:9])
    np.testing.assert_array_equal(read_video(clip, start=18, stop=99).frames, everything[18:])
    with pytest.raises(VideoError, match="no frame from frame 20 on"):
        read_video(clip, start=20)
    for start, stop in ((-1, None), (4, 4), (5, 3)):
        with pytest.raises(VideoError, match="no frame lies in"):
            read_video(clip, start=start, stop=stop)


def test_no_frame_is_held_twice(tmp_path):
    write_video(tmp_path / "clip.mp4", smooth(60, (128, 192)), 25)
    tracemalloc.start()
    try:
        num_bytes = read_video(tmp_path / "clip.mp4").frames.nbytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * num_bytes


def test_size_and_number_of_frames_are_told_without_reading_all(clip, tmp_path):
    assert video_size(clip) == (64, 96) and count_frames(clip) == 20
    for number in range(3):
        write_png(tmp_path / "images" / f"{number}.png", smooth(1, (20, 30))[0])
    assert video_size(tmp_path / "images") == (20, 30) and count_frames(tmp_path / "images") == 3
    clip.write_bytes(clip.read_bytes()[:2000])  # what is wrong with it is for those to say who decode it
    assert count_frames(clip) <= 20


def h264(path, size, count=5):
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for frame in smooth(count, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("size", [None, (32, 32)])
def test_a_change_of_size_within_a_video_is_named(tmp_path, size):
    path = tmp_path / "call.h264"
    path.write_bytes(h264(tmp_path / "a", (64, 96)) + h264(tmp_path / "b", (32, 64)))
    with pytest.raises(
        VideoError, match=r"call\.h264 is 64x96, but 32x64 \(height x width\) from frame 5 on"
    ) as caught:
        read_video(path, size=size)
    assert_one_line(caught)
    assert "scale=96:64" in caught.value.hint


def test_the_command_that_mends_a_change_of_size_names_even_sides(tmp_path):
    """H.264 has no other."""
    pictures = [cv2.imencode(".jpg", smooth(1, size)[0])[1].tobytes() for size in ((33, 47), (32, 64))]
    (tmp_path / "call.mjpeg").write_bytes(b"".join(pictures))
    with pytest.raises(VideoError, match=r"call\.mjpeg is 33x47, but 32x64") as caught:
        read_video(tmp_path / "call.mjpeg")
    assert "scale=46:32 " in caught.value.hint


def write_encoded(
    path: Path, codec: str, frames: list[av.VideoFrame], rate: int = 25, matrix: int | None = None
) -> None:
    """Write frames as they are, with a colour matrix stated or not."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("name", "codec", "size", "stated", "matrix"), [
    ("a.mp4", "libx264", (16, 1280), None, "ITU709"), ("a.mp4", "libx264", (592, 16), None, "ITU709"),
    ("a.mp4", "libx264", (576, 1264), None, "ITU601"), ("a.mp4", "libx264", (16, 1280), 6, "ITU601"),
    ("a.mp4", "libx264", (16, 64), 1, "ITU709"), ("a.webm", "libvpx", (16, 1280), None, "ITU601"),
    ("a.webm", "libvpx-vp9", (16, 1280), 3, "ITU709"), ("a.webm", "libvpx-vp9", (16, 64), 3, "ITU601"),
])  # fmt: skip
def test_colours_that_are_not_stated_are_those_of_players(tmp_path, name, codec, size, stated, matrix):
    """HD by BT.709, smaller videos by BT.601; VP8 has no other than that, and 3 is reserved."""
    colour = np.tile(np.uint8([200, 60, 40]), (*size, 1))
    frame = av.VideoFrame.from_ndarray(colour, format="rgb24").reformat(format="yuv420p", dst_colorspace=matrix)
    frame.colorspace = 2  # unstated, as then the file's, unless the encoder is told
    write_encoded(tmp_path / name, codec, [frame], matrix=stated)
    assert np.abs(read_video(tmp_path / name).frames[0].astype(int) - colour).max() <= 6


@pytest.mark.parametrize("matrix", [8, 14])
def test_colours_of_which_nothing_is_known_are_refused_as_such(tmp_path, matrix):
    """YCgCo and ICtCp: read by another matrix, people would be green."""
    frame = av.VideoFrame.from_ndarray(smooth(1, (32, 32))[0], format="rgb24").reformat(format="yuv420p")
    write_encoded(tmp_path / "a.mp4", "libx264", [frame], matrix=matrix)
    with pytest.raises(VideoError, match=rf"a\.mp4 has colours that cannot be read: .* matrix {matrix} ") as caught:
        stream_video(tmp_path / "a.mp4")
    assert_one_line(caught)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_with_the_command_that_converts_it(tmp_path, transfer, name):
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.color_primaries = stream.codec_context.colorspace = 9  # BT.2020
        stream.codec_context.color_trc = transfer
        container.mux(stream.encode(av.VideoFrame.from_ndarray(smooth(1, (32, 32))[0], format="rgb24")))
        container.mux(stream.encode())
    # Already when it is opened, and not minutes later at its first frame.
    with pytest.raises(VideoError, match=rf"phone\.mp4 is an HDR video \({name}\)") as caught:
        stream_video(tmp_path / "phone.mp4")
    assert_one_line(caught)
    assert "ffmpeg -i" in caught.value.hint and "tonemap" in caught.value.hint


def test_frames_are_fitted_as_they_are_read(clip):
    everything = read_video(clip).frames
    np.testing.assert_array_equal(read_video(clip, size=(32, 32)).frames, resize_to(everything, (32, 32)))


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_videos_filmed_turned_are_read_upright(tmp_path, turned):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24] = 255  # a bright quarter, top left
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a turned video")
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.set_display_rotation(turned)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    read = read_video(tmp_path / "phone.mp4").frames[0]
    upright = np.rot90(frame, turned // 90)
    assert read.shape == upright.shape and np.abs(read.astype(int) - upright).mean() < 4


@pytest.mark.parametrize(("a", "b", "c", "d", "shown"), [
    (-1, 0, 0, 1, lambda frame: frame[:, ::-1]), (1, 0, 0, -1, lambda frame: frame[::-1]),
    (0, 1, 1, 0, lambda frame: frame.transpose(1, 0, 2)), (0, -1, -1, 0, lambda frame: frame.transpose(1, 0, 2)[::-1, ::-1]),
    (0, 1, -1, 0, lambda frame: np.rot90(frame, -1)), (-1, 0, 0, -1, lambda frame: np.rot90(frame, 2)),
])  # fmt: skip
def test_videos_that_are_to_be_shown_mirrored_are(tmp_path, a, b, c, d, shown):
    """Pixels (x, y) are shown at (a x + c y, b x + d y): as some front cameras, and screen recorders, write them."""
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24], frame[16:, 24:, 0] = 255, 255  # no two corners are alike but for the dark ones
    frame[:16, 24:, 1] = 255
    write_video(tmp_path / "front.mp4", [frame], 25.0)
    matrix = struct.Struct(">9i")
    as_it_is, content = matrix.pack(1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), (tmp_path / "front.mp4").read_bytes()
    place = content.index(as_it_is, content.index(b"tkhd"))
    turned = matrix.pack(a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "front.mp4").write_bytes(content[:place] + turned + content[place + matrix.size :])
    read, expected = read_video(tmp_path / "front.mp4").frames[0], shown(frame)
    assert read.shape == expected.shape and np.abs(read.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("name", ["cam.avi", "cam.mov", "cam.mkv"])
def test_a_video_of_photographs_that_say_how_they_were_held_is_upright(tmp_path, name):
    """As cameras write Motion JPEG, every picture with its EXIF."""
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24] = 255  # a bright quarter, top left
    orientation = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0)  # 6: to be shown a quarter turn clockwise
    exif = b"Exif\0\0" + struct.pack(">2sHIH", b"MM", 42, 8, 1) + orientation + bytes(4)
    jpeg = cv2.imencode(".jpg", frame)[1].tobytes()
    jpeg = jpeg[:2] + struct.pack(">HH", 0xFFE1, len(exif) + 2) + exif + jpeg[2:]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        container.start_encoding()
        for number in range(3):
            packet = av.Packet(jpeg)
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    read = read_video(tmp_path / name).frames
    assert read.shape == (3, 48, 32, 3) and np.abs(read[2].astype(int) - np.rot90(frame, -1)).mean() < 4


@pytest.mark.parametrize(("pixel", "is_read"), [(Fraction(128, 117), True), (Fraction(10, 11), True), (Fraction(2), False),
                                                (Fraction(3, 4), False), (Fraction(59, 48), False)])  # fmt: skip
def test_pixels_that_would_squeeze_people_are_refused_with_the_command_that_mends_them(tmp_path, pixel, is_read):
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = pixel
        frame = av.VideoFrame.from_ndarray(smooth(1, (32, 48))[0], format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    if is_read:
        assert read_video(tmp_path / "wide.mp4").frames.shape == (1, 32, 48, 3)
        return
    with pytest.raises(VideoError, match=rf"wide\.mp4 has pixels {float(pixel):.3g} times as wide as high") as caught:
        stream_video(tmp_path / "wide.mp4")
    assert_one_line(caught)
    command = caught.value.hint.removeprefix("make them square: ")
    assert not set("*()") & set(re.sub("'.*?'", "", command))  # a shell's own
    program, *_, option, chain, output = shlex.split(command)
    assert (program, option, output) == ("ffmpeg", "-vf", "out.mp4")
    mended = filtered(frame, f"setsar={pixel},{chain}")
    assert (mended.height, mended.width) == (32, int(48 * pixel) // 2 * 2)  # H.264 has no odd ones


def filtered(frame: av.VideoFrame, chain: str) -> av.VideoFrame:
    """A frame after FFmpeg's filters `NAME=OPTIONS,…`."""
    graph = av.filter.Graph()
    made = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))]
    made += [graph.add(*text.split("=", 1)) for text in chain.split(",")]
    graph.link_nodes(*made, graph.add("buffersink")).configure()
    graph.push(frame)
    result = graph.pull()
    assert isinstance(result, av.VideoFrame)
    return result


def test_a_video_whose_title_is_not_utf_8_is_read(tmp_path):
    path = tmp_path / "old.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "CAFE-TITLE"
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    content = path.read_bytes()
    assert b"CAFE-TITLE" in content
    path.write_bytes(content.replace(b"CAFE-TITLE", "CAFÉ-TITLE".encode("latin-1")))
    assert len(read_video(path)) == 1


def write_timed(path: Path, codec: str, times: list[int], hidden: int = 0) -> None:
    """Write frames that are shown at these milliseconds, and of VP8 so many more that are not shown."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(smooth(len(times), (32, 48))):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if number < hidden:
                unseen = av.Packet(bytes([0x01, 0, 0]))  # a frame header without the bit that says to show it
                unseen.stream, unseen.time_base, unseen.pts = stream, Fraction(1, 1000), times[number] + 1
                unseen.dts = unseen.pts
                container.mux(unseen)
        container.mux(stream.encode())


def state_no_rate(path: Path) -> None:
    """Blank what WebM says of its rate, as in what browsers record: 23E383 becomes a void element of the same length."""
    content = path.read_bytes()
    place = content.index(b"\x23\xe3\x83")
    num_bytes = content[place + 3] & 0x7F
    blank = bytes([0xEC, 0x80 | num_bytes + 2]) + bytes(num_bytes + 2)
    path.write_bytes(content[:place] + blank + content[place + len(blank) :])


@pytest.mark.parametrize(("name", "codec", "is_stated"), [("a.webm", "libvpx", False), ("a.webm", "libvpx-vp9", False),
                                                          ("a.webm", "libvpx", True), ("a.mkv", "libx264", True),
                                                          ("a.flv", "libx264", True)])  # fmt: skip
def test_frames_that_come_unevenly_have_their_mean_rate(tmp_path, name, codec, is_stated):
    times = np.cumsum([0, *[20, 60] * 10]).tolist()
    write_timed(tmp_path / name, codec, times)
    if not is_stated:
        state_no_rate(tmp_path / name)
    assert stream_video(tmp_path / name)[1] == pytest.approx(1000 / 40)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])  # it breaks off, which is for decoding to say
    assert 10 < stream_video(tmp_path / name)[1] < 60


@pytest.mark.parametrize("hidden", [0, 5])
def test_frames_that_come_evenly_have_the_stated_rate(tmp_path, hidden):
    """To the last digit, although Matroska rounds times to milliseconds; frames of VP8 that are not shown do not count."""
    write_timed(tmp_path / "a.webm", "libvpx", [round(1000 * number / 30) for number in range(11)], hidden)
    assert stream_video(tmp_path / "a.webm")[1] == 30
    write_video(tmp_path / "a.mkv", smooth(8, (32, 48)), 24000 / 1001)
    assert stream_video(tmp_path / "a.mkv")[1] == 24000 / 1001


def test_a_video_of_one_frame_that_states_no_rate_has_25(tmp_path):
    write_timed(tmp_path / "a.webm", "libvpx", [0])
    state_no_rate(tmp_path / "a.webm")
    assert stream_video(tmp_path / "a.webm")[1] == 25


def test_a_gif(tmp_path):
    with av.open(str(tmp_path / "a.gif"), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "rgb8"
        for frame in smooth(5, (24, 32)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="rgb8")))
        container.mux(stream.encode())
    video = read_video(tmp_path / "a.gif")
    assert video.frames.shape == (5, 24, 32, 3) and video.fps == pytest.approx(10)
    assert psnr(video.frames, smooth(5, (24, 32))) > 15  # 256 colours


def test_how_long_the_last_picture_of_a_gif_is_held_does_not_count(tmp_path):
    frames = [
        av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="rgb8") for frame in smooth(5, (24, 32))
    ]
    write_encoded(tmp_path / "a.gif", "gif", frames, rate=10)
    content = (tmp_path / "a.gif").read_bytes()
    place = content.rindex(b"\x21\xf9\x04") + 4  # the delay of the last picture, in hundredths of a second
    (tmp_path / "a.gif").write_bytes(content[:place] + struct.pack("<H", 200) + content[place + 2 :])
    assert stream_video(tmp_path / "a.gif")[1] == pytest.approx(10)


def test_an_animated_png_is_read_whole_under_either_name(tmp_path):
    frames = smooth(4, (24, 32))
    write_encoded(
        tmp_path / "a.apng", "apng", [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames], 10
    )
    (tmp_path / "a.png").write_bytes((tmp_path / "a.apng").read_bytes())
    for name in ("a.apng", "a.png"):
        video = read_video(tmp_path / name)
        np.testing.assert_array_equal(video.frames, frames)
        assert video.fps == pytest.approx(10) and count_frames(tmp_path / name) == 4


def test_an_animated_webp_is_refused_rather_than_read_as_one_picture(tmp_path):
    frames = [
        av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p") for frame in smooth(3, (24, 32))
    ]
    write_encoded(tmp_path / "a.webp", "libwebp_anim", frames)
    with pytest.raises(VideoError, match=r"a\.webp is an animated WebP") as caught:
        read_video(tmp_path / "a.webp")
    assert_one_line(caught)
    (tmp_path / "b.webp").write_bytes(cv2.imencode(".webp", smooth(1, (24, 32))[0])[1].tobytes())
    assert len(read_video(tmp_path / "b.webp")) == 1


def test_recordings_that_were_joined_keep_their_rate(tmp_path):
    """Each part of such an MPEG-TS has times of its own, so the mean over all would be another."""
    write_timed(tmp_path / "a.ts", "libx264", [40 * number for number in range(25)])
    (tmp_path / "a.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    assert stream_video(tmp_path / "a.ts")[1] == 25


def test_a_folder_of_images_in_natural_order(tmp_path):
    frames = smooth(12, (20, 30))
    for number, frame in enumerate(frames):
        write_png(tmp_path / f"frame{number}.png", frame)
    (tmp_path / "notes.txt").write_text("no image")
    video = read_video(tmp_path)
    assert video.fps == 25
    np.testing.assert_array_equal(video.frames, frames)
    np.testing.assert_array_equal(read_video(tmp_path, start=2, stop=4).frames, frames[2:4])
    np.testing.assert_array_equal(read_video(tmp_path / "frame3.png").frames, frames[3:4])


def test_images_and_poses_of_the_same_names_have_the_same_order(tmp_path):
    names = ("frame", "frame1", "frame8", "frame9", "frame010", "frame11", "frame0012", "frame0012_a", "frame0012b")
    for number in (3, 5, 0, 7, 2, 8, 1, 4, 6):
        write_png(tmp_path / f"{names[number]}.png", np.full((20, 30, 3), 10 * number, np.uint8))
        person = {"pose_keypoints_2d": [3 + number, 3 + number, 1] * 18}
        pose = {"canvas_height": 20, "canvas_width": 30, "people": [person]}
        (tmp_path / f"{names[number]}.json").write_text(json.dumps(pose))
    assert read_video(tmp_path).frames[:, 0, 0, 0].tolist() == [10 * number for number in range(9)]
    assert PoseSequence.load(tmp_path).keypoints[:, 0, 0].tolist() == [3 + number for number in range(9)]


def test_images_of_different_sizes_are_named_with_their_sizes(tmp_path):
    write_png(tmp_path / "a.png", smooth(1, (20, 30))[0])
    write_png(tmp_path / "b.png", smooth(1, (20, 30))[0])
    write_png(tmp_path / "c.png", smooth(1, (24, 30))[0])
    with pytest.raises(VideoError, match=r"c\.png is 24x30, but .*a\.png is 20x30"):
        read_video(tmp_path, size=(10, 10))


@pytest.mark.parametrize("suffix", [".HEIC", ".avif"])
def test_an_image_of_a_folder_that_cannot_be_read_is_named(tmp_path, suffix):
    """A phone writes one kind or the other; the clip would have a gap."""
    write_png(tmp_path / "IMG_10.png", smooth(1, (20, 30))[0])
    for number in (2, 11):
        (tmp_path / f"IMG_{number}{suffix}").write_bytes(b"")
    with pytest.raises(VideoError, match=rf"IMG_2\{suffix} is an image of a format that cannot be read") as caught:
        read_video(tmp_path)
    assert_one_line(caught)
    for number in (2, 11):
        write_png(tmp_path / f"IMG_{number}.png", smooth(1, (20, 30))[0])
    assert len(read_video(tmp_path)) == 3


def test_missing_files_and_empty_folders(tmp_path):
    with pytest.raises(VideoError, match=r"no file or folder .*none\.mp4") as caught:
        read_video(tmp_path / "none.mp4")
    assert_one_line(caught)
    with pytest.raises(VideoError, match="holds no image") as caught:
        read_video(tmp_path)
    assert_one_line(caught)


@pytest.mark.parametrize("content", [b"", b"hello, this is no video" * 50])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a"])
def test_files_that_are_no_video(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=f"{name} cannot be read as") as caught:
        read_video(tmp_path / name)
    assert_one_line(caught)


def test_a_file_without_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        read_video(tmp_path / "sound.wav")


def test_a_song_with_a_cover_is_no_video(tmp_path):
    jpeg = av.Packet(cv2.imencode(".jpg", smooth(1, (32, 32))[0])[1].tobytes())
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44100, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.start_encoding()
        jpeg.stream, jpeg.time_base, jpeg.pts, jpeg.dts = cover, Fraction(1), 0, 0
        container.mux(jpeg)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux([*sound.encode(silence), *sound.encode()])
    with pytest.raises(VideoError, match=r"song\.m4a has no video stream"):
        read_video(tmp_path / "song.m4a")


def test_of_several_video_streams_the_one_that_players_show_is_read(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (height, width) in zip(streams, ((32, 32), (64, 96)), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        streams[0].disposition, streams[1].disposition = Disposition(0), Disposition.default
        container.start_encoding()
        for stream in streams:
            frames = smooth(3, (stream.height, stream.width))
            packets = [stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")) for frame in frames]
            container.mux([packet for some in [*packets, stream.encode()] for packet in some])
    assert read_video(tmp_path / "two.mkv").frames.shape == (3, 64, 96, 3)
    assert count_frames(tmp_path / "two.mkv") == 3


def test_a_format_without_a_decoder_is_said_to_be_one(clip):
    content = clip.read_bytes()
    place = content.index(b"avc1", content.index(b"stsd"))
    clip.write_bytes(content[:place] + b"braw" + content[place + 4 :])
    with pytest.raises(VideoError, match=r"clip\.mp4 is in a format that cannot be decoded") as caught:
        read_video(clip)
    assert_one_line(caught)
    assert count_frames(clip) == 0


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_video_that_breaks_off_names_the_frame_reached(tmp_path, share):
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, 25)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match=r"a\.mp4 is damaged or breaks off at frame \d+") as caught:
        read_video(tmp_path / "a.mp4")
    assert_one_line(caught)
    frame = int(str(caught.value).split("at frame ")[1].split(":")[0])
    assert 0 < frame < 20
    assert caught.value.hint.endswith(f", or keep what is whole: ffmpeg -i FILE -frames:v {frame} out.mp4")
    assert len(read_video(tmp_path / "a.mp4", stop=frame)) == frame


def test_of_a_video_that_is_damaged_from_the_start_nothing_is_offered(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, 25)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    first = data.index(b"mdat") + 600  # behind what describes the stream
    data[first : first + 3400] = bytes(3400)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match="breaks off at frame 0") as caught:
        read_video(tmp_path / "a.mp4")
    assert caught.value.hint == "copy the file again"


def test_the_size_is_told_of_a_video_whose_second_frame_cannot_be_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, 25)
    with av.open(str(tmp_path / "a.mp4")) as container:
        fourth = list(container.demux(video=0))[3]  # the decoder, which reorders frames, holds the second until then
        half = fourth.pos + fourth.size // 2
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:half])
    with pytest.raises(VideoError, match=r"a\.mp4 is damaged or breaks off at frame 1:"):
        read_video(tmp_path / "a.mp4")
    assert video_size(tmp_path / "a.mp4") == (64, 96)
