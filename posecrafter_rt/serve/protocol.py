"""The wire messages: poses in, frames out, and JSON both ways (docs/serve.md).

Layer 7: bytes to values and back; no sockets, no state.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS

VERSION = 1
POSE, FRAME = 1, 2
NO_PICTURE, JPEG, RGB = 0, 1, 2  # formats of a frame; the picture of NO_PICTURE goes by a WebRTC video track
FORMATS = {"jpeg": JPEG, "rgb": RGB}
HELD, REPEAT, RESET = 1, 2, 4  # flags of a frame
FITS = ("person", "canvas")
MAX_CANVAS_PX = 16384
MAX_COORDINATE = 1e6
_MAX_REASON_BYTES = 123
_POSE = struct.Struct("<BBHIdff")
_FRAME = struct.Struct("<BBBBIdHHIff")


class ProtocolError(PoseCrafterError):
    """A message that is not in the protocol; the connection is then closed."""


@dataclass(frozen=True, eq=False)
class PoseMessage:
    """A client's pose.

    sequence: uint32, the client's count. sent_ms: by the client's clock. canvas: (height, width) in whole pixels.
    keypoints: float32 (134, 3): x, y in pixels of the canvas, confidence; zeros where missing. None: nobody is seen.
    """

    sequence: int
    sent_ms: float
    canvas: tuple[int, int]
    keypoints: np.ndarray | None


@dataclass(frozen=True)
class FrameHeader:
    """What precedes a picture; `sequence` and `sent_ms` are those of the pose that it shows.

    format: NO_PICTURE, JPEG or RGB. flags: HELD | REPEAT | RESET. size: (height, width).
    dropped: poses of this session so far that no frame was shown for.
    wait_ms, render_ms: how long the pose waited for its turn, and how long the frame took.
    """

    format: int
    flags: int
    sequence: int
    sent_ms: float
    size: tuple[int, int]
    dropped: int
    wait_ms: float
    render_ms: float

    def without_picture(self) -> FrameHeader:
        """Return the header of a frame whose picture goes another way."""
        return replace(self, format=NO_PICTURE)


@dataclass(frozen=True)
class Configure:
    """What a client wants from now on; None leaves a setting as it is."""

    format: int | None = None
    quality: int | None = None
    fit: str | None = None


@dataclass(frozen=True)
class Reset:
    """Forget the past frames, and how the person was fitted."""


@dataclass(frozen=True)
class Record:
    """Begin or end a recording."""

    on: bool


Command = Configure | Reset | Record


def encode_pose(message: PoseMessage) -> bytes:
    """Encode a pose, little-endian: 24 bytes, and 12 for each keypoint."""
    points = np.zeros((0, 3), "<f4") if message.keypoints is None else np.asarray(message.keypoints, "<f4")
    height, width = message.canvas
    head = _POSE.pack(POSE, VERSION, len(points), message.sequence, message.sent_ms, height, width)
    return head + points.tobytes()


def decode_pose(data: bytes) -> PoseMessage:
    """Decode a pose. Raises: ProtocolError that says what is wrong with the bytes."""
    if len(data) < _POSE.size:
        raise ProtocolError(f"a pose message of {len(data)} bytes", f"its header alone has {_POSE.size}")
    kind, version, count, sequence, sent_ms, height, width = _POSE.unpack_from(data)
    if kind != POSE or version != VERSION:
        raise ProtocolError(f"a message of type {kind}, version {version}", f"poses are type {POSE}, version {VERSION}")
    if count not in (0, NUM_KEYPOINTS):
        raise ProtocolError(f"a pose of {count} keypoints", f"send {NUM_KEYPOINTS}, or 0 where nobody is seen")
    expected = _POSE.size + 12 * count
    if len(data) != expected:
        raise ProtocolError(f"a pose of {count} keypoints in {len(data)} bytes", f"it has {expected}")
    if not np.isfinite(sent_ms):
        raise ProtocolError(f"sent_ms is {sent_ms}", "send a time in milliseconds")
    if not all(1 <= side <= MAX_CANVAS_PX and side == int(side) for side in (height, width)):
        raise ProtocolError(f"a canvas of {height:g}x{width:g}", f"send whole pixels, 1 to {MAX_CANVAS_PX}")
    points = _checked(np.frombuffer(data, "<f4", offset=_POSE.size).reshape(count, 3)) if count else None
    return PoseMessage(sequence, sent_ms, (int(height), int(width)), points)


def _checked(points: np.ndarray) -> np.ndarray:
    """Return a float32 copy with missing keypoints set to zero. Raises: ProtocolError."""
    points = points.astype(np.float32)
    # Written so that NaN fails it too.
    if not (np.abs(points[:, :2]) <= MAX_COORDINATE).all():
        raise ProtocolError("a keypoint lies nowhere", f"send finite coordinates up to {MAX_COORDINATE:g}")
    if not ((points[:, 2] >= 0) & (points[:, 2] <= 1)).all():
        raise ProtocolError("a confidence is not within 0 to 1", "send 0 for a missing keypoint")
    points[points[:, 2] == 0] = 0
    return points


def encode_frame(header: FrameHeader, picture: bytes) -> bytes:
    """Encode a frame, little-endian: 32 bytes, then the picture."""
    return _FRAME.pack(FRAME, VERSION, header.format, header.flags, header.sequence, header.sent_ms, *header.size,
                       header.dropped, header.wait_ms, header.render_ms) + picture  # fmt: skip


def decode_frame(data: bytes) -> tuple[FrameHeader, bytes]:
    """Decode a frame. Raises: ProtocolError for another message, or for raw rows of a wrong size."""
    if len(data) < _FRAME.size:
        raise ProtocolError(f"a frame message of {len(data)} bytes", f"its header alone has {_FRAME.size}")
    kind, version, form, flags, sequence, sent_ms, height, width, dropped, wait, render = _FRAME.unpack_from(data)
    if kind != FRAME or version != VERSION or form not in (NO_PICTURE, *FORMATS.values()):
        raise ProtocolError(
            f"a message of type {kind}, version {version}, format {form} is no frame that is known here",
            f"frames are type {FRAME}, version {VERSION}; a client of the server's version knows all formats",
        )
    picture = data[_FRAME.size :]
    if form == RGB and len(picture) != height * width * 3:
        raise ProtocolError(f"{len(picture)} bytes for {height}x{width} pixels", f"they have {height * width * 3}")
    return FrameHeader(form, flags, sequence, sent_ms, (height, width), dropped, wait, render), picture


def parse_command(text: str) -> Command:
    """Parse a client's JSON message. Raises: ProtocolError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(
            f"a text message is not JSON: {error}", 'send an object such as {"type": "reset"}'
        ) from error
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "configure":
        return _configure(value)
    if kind == "reset":
        return Reset()
    if kind == "record":
        if not isinstance(value.get("on"), bool):
            raise ProtocolError(f"record on {value.get('on')!r}", "send true or false")
        return Record(value["on"])
    raise ProtocolError(f"a message of type {kind!r:.40}", "send configure, reset or record")


def _configure(value: dict[str, Any]) -> Configure:
    form, quality, fit = value.get("format"), value.get("quality"), value.get("fit")
    if form is not None and (not isinstance(form, str) or form not in FORMATS):
        raise ProtocolError(f"format {form!r:.40}", f"choose one of {', '.join(FORMATS)}")
    if quality is not None and (isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100):
        raise ProtocolError(f"quality {quality!r:.40}", "send a whole number, 1 to 100")
    if fit is not None and fit not in FITS:
        raise ProtocolError(f"fit {fit!r:.40}", f"choose one of {', '.join(FITS)}")
    return Configure(None if form is None else FORMATS[form], quality, fit)


def close_reason(message: str) -> str:
    """Return as much of a message as the close of a WebSocket can carry."""
    return message.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")


def error_message(error: PoseCrafterError) -> dict[str, Any]:
    """Return an error as it is sent to a client."""
    return {"type": "error", "message": str(error), "hint": error.hint}
