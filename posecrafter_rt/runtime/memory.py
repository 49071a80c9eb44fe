"""What a clip takes and what is free: how `segment="auto"` chooses, and what is said when memory does not suffice.

Layer 5.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from posecrafter_rt.errors import PoseCrafterError, out_of_memory
from posecrafter_rt.machine import available_bytes, return_freed_memory
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.segments import SegmentChoice, least_segment
from posecrafter_rt.spec import Architecture

# The rest is for all that does not grow with a segment, and for what an allocator cannot use between two pieces.
USED_SHARE = 0.8
# Segments of a clip have two lengths at most, and a backend may keep what it allocated for one beside the other's.
KEPT_LENGTHS = 2
# In the U-Net, whose peak is the render's, a transformer block of the widest level has so many times that level's channels
# at once: 16 in the feed-forward (8, and 4 and 4 once gated), the rest around it.
LEVEL_COPIES = 24
# And so many where blocks go through their frames in parts: what they take in and give, and what the skips keep. Counted as
# those: 6 in the embedded base, 9 in Stable Diffusion 1.5, where GroupNorm's statistics are per frame.
COPIES_IN_PARTS = 10

IN_SEGMENTS = "free some memory, or use +insertion or +editing, which can be rendered in segments"

log = logging.getLogger(__name__)


class InParts(NamedTuple):
    """Blocks that do `tokens_at_once`, which is exact to rounding: bytes of a frame, and of what a part takes besides."""

    tokens_at_once: int
    per_frame: int
    of_part: int


class Room(NamedTuple):
    """What there is to render in, in bytes.

    free: None where the system does not say. reserved: for networks that are not in memory yet, or in what counts as free.
    per_frame: of a jointly rendered frame. most: frames that the engine takes at once, the inserted reference among them;
        None: any number. lighter: says what to do where the networks alone hardly fit; None: nothing is known to help.
    in_parts: what a clip takes then; None: the engine cannot.
    """

    free: int | None
    reserved: int
    per_frame: int
    most: int | None = None
    lighter: Callable[[], str] | None = None
    in_parts: InParts | None = None

    def fitting(self, kept_lengths: int = 1) -> int:
        """Frames that can be rendered jointly, by estimate; the inserted reference is not counted."""
        return max(0, int(self._usable() / (self.per_frame * kept_lengths)) - 1)

    def fitting_in_parts(self) -> int:
        """The same where blocks go through them in parts, which the engine can."""
        assert self.in_parts is not None
        return max(0, int((self._usable() - self.in_parts.of_part) / self.in_parts.per_frame) - 1)

    def _usable(self) -> float:
        assert self.free is not None
        return self.free * USED_SHARE - self.reserved


def free_bytes(device_type: str) -> int | None:
    """Memory of the device, `cuda` or `cpu`, that this process may still take; None where the system does not say."""
    if device_type == "cuda":
        segments = torch.cuda.memory_snapshot()  # torch's own; a CUDA graph's are for that graph alone
        cached = [segment["total_size"] - segment["allocated_size"] for segment in segments
                  if tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)]  # fmt: skip
        return torch.cuda.mem_get_info()[0] + sum(cached)
    return available_bytes()


def frame_bytes(
    arch: Architecture, size: tuple[int, int], groups: int, element_bytes: int = 4, copies: int = LEVEL_COPIES
) -> int:
    """About what a frame takes in a joint render.

    That is its pose embedding, which is float32, the ControlNet's residuals, the deep features where an engine has them,
    and what the U-Net computes with them.
    Args: size: (height, width) in pixels; groups: 2 with guidance, whose every pass has a copy of the embedding beside it;
        element_bytes: of the type that runs inside; copies: of the widest level, `LEVEL_COPIES` or `COPIES_IN_PARTS`.
    """
    positions = size[0] // arch.vae_scale_factor * (size[1] // arch.vae_scale_factor)
    kept = (*arch.residuals, arch.mid_residual, (arch.deep_channels or 0, 1))
    levels = [channels * positions // scale**2 for channels, scale in kept]
    embeddings = arch.pose_channels * positions * (groups if groups == 1 else groups + 1)
    return 4 * embeddings + element_bytes * groups * (sum(levels) + copies * max(levels))


def choose_segment(room: Room, num_frames: int, overlap: int) -> SegmentChoice:
    """The whole clip where it fits, at once or else in parts, which is exact; then the longest segments that do, or the
    shortest that there are.

    None is longer than what the engine takes beside the inserted reference: where that is too little for `overlap`, they
    share fewer frames.
    Raises: PoseCrafterError where the system does not say what is free.
    """
    if room.free is None:
        raise PoseCrafterError("this system does not say how much memory is free", "give a number: --segment 48")
    facts = f"at {_mb(room.per_frame)} a frame in {_mb(room.free)} that are free"
    most = num_frames if room.most is None else room.most - 1
    if num_frames <= min(room.fitting(), most):
        return SegmentChoice(max(num_frames, least_segment(overlap)), overlap, f"the whole clip fits, {facts}")
    if room.in_parts is not None and num_frames <= min(room.fitting_in_parts(), most):
        at_once, per_frame, _ = room.in_parts
        reason = f"the whole clip fits in parts of {at_once} tokens, at {_mb(per_frame)} a frame in {_mb(room.free)} that are free"
        return SegmentChoice(max(num_frames, least_segment(overlap)), overlap, reason, at_once)
    if room.most is not None:
        overlap = min(overlap, most // 3)
    fitting, least = room.fitting(KEPT_LENGTHS), least_segment(overlap)
    if most < min(num_frames, fitting):
        reason = f"the engine takes {room.most} frames at once, the reference among them"
        return SegmentChoice(max(most, least), overlap, reason)
    if fitting < least:
        reason = f"not even {least} frames are sure to fit, {facts}; there are no shorter segments"
        return SegmentChoice(least, overlap, reason)
    return SegmentChoice(fitting, overlap, f"{fitting} frames fit, {facts}")


def warn_unless_fits(room: Room, num_frames: int, options: RenderOptions) -> None:
    """Say in one line if a clip, rendered jointly, will hardly fit; it is tried all the same, for this is an estimate."""
    if room.free is not None and num_frames > room.fitting():
        advice = "render it in segments: --segment auto" if options.inserts else IN_SEGMENTS
        if room.lighter is not None and room.reserved > room.free * USED_SHARE:
            advice = f"the networks alone take most of that: {room.lighter()}"
        log.warning("%d frames jointly take about %s, and %s are free: %s", num_frames,
                    _mb(room.per_frame * (num_frames + 1) + room.reserved), _mb(room.free), advice)  # fmt: skip


@contextmanager
def explained(options: RenderOptions) -> Iterator[None]:
    """Turn what torch and other libraries raise when memory runs out into OutOfMemory, with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = out_of_memory(error, _advice(options))
        if known is None:
            raise
        raise known from error


def let_go() -> None:
    """Give back what is no longer used: tensors that an error's traceback held in a cycle, torch's cache on a GPU, and
    the C library's.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return_freed_memory()


def _advice(options: RenderOptions) -> str:
    """For where there are no shorter segments to go on with."""
    if not options.inserts:
        return IN_SEGMENTS
    return "free some memory and run the same command again, or build the engine with a smaller --size"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
