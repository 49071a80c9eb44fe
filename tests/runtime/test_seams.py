"""A rendered stretch is drawn to the real frames beside it: exactly where nothing moves, with the movement where it does."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from posecrafter_rt.runtime import seams
from posecrafter_rt.runtime.seams import Anchor, draw_to_anchors

SIZE = (64, 80)


def scene(shift_px: float) -> np.ndarray:
    """A textured wall with a bright textured disc before it, so far to the right: (64, 80, 3) uint8."""
    rng = np.random.default_rng(0)
    wall, disc = (cv2.GaussianBlur(rng.uniform(0, 255, (*SIZE, 3)).astype(np.float32), (0, 0), 2) for _ in range(2))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    moved = cv2.warpAffine(disc, np.float32([[1, 0, shift_px], [0, 1, 0]]), SIZE[::-1], borderMode=cv2.BORDER_WRAP)
    inside = ((x - 24 - shift_px) ** 2 + (y - 32) ** 2 < 14**2)[..., None]
    contrast = np.where(inside, 60 + 3 * (moved - 128), 128 + 3 * (wall - 128))
    return contrast.clip(0, 255).astype(np.uint8)


def as_rendered(frame: np.ndarray) -> np.ndarray:
    """What a weak model makes of it: blurred and darker."""
    return (cv2.GaussianBlur(frame, (0, 0), 1.5) * 0.8).astype(np.uint8)


def error(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second).mean())


def test_a_picture_at_rest_is_restored_exactly() -> None:
    """The weights of both sides sum to 1, the first frame's to the left being the largest."""
    real = scene(0)
    drawn = list(draw_to_anchors([as_rendered(real)] * 7, 5, real, real))
    assert len(drawn) == 5 and all(np.abs(frame.astype(int) - real).max() <= 1 for frame in drawn)


def test_a_render_that_lacks_nothing_stays_as_it_is() -> None:
    frames = [scene(shift) for shift in range(6)]
    np.testing.assert_array_equal(list(draw_to_anchors(frames, 4, frames[0], frames[-1])), frames[1:-1])


@pytest.mark.parametrize("sides", ["both", "before", "after", "neither"])
def test_what_is_lacking_moves_with_the_picture(sides: str) -> None:
    """Nearer to the truth than the render, and than the same correction without its movement; no jump at the ends."""
    truth = [scene(3.0 * index) for index in range(8)]
    has_before, has_after = sides in ("both", "before"), sides in ("both", "after")
    rendered = [as_rendered(frame) for frame in truth][not has_before : None if has_after else -1]
    drawn = list(draw_to_anchors(rendered, 6, truth[0] if has_before else None, truth[-1] if has_after else None))
    plain = [as_rendered(frame) for frame in truth[1:-1]]
    if sides == "neither":
        np.testing.assert_array_equal(drawn, plain)
        return
    errors = [[error(frame, real) for frame, real in zip(clip, truth[1:-1], strict=True)] for clip in (drawn, plain)]
    assert all(ours < theirs for ours, theirs in zip(*errors, strict=True))
    moving = error(truth[1], truth[0])
    assert has_before == (error(drawn[0], truth[0]) < 2 * moving)
    assert has_after == (error(drawn[-1], truth[-1]) < 2 * moving)
    if sides == "both":
        assert np.mean(errors[0]) < 0.5 * np.mean(errors[1])
        still = [plain[i] + (1 - (i + 1) / 7) * (truth[0] - as_rendered(truth[0]).astype(float))
                 + (i + 1) / 7 * (truth[-1] - as_rendered(truth[-1]).astype(float)) for i in range(6)]  # fmt: skip
        assert np.mean(errors[0]) < 0.8 * np.mean([error(*pair) for pair in zip(still, truth[1:-1], strict=True)])


def test_where_there_is_another_thing_nothing_is_added() -> None:
    real = scene(0)
    anchor = Anchor(real, as_rendered(real))
    other = np.full_like(real, 255)
    assert np.abs(anchor.lack(as_rendered(real))).mean() > 20 > 0.1 > np.abs(anchor.lack(other)).max()


def test_a_long_stretch_is_held_in_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "REACH", 3)
    real, asked = scene(0), []

    def rendered() -> Iterator[np.ndarray]:
        for index in range(12):
            asked.append(index)
            yield as_rendered(real)
        asked.append("end")

    drawn = draw_to_anchors(rendered(), 10, real, real)
    frames = [next(drawn) for _ in range(7)]
    assert asked == list(range(8))  # the frame before, and those that have come out
    frames += list(drawn)
    assert asked[-1] == "end"
    errors = [error(frame, real) for frame in frames]
    assert errors[0] < errors[1] < errors[2] < errors[3] == errors[6] > errors[7] > errors[8] > errors[9]


@pytest.mark.parametrize("size", [(12, 12), (16, 40), (33, 31)])
def test_pictures_may_be_small_and_odd(size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, *size, 3), np.uint8)
    assert [frame.shape for frame in draw_to_anchors(iter(frames), 2, frames[1], frames[2])] == [(*size, 3)] * 2
