"""The Engine protocol: named tensors in, named tensors out; the runtime above knows no backend.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from posecrafter_rt.errors import CheckpointError, ShapeError
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import Architecture, NetworkSpec

Precision = Literal["fp32", "bf16", "fp16"]
Progress = Callable[[str], None]  # told the name of each stage as it begins


class Engine(Protocol):
    """One network that can run.

    Inputs and outputs are float32 (or int64) tensors on the engine's device, named and shaped as `spec` says,
    whatever precision runs inside. Outputs may be reused by the next call of the same engine: keep a copy to keep one.
    """

    spec: NetworkSpec

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once. Raises ShapeError when a name or shape is not the spec's."""
        ...

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Replace those of `tensors` that this network holds (`unet.…`, `controlnet.…` names, folded form).

        Returns the names that it holds. Raises CheckpointError when a shape differs; then nothing has changed.
        """
        ...


class Backend(Protocol):
    """A way to build and load engines."""

    name: str

    def unsupported_reason(self, precision: Precision) -> str | None:
        """Why this backend cannot run here in this precision, or None."""
        ...

    def build(
        self, model: PoseModel, arch: Architecture, folder: Path, precision: Precision, progress: Progress
    ) -> None:
        """Write everything that `load` needs into `folder` (which exists and is empty); `model` is tuned and folded."""
        ...

    def load(self, networks_folder: Path, arch: Architecture, precision: Precision, cache: Path) -> dict[str, Engine]:
        """Make every network of `build` runnable. `cache`: a folder for compiled code that may be deleted at any time."""
        ...


def checked_inputs(spec: NetworkSpec, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs in the spec's order, contiguous.

    Raises: ShapeError for a missing or unknown name, another number of dimensions, or a fixed dimension that differs.
    """
    names = [tensor.name for tensor in spec.inputs]
    if set(names) != set(inputs):
        raise ShapeError(f"{spec.name} takes {', '.join(names)}; it was given {', '.join(inputs)}")
    for expected in spec.inputs:
        shape = inputs[expected.name].shape
        fits = len(shape) == len(expected.dims) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(expected.dims, shape, strict=True)
        )
        if not fits:
            raise ShapeError(f"{spec.name}: {expected.name} is {tuple(shape)}, not {expected.dims}")
    return [inputs[name].contiguous() for name in names]


def fitting_weights(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` that a network with parameters of these shapes holds.

    Raises: CheckpointError when a shape differs.
    """
    fitting = {name: tensor for name, tensor in tensors.items() if name in shapes}
    for name, tensor in fitting.items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; the engine's is {tuple(shapes[name])}",
                                  "tune on the base that the engine was built from")  # fmt: skip
    return fitting
