"""The page's tables of keypoints are those of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from posecrafter_rt.poses import draw, layouts
from posecrafter_rt.poses.keypoints import CONFIDENCE_THRESHOLD, NUM_KEYPOINTS, keypoint_name
from posecrafter_rt.serve.options import MAX_POSE_FILE_BYTES, MAX_VIDEO_BYTES

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
