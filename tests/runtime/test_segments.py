"""Segments cover a clip, share what they should, and blend with weights that sum to one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.runtime.render import blend
from posecrafter_rt.runtime.segments import Segment, Split, check_split, ramp, split_clip


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int]:
    """Frames of a clip, of a segment, and shared."""
    segment = draw(st.integers(1, 60))
    return draw(st.integers(1, 500)), segment, draw(st.integers(0, segment // 3))


@given(splits())
def test_every_frame_is_settled_once_and_in_order(split: tuple[int, int, int]) -> None:
    segments = split_clip(*split)
    settled = [frame for segment in segments for frame in range(segment.start, segment.settled)]
    assert settled == list(range(split[0]))


@given(splits())
def test_segments_are_no_longer_than_allowed_and_of_one_length_where_they_can(split: tuple[int, int, int]) -> None:
    lengths = [segment.stop - segment.start for segment in split_clip(*split)]
    assert max(lengths) <= split[1]
    assert max(lengths) - min(lengths) <= 1
    if split[2] and 2 * (split[2] + 1) <= max(lengths):
        assert len({*lengths}) == 1


@given(splits())
def test_neighbours_share_the_overlap_or_one_more_and_no_frame_lies_in_three(split: tuple[int, int, int]) -> None:
    num_frames, _, overlap = split
    segments = split_clip(*split)
    shared = [earlier.stop - later.start for earlier, later in zip(segments, segments[1:], strict=False)]
    assert all(later.start == earlier.settled for earlier, later in zip(segments, segments[1:], strict=False))
    assert all(frames in (overlap, overlap + bool(overlap)) for frames in shared)
    assert shared == sorted(shared, reverse=True)  # so that what is left of a clip is cut as all of it was
    rendered = [frame for segment in segments for frame in range(segment.start, segment.stop)]
    assert max(rendered.count(frame) for frame in {*rendered}) <= 2
    assert len(rendered) == num_frames + sum(shared)


def test_a_clip_in_segments_of_one_length() -> None:
    assert split_clip(13, 6, 2) == [(0, 6, 3), (3, 9, 7), (7, 13, 13)]
    assert split_clip(13, 6, 0) == [(0, 5, 5), (5, 9, 9), (9, 13, 13)]
    assert split_clip(8, 3, 1) == [
        (0, 3, 2),
        (2, 5, 4),
        (4, 7, 6),
        (6, 8, 8),
    ]  # two frames shared on both sides are too many


@given(splits())
def test_fewer_segments_would_not_do(split: tuple[int, int, int]) -> None:
    num_frames, segment, overlap = split
    fewer = len(split_clip(*split)) - 1
    assert fewer == 0 or fewer * segment - (fewer - 1) * overlap < num_frames


@given(splits())
def test_a_clip_that_fits_is_one_segment_as_without_segments(split: tuple[int, int, int]) -> None:
    num_frames, segment, overlap = split
    if num_frames <= segment:
        assert split_clip(num_frames, segment, overlap) == split_clip(num_frames, None, overlap)
    assert split_clip(num_frames, None, overlap) == [Segment(0, num_frames, num_frames)]


@settings(deadline=None)  # torch's first call takes its time
@given(splits())
def test_weights_sum_to_one_in_every_frame(split: tuple[int, int, int]) -> None:
    """Segment i renders 1 in channel i and 0 in the others, so the channels hold the weights."""
    segments = split_clip(*split)
    carried, parts = None, []
    for segment, rendered in zip(segments, torch.eye(len(segments), dtype=torch.float64), strict=True):
        latents = blend(carried, rendered.reshape(1, -1, 1, 1).repeat(segment.stop - segment.start, 1, 1, 1))
        carried = latents[segment.settled - segment.start :]
        parts.append(latents[: segment.settled - segment.start, :, 0, 0])
    weights = torch.cat(parts)
    assert weights.shape == (split[0], len(segments)) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(split[0], dtype=torch.float64), rtol=0, atol=1e-15)


@settings(deadline=None)
@given(st.integers(1, 40))
def test_the_ramp_is_linear_and_leaves_neither_side_out(overlap: int) -> None:
    steps = torch.tensor([0.0, *ramp(overlap), 1.0], dtype=torch.float64).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / (overlap + 1)))


def test_nothing_shared_is_nothing_blended() -> None:
    latents = torch.randn(3, 4, 2, 2)
    assert blend(None, latents) is latents
    assert blend(latents[:0], latents) is latents


@pytest.mark.parametrize(("segment", "overlap"), [(0, 0), (-3, 0), (2, 1), (11, 4), (12, -1)])
def test_impossible_splits_are_refused(segment: int, overlap: int) -> None:
    with pytest.raises(PoseCrafterError) as caught:
        check_split(segment, overlap)
    assert caught.value.hint
    with pytest.raises(PoseCrafterError):
        split_clip(5, segment, overlap)


@given(splits())
def test_taken_one_by_one_the_segments_are_those_of_the_whole_clip(split: tuple[int, int, int]) -> None:
    walked, segments = Split(*split), split_clip(*split)
    for number, segment in enumerate(segments):
        assert walked.num_left() == len(segments) - number
        assert walked.settle() == segment
    assert not walked.num_left()


@given(splits(), st.lists(st.integers(0, 3), max_size=6), st.sets(st.integers(0, 9)))
def test_segments_that_become_shorter_settle_every_frame_once_and_another_run_can_follow(
    split: tuple[int, int, int], before: list[int], after: set[int]
) -> None:
    """before: how often memory runs out before the segment of that number is done; after: in which ones also after."""
    walked, followed, settled = Split(*split), Split(*split), []
    for number in range(1000):
        adjustments = []
        for _ in range(before[number] if number < len(before) else 0):
            length = walked.upcoming().stop - walked.start
            adjustment = walked.shorten("memory ran out")
            assert (adjustment is None) == (length == 1)
            if adjustment is not None:
                adjustments.append(adjustment)
                assert adjustment["frame"] == walked.start and walked.upcoming().stop - walked.start <= length // 2
        segment = walked.settle()
        settled += range(segment.start, segment.settled)
        if number in after and (adjustment := walked.shorten("memory ran out")):
            adjustments.append(adjustment)
        assert followed.settle(adjustments) == segment
        if not walked.num_left():
            break
    assert settled == list(range(split[0]))


def test_a_joint_render_becomes_segments_that_share_what_they_can() -> None:
    split = Split(13, None, 4)
    assert split.shorten("no") == {"frame": 0, "segment": 6, "overlap": 2, "reason": "no"}
    assert split.num_left() == len(split_clip(13, 6, 2)) and split.settle() == split_clip(13, 6, 2)[0]
    assert split.shorten("no") == {"frame": 3, "segment": 3, "overlap": 1, "reason": "no"}
    assert split.shorten("no") == {"frame": 3, "segment": 1, "overlap": 0, "reason": "no"}
    assert split.shorten("no") is None
