"""CUDA graphs: the launches of one network at one set of input shapes, recorded once and then replayed.

Layer 4: `Recorder` is for networks that torch runs; `tensorrt_runtime`, which manages its own memory, uses `recording`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posecrafter_rt.errors import first_line

KEPT_SHAPES = 4  # a clip's, the reference's, and those of a second clip

log = logging.getLogger(__name__)

Network = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Shapes = tuple[tuple[int, ...], ...]


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Record into `graph` what is launched in the block. After an error, networks can run, and others be recorded.

    Alone, `torch.cuda.graph` then leaves the stream that it records on current, and the allocator of torch before 2.13
    goes on as if it were being recorded: it refuses to free what it caches. (Before 2.14 it also keeps the pool.)
    pool: see `Recorder`; stream: the one to record on; None: torch's own.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool  # so that it is known what to end
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            yield
    except BaseException:
        graph.reset()  # first: torch 2.14 itself ends what it began, and no more than once
        with suppress(RuntimeError, AttributeError):  # it had ended; torch 2.7 has no function of this name
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream to record on: one for each GPU, because a pool's memory serves only one stream.

    torch's own belongs to the GPU that was current when it was first needed.
    """
    return torch.cuda.Stream(device)


class Recording(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]


class Recorder:
    """Runs a network; from the second call with the same shapes on, it replays recorded launches.

    The first call with new shapes is not recorded: it compiles kernels and fills caches, which a recording must not do.
    The next replay overwrites what a replay returned. A network that cannot be recorded is never tried again.
    max_pixels: of the first input, over all frames. Beyond it nothing is recorded: the GPU is then busy for longer than
        the processor needs to launch the next kernel, and a recording would only hold memory.
    pool: torch's handle of memory that recorders share for what lives within a replay. They must not replay at the same
        time, and the replay of one may overwrite what another returned that was recorded later.
    """

    def __init__(self, name: str, network: Network, max_pixels: int, pool: Any = None) -> None:
        self.name, self.network, self.max_pixels, self.pool = name, network, max_pixels, pool
        self._recordings: OrderedDict[Shapes, Recording | None] = OrderedDict()
        self._records = True

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the network. inputs: on one device, in the order of the network's parameters."""
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        if not self._records or not self.is_recorded(inputs[0]):
            return self.network(inputs)
        if shapes not in self._recordings:
            self._recordings[shapes] = None
            if len(self._recordings) > KEPT_SHAPES:
                self._recordings.popitem(last=False)
            return self.network(inputs)
        self._recordings.move_to_end(shapes)
        recording = self._recordings[shapes] or self._record(inputs)
        if recording is None:
            return self.network(inputs)
        self._recordings[shapes] = recording
        for memory, given in zip(recording.inputs, inputs, strict=True):
            memory.copy_(given)
        recording.graph.replay()
        return recording.outputs

    def is_recorded(self, first: Tensor) -> bool:
        """Whether a first input (F, C, h, w) is on a GPU and small enough for a recording to help."""
        return first.is_cuda and first.numel() // first.shape[1] <= self.max_pixels

    def _record(self, inputs: Sequence[Tensor]) -> Recording | None:
        graph, memory = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        try:
            with recording(graph, self.pool, _stream(memory[0].device)):
                outputs = list(self.network(memory))
        except RuntimeError as error:
            log.warning("%s runs without a CUDA graph: %s", self.name, first_line(error))
            self._records = False
            return None
        return Recording(graph, memory, outputs)
