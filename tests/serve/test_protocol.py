"""The wire messages: what is encoded is decoded, layouts hold, and anything else is a ProtocolError."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posecrafter_rt.serve.protocol import (
    HELD,
    JPEG,
    NO_PICTURE,
    RESET,
    RGB,
    Configure,
    FrameHeader,
    PoseMessage,
    ProtocolError,
    Record,
    Reset,
    decode_frame,
    decode_pose,
    encode_frame,
    encode_pose,
    parse_command,
)
from tests.serve.drawn import make_pose

SEQUENCES = st.integers(0, 2**32 - 1)
TIMES = st.floats(allow_nan=False, allow_infinity=False)
SIDES = st.integers(1, 16384)
SPANS = st.floats(0, 1e6, width=32)


@given(SEQUENCES, TIMES, SIDES, SIDES, st.booleans(), st.integers(0, 1000))
def test_a_pose_survives(sequence: int, sent_ms: float, height: int, width: int, is_seen: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.uniform(-1e4, 1e4, (134, 2)), rng.uniform(0.01, 1, (134, 1))], 1).astype(np.float32)
    points[rng.random(134) < 0.3] = 0
    back = decode_pose(encode_pose(PoseMessage(sequence, sent_ms, (height, width), points if is_seen else None)))
    assert (back.sequence, back.sent_ms, back.canvas) == (sequence, sent_ms, (height, width))
    assert np.array_equal(back.keypoints, points) if is_seen else back.keypoints is None


@given(SEQUENCES, TIMES, st.integers(0, 7), SEQUENCES, st.tuples(SPANS, SPANS), st.binary(max_size=60))
def test_a_frame_survives(
    sequence: int, sent_ms: float, flags: int, dropped: int, spans_ms: tuple[float, float], picture: bytes
) -> None:
    header = FrameHeader(JPEG, flags, sequence, sent_ms, (480, 640), dropped, *spans_ms)
    back, same_picture = decode_frame(encode_frame(header, picture))
    assert back == header and same_picture == picture


def test_the_layouts_are_those_of_the_documentation() -> None:
    """Written out by hand: a client in another language reads these bytes."""
    points = make_pose()
    pose = encode_pose(PoseMessage(7, 1234.5, (64, 48), points))
    assert (
        pose
        == bytes([1, 1, 134, 0])
        + struct.pack("<I", 7)
        + struct.pack("<d", 1234.5)
        + struct.pack("<ff", 64, 48)
        + points.astype("<f4").tobytes()
    )
    assert len(pose) == 24 + 12 * 134
    assert encode_pose(PoseMessage(7, 1.0, (64, 48), None))[2:4] == b"\0\0"
    frame = encode_frame(FrameHeader(RGB, HELD | RESET, 9, 2.5, (2, 1), 3, 4.0, 5.0), b"abcdef")
    assert frame == bytes([2, 1, 2, 5]) + struct.pack("<IdHHIff", 9, 2.5, 2, 1, 3, 4.0, 5.0) + b"abcdef"
    assert len(frame) == 32 + 6


@given(st.binary(max_size=2000))
def test_no_bytes_do_anything_else(data: bytes) -> None:
    for decode in (decode_pose, decode_frame):
        try:
            decode(data)
        except ProtocolError:
            continue


def changed(offset: int, layout: str, value: float) -> bytes:
    data = bytearray(encode_pose(PoseMessage(0, 0.0, (64, 48), make_pose())))
    struct.pack_into(f"<{layout}", data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(("data", "why"), [
    (b"", "0 bytes"), (changed(0, "B", 2), "type 2"), (changed(1, "B", 9), "version 9"), (changed(2, "H", 18), "18 keypoints"),
    (changed(0, "B", 1) + b"\0", "in 1633 bytes"), (changed(8, "d", float("nan")), "sent_ms"),
    (changed(16, "f", 0), "canvas of 0x48"), (changed(20, "f", 48.5), "64x48.5"), (changed(20, "f", float("nan")), "canvas"),
    (changed(16, "f", 1e6), "canvas"), (changed(24, "f", float("nan")), "nowhere"), (changed(28, "f", float("inf")), "nowhere"),
    (changed(24, "f", -2e6), "nowhere"), (changed(32, "f", 1.5), "confidence"), (changed(32, "f", -0.1), "confidence"),
    (changed(32, "f", float("nan")), "confidence"),
])  # fmt: skip
def test_a_bad_pose_is_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        decode_pose(data)


def test_missing_points_are_zeros() -> None:
    points = make_pose()
    points[3, 2] = 0
    back = decode_pose(encode_pose(PoseMessage(0, 0.0, (64, 48), points))).keypoints
    assert back is not None and not back[3].any() and back[4].any()


@pytest.mark.parametrize(
    "data", [b"\2" * 31, b"\1" * 40, bytes([2, 1, 9, 0]) + bytes(28), bytes([2, 2, 1, 0]) + bytes(28)]
)
def test_a_bad_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(data)


def test_raw_rows_must_be_as_many_as_the_size_says() -> None:
    header = FrameHeader(RGB, 0, 0, 0.0, (2, 2), 0, 0.0, 0.0)
    with pytest.raises(ProtocolError, match="11 bytes for 2x2"):
        decode_frame(encode_frame(header, bytes(11)))
    assert decode_frame(encode_frame(header.without_picture(), b""))[0].format == NO_PICTURE


@pytest.mark.parametrize(("value", "command"), [
    ({"type": "reset"}, Reset()), ({"type": "record", "on": True}, Record(True)), ({"type": "configure"}, Configure()),
    ({"type": "configure", "format": "rgb", "quality": 5, "fit": "canvas"}, Configure(RGB, 5, "canvas")),
])  # fmt: skip
def test_commands_are_read(value: dict, command: object) -> None:
    assert parse_command(json.dumps(value)) == command


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "3", '"reset"', "{}", '{"type": "quit"}', '{"type": ["reset"]}', '{"type": "record"}',
    '{"type": "record", "on": 1}', '{"type": "configure", "format": "png"}', '{"type": "configure", "format": []}',
    '{"type": "configure", "quality": 0}', '{"type": "configure", "quality": 101}', '{"type": "configure", "quality": true}',
    '{"type": "configure", "quality": "9"}', '{"type": "configure", "fit": "none"}', '{"type": "configure", "fit": {}}',
    "[" * 20000, "1" * 10000,
])  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse_command(text)


@given(st.text(st.characters(max_codepoint=300), max_size=200))
def test_no_text_does_anything_else(text: str) -> None:
    try:
        parse_command(text)
    except ProtocolError:
        return
