"""What a loop takes anew from memory: torch's operations are watched, those within networks are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posecrafter_rt.engines import Engine

READS = ("aten._local_scalar_dense.default",)  # of a number by Python: `item`, `bool`, for which a GPU is waited for
MAKES = ("aten.lift_fresh.default",)  # a tensor out of Python's numbers, which is made before torch is asked


class Allocations(TorchDispatchMode):
    """Within it, the operations that return memory which no argument has, and those that wait for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []
        self.read: list[str] = []
        self._is_watching = True

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What happens within is not noted."""
        self._is_watching = False
        try:
            yield
        finally:
            self._is_watching = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if self._is_watching:
            self.made += [str(func)] * (len(_storages(result) - given) + (str(func) in MAKES))
            self.read += [str(func)] * (str(func) in READS)
        return result

    def clear(self) -> None:
        self.made.clear()
        self.read.clear()


def _storages(things: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(things) if isinstance(leaf, Tensor)}


class Unwatched:
    """An engine that is free to allocate."""

    def __init__(self, engine: Engine, allocations: Allocations) -> None:
        self.engine, self.spec, self.device, self.allocations = engine, engine.spec, engine.device, allocations
        self.has_own_threads = engine.has_own_threads

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        with self.allocations.elsewhere():
            return self.engine(**inputs)

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        return self.engine.swap_weights(tensors)
