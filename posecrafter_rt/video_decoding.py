"""Decode videos: frames come upright and in the right colours, or an error says why not.

Layer 1: PyAV. Other modules use `video_io.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from posecrafter_rt.errors import VideoError
from posecrafter_rt.framing import size_text

DEFAULT_FPS = 25.0  # of images, and of videos that state no rate
# FFmpeg's numbers of the HDR transfer functions, whose values mean other brightnesses than an ordinary picture's.
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_TO_SDR = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
# Pixels whose sides differ by less than this factor pass for square: old formats declare a tenth, but only on paper.
SQUARE = 1.15
# In quotes, because zsh takes `*` for a pattern of files; an even width, because H.264 has no other.
_TO_SQUARE = "'scale=trunc(iw*sar/2)*2:ih,setsar=1'"


def ffmpeg_name(path: str | os.PathLike[str]) -> str:
    """Return a file's absolute path for FFmpeg, which would take the `10:` of `10:30.mp4` for a protocol."""
    return str(Path(path).absolute())  # not abspath, which would resolve `link/..` to the folder that holds the link


def decode(path: Path, start: int, stop: int | None) -> Iterator[np.ndarray]:
    """Yield the frames `start` to `stop` (None: to the end), uint8 (H, W, 3) RGB, upright.

    Raises: VideoError if a frame is damaged or has another size than the first, naming the frame.
    """
    count = 0
    shape: tuple[int, ...] | None = None
    try:
        with av.open(ffmpeg_name(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
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
    """Return the frames per second, and check that the file is a video, not HDR, and has square pixels.

    Raises: VideoError if it is not.
    """
    try:
        with av.open(ffmpeg_name(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no video stream", hint="name a file with moving pictures")
            stream = container.streams.video[0]
            if (transfer := _HDR_TRANSFERS.get(stream.codec_context.color_trc)) is not None:
                raise VideoError(
                    f"{path} is an HDR video ({transfer}), whose colours would come out wrong",
                    hint=f"film with HDR off, or convert it: ffmpeg -i FILE -vf {_TO_SDR} out.mp4",
                )
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


def _mean_rate(container: Any, stream: Any) -> float:
    """Return the frames per second of an open video: the stated rate, or the mean where its frames come otherwise.

    WebM from a browser states no rate, and Matroska with uneven frames states the one that was meant. Both are read
    through for the times of their frames; nothing is decoded.
    """
    stated, times = stream.average_rate, list[int]()
    if stated is None or "matroska" in container.format.name:
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
    picture: np.ndarray = frame.to_ndarray(format="rgb24")
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # A pixel is shown at x' = a x + c y, y' = b x + d y.
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    if abs(b) > abs(a):  # nearly a quarter turn: rows become columns
        picture, across, down = picture.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def _damaged(path: Path, frame: int, reason: str) -> VideoError:
    return VideoError(
        f"{path} is damaged or breaks off at frame {frame}: {reason}",
        hint="copy the file again" + (f", or read only the frames before {frame}" if frame else ""),
    )


def _changed_size(path: Path, frame: int, before: tuple[int, ...], after: tuple[int, ...]) -> VideoError:
    height, width = before[:2]
    return VideoError(
        f"{path} is {size_text(before)}, but {size_text(after)} (height x width) from frame {frame} on",
        hint=f"bring it to one size: ffmpeg -i FILE -vf scale={width}:{height} out.mp4",
    )


def reason(failure: FFmpegError) -> str:
    return (failure.strerror or str(failure)).lower()
