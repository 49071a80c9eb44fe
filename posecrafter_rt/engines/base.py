"""The Engine protocol: named tensors in, named tensors out; the runtime above knows no backend.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

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
