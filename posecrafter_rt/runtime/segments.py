"""How a long clip is cut into segments: index ranges and blend weights.

Layer 5: integers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypedDict

from posecrafter_rt.errors import PoseCrafterError


class Segment(NamedTuple):
    """Frames [start, stop) of a clip that are rendered jointly.

    settled: frames [start, settled) are final once this segment is rendered; the next one shares [settled, stop).
    """

    start: int
    stop: int
    settled: int


class Adjustment(TypedDict, total=False):
    """What had to change during a render, for its report, as JSON values.

    frame: the first one for which it holds. Beside it and `reason` there is what holds from then on: `segment` with
    `overlap`, or `precision`, or `tokens_at_once`. inversion: true if the inversion was done in that precision, too.
    """

    frame: int
    reason: str
    segment: int
    overlap: int
    precision: str
    tokens_at_once: int
    inversion: bool


class SegmentChoice(NamedTuple):
    """What `segment="auto"` became, the overlap that such segments allow, and the reason for the report.

    tokens_at_once: how many tokens a block processes at a time, if the whole clip fits only so; None: all.
    """

    segment: int
    overlap: int
    reason: str
    tokens_at_once: int | None = None

    def adjustments(self) -> list[Adjustment]:
        """Return what it changes beyond the options of a render, because free memory decided it."""
        if self.tokens_at_once is None:
            return []
        return [{"frame": 0, "tokens_at_once": self.tokens_at_once, "reason": "the whole clip fits only so"}]


def check_split(segment: int, overlap: int) -> None:
    """Raise PoseCrafterError unless segments of at most `segment` frames can share `overlap` with each neighbour."""
    if segment < 1:
        raise PoseCrafterError(f"segments of {segment} frames", "give 1 or more")
    # Lengths are nearly equal, so a segment between two others has more than 2/3 of the allowed length. With at most a
    # third shared on each side, no frame lies in three segments.
    if not 0 <= overlap <= segment // 3:
        raise PoseCrafterError(
            f"segments of {segment} frames cannot share {overlap} with each neighbour",
            f"give an overlap of 0 to {segment // 3}, or segments of {least_segment(overlap)} frames or more",
        )


def least_segment(overlap: int) -> int:
    """Return the length of the shortest segments that can share `overlap` frames with each neighbour."""
    return max(1, 3 * overlap)


def split_clip(num_frames: int, segment: int | None, overlap: int) -> list[Segment]:
    """Cut a clip into the fewest segments of at most `segment` frames, all of one length if they share any.

    So no segment has few frames to attend to, and networks that keep memory or code per length need it for only one.
    For this the first seams may share one frame more. If that would put a frame into three segments, or if none are
    shared, the first segments are one frame longer instead.
    Args: num_frames: 1 or more. segment: None: the whole clip is one. overlap: the fewest frames that neighbours share.
    Returns: the segments in order. Each but the last ends `overlap` frames, or one more, after the next begins.
    Raises: PoseCrafterError for what `check_split` refuses.
    """
    return list(_cut(num_frames, segment, overlap))


def _cut(num_frames: int, segment: int | None, overlap: int) -> Iterator[Segment]:
    count = _count_segments(num_frames, segment, overlap)
    shortest, longer = divmod(num_frames + (count - 1) * overlap, count)
    wider = 0  # seams that share one frame more
    if overlap and longer and 2 * (overlap + 1) <= shortest + 1:
        wider, shortest, longer = count - longer, shortest + 1, 0
    start = 0
    for index in range(count):
        stop = start + shortest + (index < longer)
        settled = stop - overlap - (index < wider) if index < count - 1 else stop
        yield Segment(start, stop, settled)
        start = settled


def _count_segments(num_frames: int, segment: int | None, overlap: int) -> int:
    if segment is None:
        return 1
    check_split(segment, overlap)
    return 1 if num_frames <= segment else -((overlap - num_frames) // (segment - overlap))  # rounded up


class Split:
    """The segments of a clip, one after another. If memory runs out, the remaining ones become shorter.

    segment, overlap: for the remaining segments; see `split_clip`. start: the first frame that is not settled.
    Cutting the rest of a clip gives the rest of its segments, so these three numbers are the whole state.
    """

    def __init__(self, num_frames: int, segment: int | None, overlap: int) -> None:
        self.num_frames, self.segment, self.overlap = num_frames, segment, overlap
        self.start = 0

    def num_left(self) -> int:
        """Return how many segments are left."""
        num_frames = self.num_frames - self.start
        return _count_segments(num_frames, self.segment, self.overlap) if num_frames else 0

    def upcoming(self) -> Segment:
        """Return the next segment."""
        segment = next(_cut(self.num_frames - self.start, self.segment, self.overlap))
        return Segment(*(self.start + frame for frame in segment))

    def settle(self, adjustments: Iterable[Adjustment] = ()) -> Segment:
        """Count the next segment as rendered. adjustments: those that another run made before or during it."""
        self._follow(adjustments)
        segment = self.upcoming()
        self.start = segment.settled
        self._follow(adjustments)
        return segment

    def _follow(self, adjustments: Iterable[Adjustment]) -> None:
        for adjustment in adjustments:
            if "segment" in adjustment and adjustment["frame"] == self.start:
                self.segment, self.overlap = adjustment["segment"], adjustment["overlap"]

    def shorten(self, reason: str) -> Adjustment | None:
        """Halve the length of the remaining segments, counted from the next one's, and share no more than that allows.

        Returns: None if no segment is left or the next one has a single frame.
        """
        length = self.upcoming().stop - self.start if self.num_left() else 0
        if length < 2:
            return None
        self.segment = length // 2
        self.overlap = min(self.overlap, self.segment // 3)
        return {"frame": self.start, "segment": self.segment, "overlap": self.overlap, "reason": reason}


def ramp(overlap: int) -> list[float]:
    """Return the later segment's weights in the shared frames: 1/(o+1), ..., o/(o+1). The earlier one has the rest."""
    return [(index + 1) / (overlap + 1) for index in range(overlap)]
