"""One segment ahead: it is sampled in a thread while the frames of the one before are decoded and taken.

Layer 5: what is sampled, and whether it may be, is `avatar`'s to say.
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

Sampled = tuple[Tensor, SegmentReport]  # a segment's latents (F, 4, h, w), and its report


class _Stopped(Exception):
    """What is being sampled is no longer wanted."""


class Ahead:
    """At most one segment that is sampled in a thread. Its steps, its errors and itself come where the caller takes it, so
    that all is seen in the order in which it would be without.

    device: the networks'; on a GPU the thread has a stream of its own. None: nothing is sampled ahead.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device, self._is_on = device, device is not None
        is_gpu = device is not None and device.type == "cuda"
        # Of another priority than the engines' streams, so it is none of them: torch gives out a few for each, over and over.
        self._stream = torch.cuda.Stream(device, priority=-1) if is_gpu else None
        self._pool = ThreadPoolExecutor(1, THREAD)  # it has no thread yet
        self._future: Future[Sampled] | None = None
        self._steps: SimpleQueue[tuple[str, int, int] | None] = SimpleQueue()  # None: there are no more

    def start(self, sample: Callable[[OnStep], Sampled]) -> None:
        """Begin to sample in the thread, unless that has been given up; what was begun before must have been taken.

        sample: tells its steps, and ends at the next of them once nobody wants it any more.
        """
        if self._is_on:
            if self._stream is not None:  # what it reads may still be under way
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
        """Wait for what was begun, telling its steps.

        Returns: None where nothing was begun, and where memory ran out, which it might not have for one thing at a time:
            then nothing more is sampled ahead.
        Raises: whatever else `sample` raised.
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
            latents.record_stream(current)  # or the thread could be given its memory before it was read
        return latents, report

    def give_up(self) -> bool:
        """Sample nothing ahead any more: stop what was begun, and forget it. Returns: whether something was."""
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
            self._stream.synchronize()  # what it still reads may be let go of next
        return True

    def close(self) -> None:
        """Stop what was begun, and end the thread."""
        self._stop()
        self._pool.shutdown()
