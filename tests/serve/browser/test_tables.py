"""The page's tables and numbers are those of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from posecrafter_rt.poses import draw, keypoints, layouts
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, NUM_KEYPOINTS, keypoint_name
from posecrafter_rt.serve import protocol, security, websocket
from posecrafter_rt.serve.options import MAX_AGE_S, MAX_POSE_FILE_BYTES, MAX_VIDEO_BYTES

SOURCES = Path(__file__).parents[3] / "posecrafter_rt/serve/web/src"


def table(file: str, name: str) -> list[Any]:
    """The numbers of a constant array, nested as there."""
    text = (SOURCES / file).read_text()
    found = re.search(rf"const {name}\b[^=]*=(?!>) (\[.*?\]);", text, re.DOTALL)
    assert found is not None, name
    return ast.literal_eval(found[1])  # lists of numbers and strings are the same in both languages


def number(file: str, name: str) -> float:
    found = re.search(rf"const {name} = ([\d.]+);", (SOURCES / file).read_text())
    assert found is not None, name
    return float(found[1])


@pytest.mark.parametrize(("file", "name", "expected"), [
    ("layout.ts", "LIMBS", draw._LIMBS),
    ("layout.ts", "COLOURS", draw._COLOURS),
    ("landmarks.ts", "MESH_TO_IBUG", layouts._MESH_TO_IBUG),
    ("landmarks.ts", "MEDIAPIPE_BODY", layouts._MEDIAPIPE_BODY),
    ("landmarks.ts", "MEDIAPIPE_FEET", tuple(layouts._MEDIAPIPE_FEET.items())),
])  # fmt: skip
def test_tables(file: str, name: str, expected: tuple[Any, ...]) -> None:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

    assert frozen(table(file, name)) == expected


def test_names_and_numbers() -> None:
    names = table("layout.ts", "BODY_NAMES") + table("layout.ts", "FEET_NAMES")
    assert names == [keypoint_name(index) for index in range(24)]
    assert number("layout.ts", "NUM_KEYPOINTS") == NUM_KEYPOINTS
    assert number("layout.ts", "CONFIDENCE_THRESHOLD") == CONFIDENCE_THRESHOLD
    assert number("api.ts", "MAX_POSE_FILE_MIB") * 2**20 == MAX_POSE_FILE_BYTES
    assert number("api.ts", "MAX_VIDEO_MIB") * 2**20 == MAX_VIDEO_BYTES
    assert number("screen.ts", "MAX_AGE_MS") == 1000 * MAX_AGE_S


@pytest.mark.parametrize("name", ["BODY", "FEET", "FACE", "LEFT_HAND", "RIGHT_HAND"])
def test_ranges_of_keypoints(name: str) -> None:
    found = re.search(rf"const {name}: Range = {{ start: (\d+), stop: (\d+) }};", (SOURCES / "layout.ts").read_text())
    assert found is not None and slice(int(found[1]), int(found[2])) == getattr(keypoints, name)


@pytest.mark.parametrize(("name", "expected"), [
    ("SHORT_SIDE_PX", draw._DRAWN_SHORT_SIDE_PX),
    ("STICK_WIDTH_PX", draw._STICK_WIDTH_PX),
    ("DOT_PX", draw._BODY_DOT_PX),
    ("DOT_PX", draw._HAND_DOT_PX),
    ("FACE_DOT_PX", draw._FACE_DOT_PX),
    ("HAND_LINE_PX", draw._HAND_LINE_PX),
    ("LIMB_DIMMING", draw._LIMB_DIMMING),
])  # fmt: skip
def test_measures_of_drawn_poses(name: str, expected: float) -> None:
    assert number("draw.ts", name) == expected


@pytest.mark.parametrize(("name", "expected"), [
    ("HAND_DOT_COLOUR", draw._HAND_DOT_COLOUR), ("FACE_DOT_COLOUR", draw._FACE_DOT_COLOUR)])  # fmt: skip
def test_colours_of_drawn_poses(name: str, expected: tuple[int, ...]) -> None:
    assert f'const {name} = "rgb({" ".join(map(str, expected))})";' in (SOURCES / "draw.ts").read_text()


@pytest.mark.parametrize(("file", "name", "expected"), [
    ("protocol.ts", "VERSION", protocol.VERSION),
    ("protocol.ts", "POSE", protocol.POSE),
    ("protocol.ts", "FRAME", protocol.FRAME),
    ("protocol.ts", "POSE_HEADER_BYTES", protocol._POSE.size),
    ("protocol.ts", "FRAME_HEADER_BYTES", protocol._FRAME.size),
    ("protocol.ts", "NO_PICTURE", protocol.NO_PICTURE),
    ("protocol.ts", "HELD", protocol.HELD),
    ("transport.ts", "BAD_REQUEST", security.POLICY_VIOLATION),
    ("transport.ts", "FULL", security.TRY_AGAIN_LATER),
    ("transport.ts", "BROKEN", websocket._INTERNAL_ERROR),
])  # fmt: skip
def test_numbers_on_the_wire(file: str, name: str, expected: int) -> None:
    assert number(file, name) == expected
