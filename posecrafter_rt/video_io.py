"""Read and write videos, folders of images and PNG.

Layer 1: PyAV and OpenCV; files are written through `atomic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from av.error import ExternalError, FFmpegError

from posecrafter_rt.atomic import atomic_path, natural_key, refuse_overwrite
from posecrafter_rt.errors import ShapeError, VideoError
from posecrafter_rt.framing import check_frame, resize_to, size_text
from posecrafter_rt.video_decoding import DEFAULT_FPS, decode, ffmpeg_name, frame_rate, open_video, reason

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_HEAD_BYTES = 1 << 16  # of a PNG, in which an animation is announced
_UNREAD_SUFFIXES = (".heic", ".heif", ".avif")  # what phones write beside JPEG, which OpenCV cannot read everywhere
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv")
H264_CRF = "17"  # x264's constant quality; at about this value and below no loss is visible


@dataclass(frozen=True, eq=False)
class Video:
    """A clip in memory.

    Args: frames: uint8 (N, H, W, 3), RGB. fps: frames per second.
    """

    frames: np.ndarray
    fps: float

    def __len__(self) -> int:
        return len(self.frames)


def read_video(
    path: str | PathLike[str], *, size: tuple[int, int] | None = None, start: int = 0, stop: int | None = None
) -> Video:
    """Read a video, a GIF, an animated PNG, an image, or a folder of images in the natural order of their names.

    Args:
        path: file or folder.
        size: (height, width) that frames are fitted to as they are read (`resize_to`); None keeps their size.
        start, stop: the frames to keep, as in a slice; `stop` None reads to the end.
    Returns: the clip, rotated upright if the file says how; images have 25 frames per second.
    Raises: VideoError if the path is missing, cannot be read, breaks off (naming the frame reached), holds no frame in
        that range, has frames or images of different sizes, is HDR (PQ or HLG), or has pixels that are not square.
        Of MKV, WebM, MPEG-TS and FLV nothing tells that they break off: what is there is read.
    """
    source, fps = stream_video(path, size=size, start=start, stop=stop)
    frames = _gather(source, len(range(count_frames(path))[start:stop]))
    if not len(frames):
        where = f" from frame {start} on" if start else ""
        hint = "start earlier" if start else "check that the file is whole"
        raise VideoError(f"{path} has no frame{where}", hint=hint)
    return Video(frames, fps)


def _gather(source: Iterable[np.ndarray], expected: int) -> np.ndarray:
    """Gather frames into one array; stacking a list of them would hold every frame twice.

    expected: how many may come. Memory for more of them than do come is never touched, and so not taken.
    """
    frames, count = np.empty(0, np.uint8), 0
    for frame in source:
        if count == len(frames):
            larger = np.empty((max(expected, count + count // 8 + 8), *frame.shape), np.uint8)
            larger[:count], frames = frames.reshape(count, *frame.shape), larger
        frames[count] = frame
        count += 1
    return frames[:count]


def video_size(path: str | PathLike[str]) -> tuple[int, int]:
    """Return (height, width) of the frames of `read_video`. Raises: as `read_video`."""
    height, width = read_video(path, stop=1).frames.shape[1:3]
    return height, width


def count_frames(path: str | PathLike[str]) -> int:
    """Estimate how many frames `stream_video` yields, to show progress; nothing is decoded."""
    path = Path(path)
    if _holds_images(path):
        return len(_image_paths(path))
    count = 0
    # Errors are suppressed here; decoding reports them.
    with suppress(FFmpegError, VideoError), open_video(path) as (container, stream):
        if stream.frames:  # most files state it, and need not be read through
            return stream.frames
        for packet in container.demux(stream):
            count += packet.size > 0
    return count


def stream_video(
    path: str | PathLike[str], *, size: tuple[int, int] | None = None, start: int = 0, stop: int | None = None
) -> tuple[Iterator[np.ndarray], float]:
    """Read as `read_video` does, but hold only one frame in memory at a time.

    Returns: the frames, uint8 (H, W, 3) RGB, decoded as they are taken (there may be none); frames per second.
    Raises: as `read_video`, but an error in a frame is raised when that frame is taken.
    """
    path = Path(path)
    if start < 0 or (stop is not None and stop <= start):
        raise VideoError(f"no frame lies in {start}:{stop}", hint="give 0 <= start < stop")
    if not path.exists():
        raise VideoError(f"there is no file or folder {path}", hint="check the path")
    if _holds_images(path):
        source, fps = _read_images(_image_paths(path)[start:stop]), DEFAULT_FPS
    else:
        source, fps = decode(path, start, stop), frame_rate(path)
    return (frame if size is None else resize_to(frame, size) for frame in source), fps


class VideoWriter:
    """Write an H.264 video frame by frame; it appears under its name when the block ends without an error.

    yuv420p, BT.709, constant quality, playable while it loads. yuv420p needs even sides: an odd side gets one more row
    or column, a copy of the last.
    Args:
        path: ends in .mp4, .mov, .m4v or .mkv.
        fps: frames per second.
        force: replace an existing file.
    Raises: VideoError for another suffix or an impossible fps; OutputExists if the file is there and `force` is false.
    """

    def __init__(self, path: str | PathLike[str], fps: float, *, force: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise VideoError(
                f"{self.path} is not the name of a video", hint=f"end it in one of {', '.join(VIDEO_SUFFIXES)}"
            )
        self._rate = Fraction(fps).limit_denominator(1001) if np.isfinite(fps) else Fraction(0)
        if not 0 < self._rate <= 1000:
            raise VideoError(f"fps is {fps}", hint="give 0.001 or more, 1000 at the most")
        refuse_overwrite(self.path, force)
        self._size: tuple[int, int] | None = None
        self._file = atomic_path(self.path)
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        self._temporary = self._file.__enter__()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append one frame or several.

        Args: frames: uint8 RGB (H, W, 3) or (N, H, W, 3), all of one size.
        Raises: ShapeError for another shape or type, or another size than the first; VideoError if encoding fails.
        """
        for frame in frames if frames.ndim == 4 else [frames]:
            check_frame(frame)
            if self._size is None:
                self._size = frame.shape[:2]
                self._guarded(self._open)
            if frame.shape[:2] != self._size:
                raise ShapeError(f"a frame of {size_text(frame.shape)} follows frames of {size_text(self._size)}",
                                 hint="give frames of one size: framing.resize_to fits them")  # fmt: skip
            self._guarded(partial(self._encode, frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._container is None:
                    raise VideoError(f"no frame was written to {self.path}", hint="write at least one")
                self._guarded(self._finish)
        except BaseException as failure:
            self._abandon()
            self._file.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._abandon()
        self._file.__exit__(kind, error, traceback)

    def _open(self) -> None:
        assert self._size is not None
        # Without bitexact, Matroska files hold random identifiers, so the same frames would give different bytes.
        options = {"fflags": "+bitexact"} if self.path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
        self._container = av.open(ffmpeg_name(self._temporary), "w", options=options)
        self._stream = self._container.add_stream("libx264", rate=self._rate)
        self._stream.height, self._stream.width = (side + side % 2 for side in self._size)
        self._stream.pix_fmt = "yuv420p"
        # The same frames must give the same bytes. Macroblock-tree rate control is off because with it x264's output
        # differs from run to run on small pictures (seen at 64x64 and 128x160). One thread, because the bytes depend on
        # the number of threads, which x264 would take from the processors that this process may use.
        self._stream.options = {"crf": H264_CRF, "x264-params": "mbtree=0:threads=1"}
        # Players guess the colours of a video that does not state them, each in its own way. 1 means BT.709, and for
        # color_range the limited range.
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1

    def _encode(self, frame: np.ndarray) -> None:
        padded = np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        self._container.mux(self._stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))

    def _finish(self) -> None:
        self._container.mux(self._stream.encode())
        container, self._container = self._container, None
        container.close()

    def _abandon(self) -> None:
        """Close what is still open. The file will be removed, so errors of closing do not matter."""
        if self._container is not None:
            with suppress(FFmpegError):
                self._container.close()
            self._container = None

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except FFmpegError as failure:
            hint = None
            if isinstance(failure, MemoryError):
                hint = "free some memory and run the same command again"
            # An error of x264, or of starting a thread: lack of memory is the likely reason.
            elif isinstance(failure, (ExternalError, BlockingIOError)):
                hint = "if memory is short, free some and run the same command again"
            raise VideoError(f"encoding {self.path} failed: {reason(failure)}", hint) from failure


def write_video(path: str | PathLike[str], frames: Iterable[np.ndarray], fps: float, *, force: bool = False) -> None:
    """Write frames as an H.264 video, whole or not at all.

    Args: path, fps, force: as for `VideoWriter`. frames: uint8 (N, H, W, 3), or an iterable of (H, W, 3); RGB.
    Raises: as `VideoWriter`; DiskFull if the space runs out.
    """
    with VideoWriter(path, fps, force=force) as writer:
        for frame in frames:
            writer.write(frame)


def write_png(path: str | PathLike[str], image: np.ndarray, *, force: bool = False) -> None:
    """Write a picture, uint8 RGB (H, W, 3), as PNG, whole or not at all.

    Raises: ShapeError for another shape or type; OutputExists if the file is there and `force` is false; DiskFull.
    """
    data = encode_png(image)
    refuse_overwrite(path, force)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


def encode_png(image: np.ndarray) -> np.ndarray:
    """Encode a picture, uint8 RGB (H, W, 3), as a PNG file, uint8 (n,). Raises: ShapeError as `write_png`."""
    check_frame(image)
    _, data = cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR))
    return data.reshape(-1)


def decode_png(data: np.ndarray) -> np.ndarray:
    """Decode the bytes of `encode_png` into the picture. Raises: VideoError for bytes that are not a picture."""
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise VideoError(f"{len(data)} bytes are not a PNG picture", hint="give what encode_png returned")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _holds_images(path: Path) -> bool:
    return path.is_dir() or (path.suffix.lower() in IMAGE_SUFFIXES and not _is_animated_png(path))


def _is_animated_png(path: Path) -> bool:
    """Return whether a PNG announces an animation, which it does before its first picture."""
    if path.suffix.lower() != ".png" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"acTL" in file.read(_HEAD_BYTES).partition(b"IDAT")[0]


def _image_paths(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    entries = sorted((entry for entry in path.iterdir() if entry.name[0] != "."), key=natural_key)
    images = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
    readable = {entry.stem for entry in images}
    for entry in entries:
        if entry.suffix.lower() in _UNREAD_SUFFIXES and entry.stem not in readable:  # the clip would have a gap
            raise VideoError(f"{entry} is an image of a format that cannot be read",
                             hint="convert such images to JPEG: magick NAME.heic NAME.jpg")  # fmt: skip
    if not images:
        raise VideoError(f"the folder {path} holds no image", hint=f"images end in {', '.join(IMAGE_SUFFIXES)}")
    return images


def _read_images(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    size: tuple[int, int] | None = None
    for path in paths:
        data = path.read_bytes() or b"\0"
        if data[8:16] == b"WEBPVP8X" and data.count(b"ANMF") > 1:  # of these OpenCV would give the first
            raise VideoError(f"{path} is an animated WebP, which cannot be read",
                             hint="write its frames into a folder: magick FILE -coalesce FOLDER/%04d.png")  # fmt: skip
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise VideoError(f"{path} cannot be read as an image", hint="check that the file is whole")
        size = size or image.shape[:2]
        if image.shape[:2] != size:
            raise VideoError(
                f"{path} is {size_text(image.shape)}, but {paths[0]} is {size_text(size)} (height x width)",
                hint="all images of a folder must have one size",
            )
        yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
