"""How much memory a clip takes and how much is free: the choice of `segment="auto"`, and advice when memory runs out.

Layer 5.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import cv2
import torch

from posecrafter_rt.errors import PoseCrafterError, out_of_memory
from posecrafter_rt.machine import available_bytes, return_freed_memory
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.segments import SegmentChoice, least_segment
from posecrafter_rt.spec import Architecture

# The rest is for what does not grow with a segment, and for gaps that an allocator cannot use.
USED_SHARE = 0.8
# A clip's segments have at most two lengths, and a backend may keep the memory of one while it runs the other.
KEPT_LENGTHS = 2
# The U-Net's peak is the render's. There a transformer block of the widest level holds this many times that level's
# channels at once: 16 in the feed-forward (8, and 4 and 4 once gated), the rest around it.
LEVEL_COPIES = 24
# The same if blocks process their frames in parts: only their inputs, their outputs and what the skip connections keep.
# Counted in this unit: 6 in the embedded base, 9 in Stable Diffusion 1.5, with GroupNorm's statistics per frame.
COPIES_IN_PARTS = 10

IN_SEGMENTS = "free some memory, or use +insertion or +editing, which can be rendered in segments"
LOAD_ADVICE = "free some memory, or build the engine with a --precision of fewer bits"
STREAM_ADVICE = "free some memory, or open the stream with fewer steps or a smaller window"

log = logging.getLogger(__name__)


class InParts(NamedTuple):
    """What a clip takes if blocks process `tokens_at_once` tokens at a time, which is exact to rounding.

    per_frame: bytes of a frame. of_part: bytes that the part being processed takes besides.
    """

    tokens_at_once: int
    per_frame: int
    of_part: int


class Room(NamedTuple):
    """The memory that there is to render in, in bytes.

    free: None if the system does not say. reserved: for networks that are not in memory yet, or whose memory counts as
        free. per_frame: of a jointly rendered frame.
    most: how many frames the engine takes at once, the inserted reference included; None: any number.
    lighter: returns advice for the case that the networks alone hardly fit; None: nothing is known to help.
    in_parts: what a clip takes in parts; None: the engine cannot do that.
    """

    free: int | None
    reserved: int
    per_frame: int
    most: int | None = None
    lighter: Callable[[], str] | None = None
    in_parts: InParts | None = None

    def fitting(self, kept_lengths: int = 1) -> int:
        """Estimate how many frames can be rendered jointly, not counting the inserted reference.

        kept_lengths: for how many segment lengths the backend keeps memory.
        """
        return max(0, int(self._usable() / (self.per_frame * kept_lengths)) - 1)

    def fitting_in_parts(self) -> int:
        """Return the same if blocks process the frames in parts; `in_parts` must not be None."""
        assert self.in_parts is not None
        return max(0, int((self._usable() - self.in_parts.of_part) / self.in_parts.per_frame) - 1)

    def _usable(self) -> float:
        assert self.free is not None
        return self.free * USED_SHARE - self.reserved


def free_bytes(device_type: str) -> int | None:
    """Return the memory of `cuda` or `cpu` that this process may still take; None if the system does not say."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0] + _cached_bytes(is_for_recordings=False)
    return available_bytes()


def recorded_bytes() -> int:
    """Return what recorded CUDA graphs hold on the current GPU beside tensors: the memory that their replays write to.

    torch counts none of it as allocated once a graph has been recorded. To list torch's memory takes milliseconds, so
    that is done anew only if torch's counts are others than before: a recording takes memory, and its outputs stay.
    """
    return _recorded_bytes(torch.cuda.current_device(), torch.cuda.memory_reserved(), torch.cuda.memory_allocated())


@lru_cache(maxsize=1)
def _recorded_bytes(device: int, reserved: int, allocated: int) -> int:
    return _cached_bytes(is_for_recordings=True)


def _cached_bytes(is_for_recordings: bool) -> int:
    """Return the bytes on the current GPU that torch holds without a tensor in them.

    A CUDA graph's pool serves its recordings only. is_for_recordings: count such pools, else what serves any tensor.
    """
    segments, here = torch.cuda.memory_snapshot(), torch.cuda.current_device()  # those of any GPU
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments if segment["device"] == here
               and (tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)) == is_for_recordings)  # fmt: skip


def frame_bytes(
    arch: Architecture, size: tuple[int, int], groups: int, element_bytes: int = 4, copies: int = LEVEL_COPIES
) -> int:
    """Estimate how many bytes a frame takes in a joint render.

    They hold its pose embedding (float32), the ControlNet residuals, the deep features if the engine has them, and what
    the U-Net computes with them.
    Args: size: (height, width) in pixels. groups: 2 with guidance; each pass then has a copy of the embedding, beside
        the original. element_bytes: of the type that runs inside. copies: how many times the widest level counts,
        `LEVEL_COPIES` or `COPIES_IN_PARTS`.
    """
    positions = size[0] // arch.vae_scale_factor * (size[1] // arch.vae_scale_factor)
    kept = (*arch.residuals, arch.mid_residual, (arch.deep_channels or 0, 1))
    levels = [channels * positions // scale**2 for channels, scale in kept]
    embeddings = arch.pose_channels * positions * (groups if groups == 1 else groups + 1)
    return 4 * embeddings + element_bytes * groups * (sum(levels) + copies * max(levels))


def choose_segment(room: Room, num_frames: int, overlap: int) -> SegmentChoice:
    """Choose the whole clip if it fits, at once or else in parts, which is exact to rounding. Otherwise choose the
    longest segments that fit, or the shortest possible ones.

    No segment is longer than the engine takes beside the inserted reference. If that is too short for `overlap`,
    segments share fewer frames.
    Raises: PoseCrafterError if the system does not say how much memory is free.
    """
    if room.free is None:
        raise PoseCrafterError("this system does not say how much memory is free", "give a number: --segment 48")
    free = f"{_mb(room.free)} that are free, less {1 - USED_SHARE:.0%}"
    if room.reserved:
        free += f" and {_mb(room.reserved)} for the networks"
    facts = f"at {_mb(room.per_frame)} a frame in {free}"
    most = num_frames if room.most is None else room.most - 1
    if num_frames <= min(room.fitting(), most):
        return SegmentChoice(max(num_frames, least_segment(overlap)), overlap, f"the whole clip fits, {facts}")
    if room.in_parts is not None and num_frames <= min(room.fitting_in_parts(), most):
        at_once, per_frame, _ = room.in_parts
        reason = f"the whole clip fits in parts of {at_once} tokens, at {_mb(per_frame)} a frame in {free}"
        return SegmentChoice(max(num_frames, least_segment(overlap)), overlap, reason, at_once)
    if room.most is not None:
        overlap = min(overlap, most // 3)
    fitting, least = room.fitting(KEPT_LENGTHS), least_segment(overlap)
    if most < min(num_frames, fitting):
        reason = f"the engine takes {room.most} frames at once, the reference among them"
        return SegmentChoice(max(most, least), overlap, reason)
    facts += ", with room for segments of two lengths"
    if fitting < least:
        reason = f"not even {least} frames are sure to fit, {facts}; there are no shorter segments"
        if (lighter := _lighter(room)) is not None:
            reason += f", and {lighter}"
        return SegmentChoice(least, overlap, reason)
    return SegmentChoice(fitting, overlap, f"{fitting} frames fit, {facts}")


def warn_unless_fits(room: Room, num_frames: int, options: RenderOptions) -> None:
    """Warn if a clip, rendered jointly, will hardly fit. It is tried all the same, because this is an estimate."""
    if room.free is not None and num_frames > room.fitting():
        advice = "render it in segments: --segment auto" if options.inserts else IN_SEGMENTS
        advice = _lighter(room) or advice
        log.warning("%d frames jointly take about %s, and %s are free: %s", num_frames,
                    _mb(room.per_frame * (num_frames + 1) + room.reserved), _mb(room.free), advice)  # fmt: skip


def _lighter(room: Room) -> str | None:
    """Return advice if the networks alone hardly fit and a lighter engine is known, else None."""
    if room.free is None or room.lighter is None or room.reserved <= room.free * USED_SHARE:
        return None
    return f"the networks alone take most of that: {room.lighter()}"


@contextmanager
def explained(options: RenderOptions | str) -> Iterator[None]:
    """Turn what torch and other libraries raise when memory runs out into OutOfMemory, with advice.

    options: a render's, which tell what advice it needs, or the advice itself.
    """
    try:
        yield
    except (MemoryError, RuntimeError, cv2.error) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = out_of_memory(error, options if isinstance(options, str) else _advice(options))
        if known is None:
            raise
        raise known from error


def let_go() -> None:
    """Free unused memory: tensors that an error's traceback held in a reference cycle, torch's cache on a GPU, and what
    the C library keeps.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return_freed_memory()


def _advice(options: RenderOptions) -> str:
    """Return the advice for a render that cannot go on with shorter segments."""
    if not options.inserts:
        return IN_SEGMENTS
    return "free some memory and run the same command again, or build the engine with a smaller --size"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
