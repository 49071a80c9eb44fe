"""Tests of reading and writing OpenPose JSON.

Tests; no layer.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posecrafter_rt.errors import DiskFull, OutputExists, PoseCrafterError, PoseError
from posecrafter_rt.poses.keypoints import BODY, FACE, FEET, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND, PoseSequence
from posecrafter_rt.poses.openpose_json import read_openpose, write_openpose

COORDINATE = st.floats(-50, 5000, width=32)


def flat(points: np.ndarray) -> list[float]:
    return [float(value) for value in points.ravel()]


def entry(person: np.ndarray) -> dict[str, Any]:
    return {
        "pose_keypoints_2d": flat(person[BODY]),
        "face_keypoints_2d": flat(person[FACE]),
        "hand_left_keypoints_2d": flat(person[LEFT_HAND]),
        "hand_right_keypoints_2d": flat(person[RIGHT_HAND]),
        "foot_keypoints_2d": flat(person[FEET]),
    }


def frame(*people: np.ndarray, canvas: tuple[int, int] | None = (512, 512)) -> dict[str, Any]:
    document: dict[str, Any] = {"people": [entry(person) for person in people]}
    if canvas is not None:
        document |= {"canvas_height": canvas[0], "canvas_width": canvas[1]}
    return document


def written(folder: Path, document: object) -> Path:
    path = folder / "poses.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


# --- what is accepted


def test_one_frame_a_list_and_frames_read_alike(person: np.ndarray, tmp_path: Path) -> None:
    single = read_openpose(written(tmp_path, frame(person)))
    assert single.canvas == (512, 512)
    assert np.allclose(single.keypoints, person)
    listed = read_openpose(written(tmp_path, [frame(person), frame(person)]))
    assert np.allclose(listed.keypoints, [person, person])
    document = {"canvas_height": 512, "canvas_width": 512, "fps": 24, "frames": [frame(person, canvas=None)]}
    ours = PoseSequence.load(written(tmp_path, document))
    assert np.allclose(ours.keypoints, person)
    assert ours.fps == 24


def test_a_folder_reads_in_the_order_of_its_numbers(person: np.ndarray, tmp_path: Path) -> None:
    for number in (10, 9, 100):
        moved = person + np.array([number, 0, 0], np.float32)
        (tmp_path / f"clip_{number}_keypoints.json").write_text(json.dumps(frame(moved)))
    (tmp_path / "notes.txt").write_text("not a pose")
    (tmp_path / "._clip_9_keypoints.json").write_bytes(b"\0\5\x16\7 of another system")
    poses = read_openpose(tmp_path)
    assert (poses.keypoints[:, 0, 0] - person[0, 0]).tolist() == [9, 10, 100]


def test_the_files_of_a_folder_may_be_lists(person: np.ndarray, tmp_path: Path) -> None:
    # ComfyUI writes a list of one frame into each.
    moved = [frame(person + np.array([index, 0, 0], np.float32)) for index in range(4)]
    for number, content in ((2, moved[:1]), (10, moved[1]), (11, moved[2:])):
        (tmp_path / f"pose_{number}.json").write_text(json.dumps(content))
    poses = read_openpose(tmp_path)
    assert (poses.keypoints[:, 0, 0] - person[0, 0]).tolist() == [0, 1, 2, 3] and poses.canvas == (512, 512)
    (tmp_path / "pose_3.json").write_text("[7]")
    with pytest.raises(PoseError, match=r'/pose_3\.json: no list of "people" in a int'):
        read_openpose(tmp_path)


def test_an_empty_list_in_a_folder_is_a_frame_without_people(person: np.ndarray, tmp_path: Path) -> None:
    for number, content in ((1, [frame(person)]), (2, []), (3, [frame(person)])):
        (tmp_path / f"pose_{number}.json").write_text(json.dumps(content))
    poses = read_openpose(tmp_path, allow_missing=True)
    assert np.allclose(poses.keypoints, [person, 0 * person, person])
    with pytest.raises(PoseError, match="frame 1 does not show the person"):
        read_openpose(tmp_path)


def test_what_is_no_pose_in_a_folder_is_named(person: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "a_1.json").write_text(json.dumps(frame(person)))
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    with pytest.raises(PoseError, match=r'/package\.json: no list of "people"'):
        read_openpose(tmp_path)


def test_body_25_gives_body_and_feet(person: np.ndarray, tmp_path: Path) -> None:
    body_25 = np.zeros((25, 3))
    body_25[[0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]] = person[BODY]
    body_25[8] = [256, 310, 1]
    body_25[19:25] = person[FEET]
    document = frame(person)
    document["people"][0]["pose_keypoints_2d"] = flat(body_25)
    document["people"][0]["foot_keypoints_2d"] = None
    assert np.allclose(read_openpose(written(tmp_path, document)).keypoints, person)


def test_pupils_are_left_out(person: np.ndarray, tmp_path: Path) -> None:
    document = frame(person)
    document["people"][0]["face_keypoints_2d"] += [1, 2, 1, 3, 4, 1]
    assert np.allclose(read_openpose(written(tmp_path, document)).keypoints, person)


@pytest.mark.parametrize("empty", [None, []])
def test_parts_may_be_null_empty_or_absent(person: np.ndarray, tmp_path: Path, empty: object) -> None:
    document = frame(person)
    document["people"][0]["hand_left_keypoints_2d"] = empty
    del document["people"][0]["face_keypoints_2d"]
    poses = read_openpose(written(tmp_path, document))
    assert not poses.keypoints[0, LEFT_HAND].any()
    assert not poses.keypoints[0, FACE].any()
    assert np.allclose(poses.keypoints[0, BODY], person[BODY])


def test_fractions_of_the_canvas_are_recognised(person: np.ndarray, tmp_path: Path) -> None:
    fractions = person / np.array([640, 480, 1], np.float32)
    fractions[0, :2] = [1.02, -0.01]
    fractions[20] = 0
    poses = read_openpose(written(tmp_path, [frame(fractions, canvas=(480, 640))]))
    expected = person.copy()
    expected[0, :2] = [1.02 * 640, -0.01 * 480]
    expected[20] = 0
    assert np.allclose(poses.keypoints[0], expected, atol=1e-3)


def test_a_point_far_outside_does_not_make_fractions_pixels(person: np.ndarray, tmp_path: Path) -> None:
    fractions = person / np.array([640, 480, 1], np.float32)
    fractions[4, :2] = [0.5, 2.5]
    poses = read_openpose(written(tmp_path, [frame(fractions, canvas=(480, 640))]))
    assert np.allclose(poses.keypoints[0, 5:], person[5:], atol=1e-3)
    assert np.allclose(poses.keypoints[0, 4], [320, 1200, person[4, 2]], atol=1e-3)


def test_a_small_frame_does_not_make_pixels_fractions(person: np.ndarray, tmp_path: Path) -> None:
    small = person * np.array([0.001, 0.001, 1], np.float32)
    zeros = person * np.array([0, 0, 1], np.float32)  # missing points, with a confidence all the same
    path = written(tmp_path, [frame(small), frame(zeros), frame(zeros), frame(person), frame(person)])
    poses = read_openpose(path, allow_missing=True)
    assert np.allclose(poses.keypoints[0], small) and not poses.keypoints[1:3].any()


def test_fractions_that_begin_at_minus_one_are_refused(person: np.ndarray, tmp_path: Path) -> None:
    centred = person * np.array([2 / 512, 2 / 512, 1], np.float32) - np.array([1, 1, 0], np.float32)
    with pytest.raises(PoseError, match=r"poses\.json: \d\d% of the coordinates are negative") as caught:
        read_openpose(written(tmp_path, frame(centred)))
    assert "--keypoint_scale 0" in (caught.value.hint or "")
    left = person - np.array([300, 0, 0], np.float32)  # in pixels half of a person may well be outside
    assert np.allclose(read_openpose(written(tmp_path, frame(left))).keypoints[0], left)


def test_frames_on_other_canvases_are_scaled_to_the_first(person: np.ndarray, tmp_path: Path) -> None:
    double = PoseSequence(person[None], (512, 512)).resized(1024, 1024).keypoints[0]
    poses = read_openpose(written(tmp_path, [frame(person), frame(double, canvas=(1024, 1024))]))
    assert poses.canvas == (512, 512)
    assert np.allclose(poses.keypoints[1], person, atol=1e-3)


def test_a_canvas_may_be_passed(person: np.ndarray, tmp_path: Path) -> None:
    path = written(tmp_path, frame(person, canvas=None))
    assert read_openpose(path, canvas=(512, 640)).canvas == (512, 640)
    with pytest.raises(PoseError, match="how large the picture is") as caught:
        read_openpose(path)
    assert "poses edit FILE -o NEW.json --canvas" in (caught.value.hint or "")


def test_what_a_file_says_of_its_canvas_counts_more_than_what_is_passed(person: np.ndarray, tmp_path: Path) -> None:
    assert read_openpose(written(tmp_path, frame(person)), canvas=(64, 64)).canvas == (512, 512)
    header = {"canvas_height": 512, "canvas_width": 512, "frames": [frame(person, canvas=None)]}
    assert read_openpose(written(tmp_path, header), canvas=(64, 64)).canvas == (512, 512)


def test_confidences_are_clipped_and_null_points_are_missing(person: np.ndarray, tmp_path: Path) -> None:
    document = frame(person)
    values = document["people"][0]["pose_keypoints_2d"]
    values[2], values[5], values[6] = 1.07, -0.2, None
    keypoints = read_openpose(written(tmp_path, document)).keypoints[0]
    assert keypoints[0, 2] == 1
    assert not keypoints[1].any()
    assert not keypoints[2].any()


@pytest.mark.parametrize("is_in_pixels", [True, False])
@pytest.mark.parametrize("place", [-1, 0])
def test_points_at_zero_or_minus_one_are_missing_in_files_of_others(
    person: np.ndarray, tmp_path: Path, is_in_pixels: bool, place: int
) -> None:
    expected = person.copy()
    expected[[0, 30, 100]] = 0
    expected[1, :2] = [-1, 5] if is_in_pixels else [-0.25 * 512, -512]
    points = expected / ([1, 1, 1] if is_in_pixels else [512, 512, 1])
    points[[0, 30, 100]] = [place, place, 1]
    poses = read_openpose(written(tmp_path, [frame(points)]))
    assert np.allclose(poses.keypoints[0], expected, atol=1e-3) and not poses.keypoints[0, [0, 30, 100]].any()


def test_points_at_zero_and_minus_one_are_some_in_our_own_files(person: np.ndarray, tmp_path: Path) -> None:
    beside = person.copy()
    beside[:2] = [[-1, -1, 1], [0, 0, 1]]
    PoseSequence(beside[None], (512, 512)).save(tmp_path / "ours.json")
    assert read_openpose(tmp_path / "ours.json").keypoints[0, :2].tolist() == [[-1, -1, 1], [0, 0, 1]]


def test_a_byte_order_mark_is_accepted(person: np.ndarray, tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeff" + json.dumps(frame(person)))
    assert len(read_openpose(path)) == 1


# --- several people


def test_the_largest_person_is_taken_and_another_can_be_named(person: np.ndarray, tmp_path: Path) -> None:
    small = person * np.array([0.5, 0.5, 1], np.float32)
    path = written(tmp_path, [frame(small, person), frame(person, small)])
    assert np.allclose(read_openpose(path).keypoints, [person, person])
    assert np.allclose(PoseSequence.load(path, person=0).keypoints, [small, small])
    with pytest.raises(PoseError, match=r"person 2 was asked for, but frame 0 has 2"):
        read_openpose(path, person=2)


def test_a_frame_without_the_person(person: np.ndarray, tmp_path: Path) -> None:
    path = written(tmp_path, [frame(person), frame(), frame(person)])
    with pytest.raises(PoseError, match="frame 1 does not show the person"):
        read_openpose(path)
    poses = read_openpose(path, allow_missing=True)
    assert not poses.keypoints[1].any()
    assert np.allclose(poses.keypoints[2], person)
    with pytest.raises(PoseError, match="no person in any of 1 frames"):
        read_openpose(written(tmp_path, frame()), allow_missing=True)


# --- what is refused


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1e30", '"7"', "true", "[1]", "9" * 400])
def test_values_that_are_not_numbers_are_named(person: np.ndarray, tmp_path: Path, value: str) -> None:
    document = frame(person)
    document["people"][0]["pose_keypoints_2d"][13] = "HERE"
    text = json.dumps([frame(person), document]).replace('"HERE"', value)
    with pytest.raises(PoseError, match="frame 1, right wrist: y is") as caught:
        read_openpose(written(tmp_path, text))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("part", "point", "name"),
    [
        ("face_keypoints_2d", 30, "face 30"),
        ("hand_left_keypoints_2d", 4, "left hand 4"),
        ("hand_right_keypoints_2d", 20, "right hand 20"),
        ("foot_keypoints_2d", 3, "right big toe"),
    ],
)
def test_every_part_is_named(person: np.ndarray, tmp_path: Path, part: str, point: int, name: str) -> None:
    document = frame(person)
    document["people"][0][part][3 * point + 2] = float("nan")
    with pytest.raises(PoseError, match=f"frame 0, {name}: confidence is nan"):
        read_openpose(written(tmp_path, document))


def test_points_that_are_not_ours_are_named_by_place(tmp_path: Path) -> None:
    body = [1.0] * 75
    body[3 * 8] = float("inf")
    document = {"people": [{"pose_keypoints_2d": body}], "canvas_width": 64, "canvas_height": 64}
    with pytest.raises(PoseError, match="pose_keypoints_2d point 8: x is inf"):
        read_openpose(written(tmp_path, document))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "0 frames"),
        ({"frames": []}, "0 frames"),
        ({"animals": []}, r"not poses: an object with the keys \['animals'\]"),
        (3, "not poses: a int"),
        (None, "not poses: null"),
        ([{"people": None}], 'frame 0: no list of "people"'),
        ([[1, 2]], 'frame 0: no list of "people" in a list'),
        ([{"people": [7]}], "frame 0: person 0 is a int"),
        ([{"people": [{"pose_keypoints_2d": [1, 2, 3]}]}], "frame 0: pose_keypoints_2d has 3 values"),
        ([{"people": [{"face_keypoints_2d": "abc"}]}], "frame 0: face_keypoints_2d has a str"),
        ([{"people": [], "canvas_width": 0, "canvas_height": 5}], "frame 0: the canvas is 0 wide and 5 high"),
        ([{"people": [], "canvas_width": 5}], "frame 0: the canvas is 5 wide and None high"),
        ({"people": [], "canvas_width": "9", "canvas_height": 9}, "the canvas is '9' wide"),
    ],
)
def test_documents_that_are_not_poses(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(PoseError, match=message) as caught:
        read_openpose(written(tmp_path, document))
    assert "poses.json" in str(caught.value)
    assert caught.value.hint


def test_a_wrong_fps(person: np.ndarray, tmp_path: Path) -> None:
    for fps in (0, "25", float("nan")):
        with pytest.raises(PoseError, match="fps is"):
            read_openpose(written(tmp_path, {**frame(person), "frames": [frame(person)], "fps": fps}))


def test_files_that_cannot_be_read(person: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(PoseError, match=r"none\.json: there is no such file"):
        PoseSequence.load(tmp_path / "none.json")
    with pytest.raises(PoseError, match=r"no \.json file in this folder"):
        PoseSequence.load(tmp_path)
    text = json.dumps(frame(person))
    with pytest.raises(PoseError, match=r"poses\.json: not valid JSON at line 1, column"):
        PoseSequence.load(written(tmp_path, text[: len(text) // 2]))
    with pytest.raises(PoseError, match="not valid JSON"):
        PoseSequence.load(written(tmp_path, ""))
    with pytest.raises(PoseError, match="not a JSON text file"):
        PoseSequence.load(written(tmp_path, "[" * 200_000))
    (tmp_path / "poses.json").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(PoseError, match="not a JSON text file"):
        PoseSequence.load(tmp_path / "poses.json")


# --- writing


def test_what_is_written(person: np.ndarray, tmp_path: Path) -> None:
    person[LEFT_HAND] = 0
    PoseSequence(person[None], (480, 512), 29.97).save(tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert {key: document[key] for key in ("format", "canvas_width", "canvas_height", "fps")} == {
        "format": "openpose", "canvas_width": 512, "canvas_height": 480, "fps": 29.97,
    }  # fmt: skip
    (first,) = document["frames"][0]["people"]
    assert first["pose_keypoints_2d"] == pytest.approx(flat(person[BODY]), abs=0.005)
    assert len(first["foot_keypoints_2d"]) == 18
    assert first["hand_left_keypoints_2d"] == []
    assert os.listdir(tmp_path) == ["a.json"]
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_nothing_is_overwritten_without_force(person: np.ndarray, tmp_path: Path) -> None:
    poses = PoseSequence(person[None], (512, 512))
    path = tmp_path / "a.json"
    path.write_text("mine")
    with pytest.raises(OutputExists, match=r"a\.json exists already"):
        poses.save(path)
    assert path.read_text() == "mine"
    poses.save(path, force=True)
    assert len(PoseSequence.load(path)) == 1


def test_a_failed_write_leaves_the_old_file(
    person: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poses = PoseSequence(person[None], (512, 512))
    path = tmp_path / "a.json"
    path.write_text("mine")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"no space left to write .*a\.json"):
        poses.save(path, force=True)
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_cannot_be_made_is_named(person: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PoseCrafterError, match=r"cannot write \S*file/a\.json"):
        write_openpose(PoseSequence(person[None], (512, 512)), tmp_path / "file" / "a.json")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    points=st.lists(
        st.tuples(st.integers(0, NUM_KEYPOINTS - 1), COORDINATE, COORDINATE, st.floats(0.0009765625, 1, width=32)),
        min_size=1,
    ),
    num_frames=st.integers(1, 3),
    canvas=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    fps=st.none() | st.floats(0.01, 1000),
)
def test_round_trip(
    tmp_path: Path,
    points: list[tuple[int, float, float, float]],
    num_frames: int,
    canvas: tuple[int, int],
    fps: float | None,
) -> None:
    keypoints = np.zeros((num_frames, NUM_KEYPOINTS, 3))
    for index, x, y, confidence in points:
        keypoints[:, index] = x, y, confidence
    poses = PoseSequence(keypoints, canvas, fps)
    poses.save(tmp_path / "a.json", force=True)
    back = PoseSequence.load(tmp_path / "a.json")
    assert (back.canvas, back.fps) == (poses.canvas, poses.fps)
    # A few float32 steps at 5000 on top of half a hundredth.
    assert np.abs(back.keypoints[..., :2] - poses.keypoints[..., :2]).max() <= 0.005 + 1e-3
    assert np.abs(back.keypoints[..., 2] - poses.keypoints[..., 2]).max() <= 0.0005 + 1e-6
    back.save(tmp_path / "b.json", force=True)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
