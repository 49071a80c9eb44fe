"""Decode videos: frames come upright and in the right colours, or an error says why not.

Layer 1: PyAV. Other modules use `video_io.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition

from posecrafter_rt.errors import VideoError
from posecrafter_rt.framing import size_text

_MEASURED = ("matroska,webm", "flv", "gif", "apng")  # formats whose stated rate is not the mean
DEFAULT_FPS = 25.0  # of images, and of videos that state no rate
# FFmpeg's numbers (H.273's) of the matrices by which it converts colours to RGB, and of those that state none.
_UNSTATED = (2, 3)
_MATRICES = (0, 1, *_UNSTATED, 4, 5, 6, 7, 9)
# FFmpeg's numbers of the HDR transfer functions, whose values mean other brightnesses than an ordinary picture's.
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_TO_SDR = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
# Of texts in a file that are not UTF-8. PyAV 19 replaces them by itself, and has no such option.
_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
# Pixels whose sides differ by less than this factor pass for square: old formats declare a tenth, but only on paper.
SQUARE = 1.15
# In quotes, because zsh takes `*` for a pattern of files; an even width, because H.264 has no other.
_TO_SQUARE = "'scale=trunc(iw*sar/2)*2:ih,setsar=1'"


def ffmpeg_name(path: str | os.PathLike[str]) -> str:
    """Return a file's absolute path for FFmpeg, which would take the `10:` of `10:30.mp4` for a protocol."""
    return str(Path(path).absolute())  # not abspath, which would resolve `link/..` to the folder that holds the link


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video: PyAV's container, and the stream that players show.

    Raises: VideoError if there is no such stream, or no decoder for it; FFmpegError if the file cannot be opened.
    """
    with av.open(ffmpeg_name(path), **_OPTIONS) as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & Disposition.attached_pic:  # the cover of a song
            raise VideoError(f"{path} has no video stream", hint="name a file with moving pictures")
        if stream.codec_context is None:
            raise VideoError(
                f"{path} is in a format that cannot be decoded",
                hint="export it as H.264 where it was made; `ffmpeg -i FILE out.mp4` converts most formats",
            )
        yield container, stream


def decode(path: Path, start: int, stop: int | None) -> Iterator[np.ndarray]:
    """Yield the frames `start` to `stop` (None: to the end), uint8 (H, W, 3) RGB, upright.

    Raises: VideoError if a frame is damaged or has another size than the first, naming the frame.
    """
    count = 0
    shape: tuple[int, ...] | None = None
    try:
        with open_video(path) as (container, stream):
            stream.thread_type = "SLICE"  # frame threads would hide the error of a file that breaks off
            for count, frame in enumerate(container.decode(stream), start=1):
                if frame.is_corrupt:
                    raise _damaged(path, count - 1, "its data are not whole")
                if count > start:
                    picture = np.ascontiguousarray(_upright(frame))
                    shape = shape or picture.shape
                    if picture.shape != shape:
                        raise _changed_size(path, count - 1, shape, picture.shape)
                    yield picture
                if count == stop:  # before the next frame is decoded, which may be damaged
                    return
    except FFmpegError as failure:
        if isinstance(failure, MemoryError):  # the file may be intact
            raise
        raise _damaged(path, count, reason(failure)) from failure


def frame_rate(path: Path) -> float:
    """Return the frames per second, and check that the file is a video, that its colours can be read, and that its
    pixels are square.

    Raises: VideoError if it is not.
    """
    try:
        with open_video(path) as (container, stream):
            _check_colours(path, stream.codec_context)
            pixel = float(stream.sample_aspect_ratio or 1)
            if not 1 / SQUARE < pixel < SQUARE:
                raise VideoError(f"{path} has pixels {pixel:.3g} times as wide as high, and people in it would be squeezed",
                                 hint=f"make them square: ffmpeg -i FILE -vf {_TO_SQUARE} out.mp4")  # fmt: skip
            return _mean_rate(container, stream)
    except FFmpegError as failure:
        if isinstance(failure, MemoryError):
            raise
        raise VideoError(
            f"{path} cannot be read as a video: {reason(failure)}",
            hint="check that the file is a whole video; `ffmpeg -i FILE out.mp4` converts most formats",
        ) from failure


def _check_colours(path: Path, context: Any) -> None:
    if (transfer := _HDR_TRANSFERS.get(context.color_trc)) is not None:
        raise VideoError(
            f"{path} is an HDR video ({transfer}), whose colours would come out wrong",
            hint=f"film with HDR off, or convert it: ffmpeg -i FILE -vf {_TO_SDR} out.mp4",
        )
    if context.colorspace not in _MATRICES:
        raise VideoError(
            f"{path} has colours that cannot be read: they are coded by matrix {context.colorspace} of H.273",
            hint="convert them: ffmpeg -i FILE -vf zscale=m=bt709,format=yuv420p out.mp4",
        )


def _mean_rate(container: Any, stream: Any) -> float:
    """Return the frames per second of an open video: the stated rate, or the mean where its frames come otherwise.

    WebM from a browser states no rate, Matroska and FLV with uneven frames state the one that was meant, and that of an
    animated picture counts how long its last frame is held. All are read through for the times of their frames; nothing
    is decoded. MPEG-TS that states a rate is believed: its packets may hold single fields, and its times may start anew.
    """
    stated, times = stream.average_rate, list[int]()
    if not stated or container.format.name in _MEASURED:  # None before PyAV 19, then 0
        with suppress(FFmpegError):  # decoding reports it
            times.extend(packet.pts for packet in container.demux(stream) if packet.pts is not None and _shows(packet))
    gaps = len(times) - 1
    seconds = (max(times) - min(times)) * stream.time_base if times else 0
    # The first and the last time are each rounded to the nearest unit.
    if not seconds or (stated and abs(gaps / stated - seconds) <= stream.time_base):
        return float(stated or DEFAULT_FPS)
    return float(gaps / seconds)


def _shows(packet: Any) -> bool:
    """Return whether a packet holds a frame that is shown: VP8 also has some that only others are predicted from."""
    return packet.size > 0 and (packet.stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 0x10))


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame as RGB, rotated by multiples of 90 degrees and mirrored as the file's display matrix says."""
    picture = _rgb(frame)
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 knows no EXIF and hides the matrix beside it, of which only the rotation is left
        return np.rot90(picture, round(frame.rotation / 90))
    if matrix is None:
        return picture
    # A pixel is shown at x' = a x + c y, y' = b x + d y.
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    if abs(b) > abs(a):  # nearly a quarter turn: rows become columns
        picture, across, down = picture.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame as RGB. One that states no matrix is read as players do: HD by BT.709, and else by BT.601."""
    by_size = "ITU709" if frame.width >= 1280 or frame.height > 576 else "ITU601"
    matrix = by_size if frame.colorspace in _UNSTATED else None
    picture: np.ndarray = frame.to_ndarray(format="rgb24", src_colorspace=matrix)
    return picture


def _damaged(path: Path, frame: int, reason: str) -> VideoError:
    return VideoError(
        f"{path} is damaged or breaks off at frame {frame}: {reason}",
        hint="copy the file again"
        + (f", or keep what is whole: ffmpeg -i FILE -frames:v {frame} out.mp4" if frame else ""),
    )


def _changed_size(path: Path, frame: int, before: tuple[int, ...], after: tuple[int, ...]) -> VideoError:
    height, width = before[:2]
    return VideoError(
        f"{path} is {size_text(before)}, but {size_text(after)} (height x width) from frame {frame} on",
        # Even sides, because H.264 has no other.
        hint=f"bring it to one size: ffmpeg -i FILE -vf scale={width // 2 * 2}:{height // 2 * 2} out.mp4",
    )


def reason(failure: FFmpegError) -> str:
    return (failure.strerror or str(failure)).lower()
