"""A stretch of a video: what surrounds it passes as it is, frame by frame; what cannot be replaced is one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posecrafter_rt.errors import PoseCrafterError, PoseError, VideoError
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence
from posecrafter_rt.runtime.stretch import open_stretch
from posecrafter_rt.video_io import read_video, write_png, write_video

COUNT, SIZE = 10, (32, 32)
CANVAS = (40, 48)  # that of the clip


def standing(count: int = COUNT, canvas: tuple[int, int] = CANVAS) -> PoseSequence:
    return PoseSequence(np.zeros((count, NUM_KEYPOINTS, 3), np.float32), canvas)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """10 frames of 48 × 40 pixels, wider than high, at 24 a second; no two are alike."""
    frames = np.random.default_rng(0).integers(0, 256, (COUNT, 5, 6, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write_video(tmp_path / "clip.mp4", frames, 24.0)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize(("window", "start", "stop"), [
    (slice(4, 7), 4, 7), (slice(0, 1), 0, 1), (slice(8, None), 8, COUNT), (slice(None, 3), 0, 3), (slice(None), 0, COUNT),
])  # fmt: skip
def test_all_but_the_stretch_are_the_videos_own_frames(clip: Path, window: slice, start: int, stop: int) -> None:
    stretch = open_stretch(clip, window, SIZE, standing())
    assert (stretch.start, stretch.stop, stretch.fps) == (start, stop, pytest.approx(24))
    own = read_video(clip, size=SIZE).frames
    rendered = 255 - own[start:stop]
    mended = list(stretch.mend(iter(rendered)))
    np.testing.assert_array_equal(mended, np.concatenate([own[:start], rendered, own[stop:]]))
    np.testing.assert_array_equal(list(stretch.replaced()), own[start:stop])
    beside = [frame for frame in (stretch.before, stretch.after) if frame is not None]
    expected = [own[index] for index in (start - 1, stop) if 0 <= index < COUNT]
    np.testing.assert_array_equal(beside, expected)
    asked = own[stretch.rendered]
    assert len(asked) == stop - start + len(beside)
    np.testing.assert_array_equal(asked[stretch.inside], own[start:stop])
    np.testing.assert_array_equal(list(stretch.draw_to_neighbours(iter(asked))), own[start:stop])


def test_a_video_may_be_named_by_a_string(clip: Path) -> None:
    assert open_stretch(str(clip), slice(4, 7), SIZE, standing()).video == clip


def test_frames_are_asked_for_when_their_turn_comes_and_to_the_end(clip: Path) -> None:
    """Whoever renders them may have work after the last one, and before the first."""
    told = []

    def rendered():
        for index in range(3):
            told.append(index)
            yield np.zeros((*SIZE, 3), np.uint8)
        told.append("end")

    mended, seen = open_stretch(clip, slice(4, 7), SIZE, standing()).mend(rendered()), []
    for _ in mended:
        seen.append(list(told))
    assert seen[3] == [] and seen[4] == [0] and seen[6] == [0, 1, 2] and seen[7] == seen[9] == [0, 1, 2, "end"]


def test_its_hash_is_that_of_every_frame(clip: Path, tmp_path: Path) -> None:
    def hash_of(frames: np.ndarray) -> str:
        for index, frame in enumerate(frames):
            write_png(tmp_path / "frames" / f"{index}.png", frame, force=True)
        return open_stretch(tmp_path / "frames", slice(4, 7), frames.shape[1:3], standing(len(frames))).frames_sha256

    frames = read_video(clip).frames
    first = hash_of(frames)
    for index in (0, 5, 9):
        changed = frames.copy()
        changed[index, 20, 20, 1] ^= 1
        assert hash_of(changed) != first
    assert hash_of(frames) == first == open_stretch(clip, slice(0, 2), CANVAS, standing()).frames_sha256


@pytest.mark.parametrize(("window", "num_poses", "kind", "message"), [
    (slice(4, 7), 9, PoseError, "clip.mp4 has 10 frames but there are 9 poses"),
    (slice(4, 7), 3, PoseError, "clip.mp4 has 10 frames but there are 3 poses"),
    (slice(4, 11), COUNT, VideoError, "clip.mp4 has 10 frames, and 4:11 is not within them"),
    (slice(10, None), COUNT, VideoError, "clip.mp4 has 10 frames, and 10:10 is not within them"),
    (slice(12, 14), COUNT, VideoError, "clip.mp4 has 10 frames, and 12:14 is not within them"),
])  # fmt: skip
def test_what_cannot_be_replaced(
    clip: Path, window: slice, num_poses: int, kind: type[PoseCrafterError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        open_stretch(clip, window, SIZE, standing(num_poses))


def test_a_video_of_another_shape_than_its_poses_is_refused(clip: Path) -> None:
    for canvas in ((80, 96), (41, 48), (20, 24)):  # larger, smaller, and rounded
        open_stretch(clip, slice(4, 7), SIZE, standing(canvas=canvas))
    with pytest.raises(PoseError, match=r"clip\.mp4 are 40x48, of another shape than their poses' canvas of 48x40"):
        open_stretch(clip, slice(4, 7), SIZE, standing(canvas=(48, 40)))


def test_a_video_that_breaks_off_is_refused_before_anything_is_rendered(clip: Path) -> None:
    whole = clip.read_bytes()
    middle = whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) // 2
    clip.write_bytes(whole[:middle])
    with pytest.raises(VideoError, match="clip.mp4 is damaged or breaks off at frame"):
        open_stretch(clip, slice(0, 2), SIZE, standing())


@pytest.mark.parametrize("change", ["shorter", "much shorter", "longer", "one frame"])
def test_a_video_that_changes_while_it_is_mended_is_an_error(clip: Path, change: str) -> None:
    stretch = open_stretch(clip, slice(4, 7), SIZE, standing())
    frames = read_video(clip).frames.copy()
    if change == "one frame":
        frames[8] = 255 - frames[8]
    changed = {"shorter": frames[:9], "much shorter": frames[:5], "longer": np.concatenate([frames, frames[:1]])}
    write_video(clip, changed.get(change, frames), 24.0, force=True)
    with pytest.raises(VideoError, match=r"clip\.mp4 was changed while it was mended"):
        list(stretch.mend(iter(np.zeros((3, *SIZE, 3), np.uint8))))
