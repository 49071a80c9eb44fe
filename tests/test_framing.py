"""Fitting frames and poses to a size together; contact sheets and clips side by side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.framing import contact_sheet, cover_transform, resize_to, side_by_side, transform_keypoints
from posecrafter_rt.poses.keypoints import PoseSequence

sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


def ramp(size: tuple[int, int]) -> np.ndarray:
    """A picture whose red is proportional to x and whose green is proportional to y."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    picture = np.stack([x * 255 / size[1], y * 255 / size[0], 0 * x], axis=-1)
    return picture.round().astype(np.uint8)


def at(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear sample."""
    x0, y0 = int(x), int(y)
    wx, wy = x - x0, y - y0
    patch = picture[y0 : y0 + 2, x0 : x0 + 2].astype(np.float64)
    return (patch * np.outer([1 - wy, wy], [1 - wx, wx])[..., np.newaxis]).sum(axis=(0, 1))


@given(sizes, sizes)
@settings(deadline=None)
def test_the_cut_lies_inside_and_covers(src, dst):
    scale_x, scale_y, offset_x, offset_y = cover_transform(src, dst)
    kept_x, kept_y = dst[1] / scale_x, dst[0] / scale_y
    assert offset_x >= 0 and offset_y >= 0
    assert offset_x + kept_x <= src[1] + 1e-9 and offset_y + kept_y <= src[0] + 1e-9
    assert kept_x == pytest.approx(round(kept_x)) and kept_y == pytest.approx(round(kept_y))
    assert round(kept_x) == src[1] or round(kept_y) == src[0]  # one side is kept whole
    assert abs(src[1] - kept_x - 2 * offset_x) <= 1 + 1e-9  # centred to the pixel


@given(sizes)
def test_the_same_size_is_left_alone(size):
    assert cover_transform(size, size) == (1, 1, 0, 0)
    frame = np.zeros((*size, 3), np.uint8)
    assert resize_to(frame, size) is frame


@given(sizes, sizes)
@settings(deadline=None, max_examples=50)
def test_frames_have_the_size_asked_for(src, dst):
    frame = np.full((*src, 3), 77, np.uint8)
    fitted = resize_to(frame, dst)
    assert fitted.shape == (*dst, 3) and (fitted == 77).all()


@pytest.mark.parametrize(
    ("src", "dst"), [((90, 160), (64, 64)), ((160, 90), (48, 64)), ((61, 83), (128, 128)), ((480, 641), (64, 48))]
)
def test_poses_stay_on_what_they_point_at(src, dst):
    picture = ramp(src)
    fitted = resize_to(picture, dst)
    keypoints = np.zeros((1, 134, 3), np.float32)
    centre = np.array([src[1], src[0]]) / 2
    shift = np.random.default_rng(0).uniform(-0.25, 0.25, (134, 2)) * min(src)
    keypoints[0, :, :2], keypoints[0, :, 2] = centre + shift, 1
    moved = transform_keypoints(PoseSequence(keypoints, src, 30.0), dst)
    assert moved.canvas == dst and moved.fps == 30.0
    for before, after in zip(keypoints[0], moved.keypoints[0], strict=True):
        np.testing.assert_allclose(at(fitted, *after[:2]), at(picture, *before[:2]), atol=2.5)


def test_missing_points_stay_missing():
    keypoints = np.zeros((1, 134, 3), np.float32)
    keypoints[0, 0] = (10, 20, 0.8)
    moved = transform_keypoints(PoseSequence(keypoints, (100, 200)), (50, 50)).keypoints
    assert not moved[0, 1:].any() and moved[0, 0, 2] == np.float32(0.8)
    np.testing.assert_allclose(moved[0, 0, :2], [(10 - 50 + 0.5) / 2 - 0.5, (20 + 0.5) / 2 - 0.5])


def test_shrinking_averages_areas():
    board = np.zeros((64, 64, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 200
    assert (resize_to(board, (16, 16)) == 100).all()


def test_a_clip_is_fitted_frame_by_frame():
    frames = np.stack([ramp((20, 30)), ramp((20, 30))[::-1]])
    fitted = resize_to(frames, (10, 10))
    np.testing.assert_array_equal(fitted[1], resize_to(frames[1], (10, 10)))
    assert resize_to(frames[:0], (10, 10)).shape == (0, 10, 10, 3)


def test_refuses_what_is_no_frame_or_size():
    with pytest.raises(ShapeError, match="float32"):
        resize_to(np.zeros((4, 4, 3), np.float32), (2, 2))
    with pytest.raises(ShapeError, match="0x5"):
        resize_to(np.zeros((4, 4, 3), np.uint8), (0, 5))


def frames_of(count: int, size: tuple[int, int], value: int = 90) -> np.ndarray:
    return np.full((count, *size, 3), value, np.uint8)


def test_a_contact_sheet_is_bounded():
    sheet = contact_sheet([("truth", frames_of(30, (900, 700))), ("rendered", list(frames_of(3, (900, 700))))])
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    assert sheet.shape[0] < 2 * (256 + 30) and sheet.shape[1] < 8 * 256


def test_small_frames_are_enlarged():
    sheet = contact_sheet([("", frames_of(2, (32, 32)))])
    assert sheet.shape[0] >= 128 and sheet.shape[1] >= 256


def test_frames_are_sampled_evenly_with_both_ends():
    frames = np.stack([np.full((128, 128, 3), i, np.uint8) for i in range(100)])
    sheet = contact_sheet([frames])
    shown = [int(sheet[64, 64 + i * 132, 0]) for i in range(8)]
    assert shown[0] == 0 and shown[-1] == 99 and len(set(shown)) == 8
    assert max(np.diff(shown)) - min(np.diff(shown)) <= 1


def test_rows_of_different_sizes_and_names_fit_together():
    sheet = contact_sheet(
        [("a name that is wider than its only picture is", frames_of(1, (40, 10))), frames_of(5, (9, 16))]
    )
    assert sheet.shape[1] > 128 and sheet[:22].max() > 200  # the name can be read


@pytest.mark.parametrize("rows", [[], [("empty", np.zeros((0, 8, 8, 3), np.uint8))]])
def test_refuses_sheets_of_nothing(rows):
    with pytest.raises(ShapeError, match="row"):
        contact_sheet(rows)


def test_clips_side_by_side():
    joined = side_by_side(frames_of(4, (20, 30)), frames_of(4, (40, 20), 10))
    assert joined.shape == (4, 40, 60 + 20, 3)
    assert (joined[:, :, :60] == 90).all() and (joined[:, :, 60:] == 10).all()
    named = side_by_side(frames_of(4, (20, 300)), frames_of(4, (20, 300)), labels=("truth", "rendered"))
    assert named.shape == (4, 42, 600, 3) and named[0, :22, :300].max() > 200


@pytest.mark.parametrize(
    ("clips", "labels"), [([], None), ([3, 4], None), ([3, 3], ("one",))], ids=["none", "lengths", "labels"]
)
def test_refuses_clips_that_cannot_be_joined(clips, labels):
    with pytest.raises(ShapeError, match="cannot be joined"):
        side_by_side(*[frames_of(count, (8, 8)) for count in clips], labels=labels)
