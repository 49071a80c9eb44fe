"""Sample the next segment in a thread while the frames of the one before are decoded and taken.

Layer 5: `avatar_render` decides what is sampled, `avatar` whether it may be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch
from torch import Tensor

from posecrafter_rt.errors import OutOfMemory
from posecrafter_rt.runtime.memory import let_go
from posecrafter_rt.runtime.progress import OnStep
from posecrafter_rt.runtime.report import SegmentReport

THREAD = "posecrafter-ahead"

log = logging.getLogger(__name__)

Sampled = tuple[Tensor, SegmentReport]  # a segment's latents (F, 4, h, w) and its report


class _Stopped(Exception):
    """Raised in the thread once its segment is no longer wanted."""


class Ahead:
    """Samples at most one segment in a thread. `take` reports its steps, raises its errors and returns the segment, so
    the caller sees everything in the same order as if nothing were sampled ahead.

    device: of the networks; on a GPU the thread has a CUDA stream of its own. None: nothing is sampled ahead.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device, self._is_on = device, device is not None
        is_gpu = device is not None and device.type == "cuda"
        # torch hands out a few streams per priority in turn. With a priority of its own, this is none of the engines'.
        self._stream = torch.cuda.Stream(device, priority=-1) if is_gpu else None
        self._pool = ThreadPoolExecutor(1, THREAD)  # the thread starts with the first segment
        self._future: Future[Sampled] | None = None
        self._steps: SimpleQueue[tuple[str, int, int] | None] = SimpleQueue()  # None marks the end

    def start(self, sample: Callable[[OnStep], Sampled]) -> None:
        """Begin to sample a segment in the thread, unless that was given up. The one before must have been taken.

        sample: reports each step to its argument, which raises once the segment is no longer wanted.
        """
        if self._is_on:
            if self._stream is not None:  # its inputs may still be being computed
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            self._future = self._pool.submit(self._run, sample)

    def _run(self, sample: Callable[[OnStep], Sampled]) -> Sampled:
        try:
            if self._stream is None:
                return sample(self._tell)
            with torch.cuda.stream(self._stream):
                return sample(self._tell)
        finally:
            self._steps.put(None)

    def _tell(self, stage: str, step: int, steps: int) -> None:
        if not self._is_on:
            raise _Stopped
        self._steps.put((stage, step, steps))

    def take(self, told: OnStep) -> Sampled | None:
        """Wait for the segment that was begun, and report its steps to `told`.

        Returns: None if nothing was begun, or if memory ran out. It may suffice for one thing at a time, so nothing
            more is sampled ahead then.
        Raises: any other error of `sample`.
        """
        if self._future is None:
            return None
        for step in iter(self._steps.get, None):
            told(*step)
        if isinstance(self._future.exception(), OutOfMemory):
            self.give_up()
            let_go()
            return None
        latents, report = self._future.result()
        self._future = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            latents.record_stream(current)  # else the thread could reuse its memory before it is read
        return latents, report

    def give_up(self) -> bool:
        """Stop and forget the segment that was begun, and sample nothing more ahead. Returns: whether one was begun."""
        has_begun = self._stop()
        if has_begun:
            log.info("the rest of this render samples no segment while the one before is decoded")
        return has_begun

    def _stop(self) -> bool:
        future, self._future, self._is_on = self._future, None, False
        if future is None:
            return False
        wait([future])
        if self._stream is not None:
            self._stream.synchronize()  # the caller may now free what it still reads
        return True

    def close(self) -> None:
        """Stop the segment that was begun, and end the thread."""
        self._stop()
        self._pool.shutdown()
