"""How a long clip is cut into segments: index ranges and blend weights.

Layer 5: integers only.
"""

from __future__ import annotations

from typing import NamedTuple

from posecrafter_rt.errors import PoseCrafterError


class Segment(NamedTuple):
    """Frames [start, stop) of a clip that are rendered jointly.

    settled: frames [start, settled) are final once this segment is rendered; the next one shares [settled, stop).
    """

    start: int
    stop: int
    settled: int


class SegmentChoice(NamedTuple):
    """What `segment="auto"` became, and why, as the report says it."""

    segment: int
    reason: str


def check_split(segment: int, overlap: int) -> None:
    """Raises PoseCrafterError unless segments of at most `segment` frames can share `overlap` with each neighbour."""
    if segment < 1:
        raise PoseCrafterError(f"segments of {segment} frames", "give 1 or more")
    # Lengths are even, so a segment between two others has more than 2/3 of the length allowed; with at most a third
    # shared on each side, no frame lies in three of them.
    if not 0 <= overlap <= segment // 3:
        raise PoseCrafterError(
            f"segments of {segment} frames cannot share {overlap} with each neighbour",
            f"give an overlap of 0 to {segment // 3}, or segments of {least_segment(overlap)} frames or more",
        )


def least_segment(overlap: int) -> int:
    """Frames of the shortest segments that can share `overlap` with each neighbour."""
    return max(1, 3 * overlap)


def split_clip(num_frames: int, segment: int | None, overlap: int) -> list[Segment]:
    """Cut a clip into the fewest segments of at most `segment` frames, their lengths as even as can be.

    Even lengths cost no more than full ones with a short rest (the shared frames are as many), leave no segment that
    has little to attend to, and give the networks two batch sizes at most.
    Args: num_frames: 1 or more; segment: None: the whole clip is one. overlap: frames that neighbours share.
    Returns: the segments in order: each but the last ends `overlap` frames after the next begins.
    Raises: PoseCrafterError for what `check_split` refuses.
    """
    if segment is None:
        return [Segment(0, num_frames, num_frames)]
    check_split(segment, overlap)
    count = 1 if num_frames <= segment else -((overlap - num_frames) // (segment - overlap))  # rounded up
    shortest, longer = divmod(num_frames + (count - 1) * overlap, count)
    segments, start = [], 0
    for index in range(count):
        stop = start + shortest + (index < longer)
        settled = stop - overlap if index < count - 1 else stop
        segments.append(Segment(start, stop, settled))
        start = settled
    return segments


def ramp(overlap: int) -> list[float]:
    """Weights of the later segment in the frames that it shares: 1/(o+1), ..., o/(o+1); the earlier has the rest."""
    return [(index + 1) / (overlap + 1) for index in range(overlap)]
