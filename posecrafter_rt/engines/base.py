"""The Engine protocol: named tensors in, named tensors out; the runtime above knows no backend.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from posecrafter_rt.errors import CheckpointError, ShapeError
from posecrafter_rt.export.shapes import split_dim
from posecrafter_rt.machine import one_openmp_thread
from posecrafter_rt.spec import Architecture, NetworkSpec

if TYPE_CHECKING:
    from posecrafter_rt.models.loading import PoseModel

# int8: products of linear maps, convolutions and attention are in 8 bits, attention's means of values in 16. Their
# inputs, their outputs and everything else are float32.
Precision = Literal["fp32", "bf16", "fp16", "int8"]
# The precisions that are element types of tensors; int8 is not one.
TORCH_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# They run once per prompt or schedule. In 16 bits, a timestep near 1000 would lose the phase of its sinusoids entirely.
FULL_PRECISION = ("text_encoder", "prompt_kv", "time_tables")
# Activations of Stable Diffusion's VAE are known to leave float16's range.
BEYOND_FP16 = ("vae", "vae_encoder", "vae_decoder")  # the component, and its networks
KEPT_KINDS = 64  # combinations of input types and shapes that each network remembers as valid
# The types that `spec` names, at the boundary; "kept" tensors may be in another type if the engine has them in it.
DTYPES = {"float": torch.float32, "kept": torch.float32, "int64": torch.int64, "bool": torch.bool}
# Ends reasons that only a cache would remove.
CACHE_HINT = "set POSECRAFTER_CACHE to a folder that this user can write to and others cannot"
Progress = Callable[[str], None]  # called with the name of each stage as it begins


def inner_precision(name: str, precision: Precision) -> Precision:
    """Return a network's precision inside an engine: fp32 for FULL_PRECISION, and instead of fp16 for BEYOND_FP16."""
    in_full = name in FULL_PRECISION or (precision == "fp16" and name in BEYOND_FP16)
    return "fp32" if in_full else precision


def untyped_reason(precision: Precision) -> str | None:
    """Return why a backend with one type for weights and activations cannot run in this precision, or None."""
    return None if precision in TORCH_DTYPES else f"it has no {precision}; use fp32, bf16 or fp16"


class Engine(Protocol):
    """One network that can run.

    Inputs and outputs are tensors on the engine's device, with the names, shapes and types of `spec`, whatever runs
    inside. The next call of the same engine may overwrite outputs; a call of any engine may overwrite pictures, pose
    embeddings and the outputs of a stream's U-Net. To keep an output, copy it. If no frame is the reference, a stream's
    networks may leave out the outputs that only the reference has, `new_keyframe_kv_…`.
    has_own_threads: whether it computes on the processor's cores with threads that are not torch's.
    """

    spec: NetworkSpec
    device: torch.device
    has_own_threads: bool

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once; move inputs from other devices. Raises ShapeError if a name, type or shape is not the spec's."""
        ...

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Replace those of `tensors` that this network holds (names `unet.…`, `controlnet.…`, in folded form).

        Returns the names that it holds. Raises CheckpointError if a shape differs, or if a value is beyond the range of
        the type that the engine stores it in; then nothing has changed.
        """
        ...


class Backend(Protocol):
    """A way to build and load engines.

    libraries: the distributions whose versions an engine is bound to. holds_tuned_apart: whether what tuning changes
    lies in a file of its own, so that `refit` needs nothing of the base.
    """

    name: str
    libraries: tuple[str, ...]
    holds_tuned_apart: bool

    def device(self) -> dict[str, str]:
        """Return what an engine is built for: `type`, cpu or cuda, and the `name` of the processor or GPU."""
        ...

    def unsupported_reason(self, precision: Precision) -> str | None:
        """Return why this backend cannot run here in this precision, or None."""
        ...

    def num_missing(self, model: PoseModel, arch: Architecture, precision: Precision) -> int:
        """Count the blobs that a build needs and the user's cache lacks, without reading any; `model` is folded."""
        ...

    def build(
        self, model: PoseModel, arch: Architecture, folder: Path, precision: Precision, progress: Progress
    ) -> None:
        """Write everything that `load` needs into `folder` (which exists and is empty); `model` is tuned and folded."""
        ...

    def refit(
        self, source: Path, folder: Path, model: PoseModel, arch: Architecture, precision: Precision, progress: Progress
    ) -> None:
        """Write into `folder` those files that `build` would write otherwise than it wrote them into `source`.

        All others are taken from there. `source`, which stays as it is, is of another checkpoint. The base, the
        precision, the device and all versions are the same: `refit.check_source` has checked that.
        Args: model: if `holds_tuned_apart`, only `PoseModel.tuned` has values, and it is the same in both. Else all
            weights have, and those that differ are replaced, also those that only the other checkpoint had tuned.
        Raises: EngineFolderError if more than weights differs; BackendUnavailable if it cannot be done here.
        """
        ...

    def load(self, networks_folder: Path, arch: Architecture, precision: Precision, cache: Path) -> dict[str, Engine]:
        """Make every network of `build` runnable. cache: a folder for compiled code; it may be deleted at any time."""
        ...


def beside(engine: Engine) -> AbstractContextManager[None]:
    """Keep torch off the cores during the block if the engine has threads of its own: see `one_openmp_thread`."""
    torch.get_num_threads()  # a thread's first call sets its number of threads; in the block that would undo ours
    return one_openmp_thread() if engine.has_own_threads else nullcontext()


class InputChecker:
    """Checks a network's inputs against its contract; types and shapes that were valid once are not checked again."""

    def __init__(self, spec: NetworkSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._names = [tensor.name for tensor in spec.inputs]
        self._right: set[tuple[tuple[str, torch.dtype, torch.Size], ...]] = set()

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the inputs on the device, in the contract's order, in any layout. Raises: see `check_inputs`."""
        kinds = tuple((name, tensor.dtype, tensor.shape) for name, tensor in inputs.items())
        if kinds not in self._right:
            check_inputs(self._spec, inputs)
            if len(self._right) >= KEPT_KINDS:
                self._right.clear()
            self._right.add(kinds)
        return [inputs[name].to(self._device) for name in self._names]


def check_inputs(spec: NetworkSpec, inputs: Mapping[str, Tensor]) -> None:
    """Raise ShapeError for a missing or unknown name, another element type, a dimension that differs or is empty, free
    dimensions that disagree between inputs (a backend might broadcast them), or frames that do not divide into groups.
    """
    names = [tensor.name for tensor in spec.inputs]
    if set(names) != set(inputs):
        raise ShapeError(
            f"{spec.name} takes {', '.join(names)}; it was given {', '.join(inputs)}", "give each of them by its name"
        )
    sizes: dict[str, int] = {}
    for expected in spec.inputs:
        given = inputs[expected.name]
        is_kept = expected.dtype == "kept"
        if not (given.is_floating_point() if is_kept else given.dtype == DTYPES[expected.dtype]):
            raise ShapeError(
                f"{spec.name}: {expected.name} is {given.dtype}, not {'floats' if is_kept else DTYPES[expected.dtype]}",
                "convert it before: tensor.to(dtype)",
            )
        if not _fits(expected.dims, given.shape, sizes):
            known = f" with {', '.join(f'{name} {size}' for name, size in sizes.items())}" if sizes else ""
            raise ShapeError(
                f"{spec.name}: {expected.name} is {tuple(given.shape)}, not {expected.dims}{known}",
                "give 1 or more in every dimension, and the same number wherever a name is the same",
            )
    if sizes.get("frames", 0) % sizes.get("groups", 1):
        raise ShapeError(
            f"{spec.name}: {sizes['frames']} frames do not divide into {sizes['groups']} groups",
            "give every group as many frames",
        )


def cast(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Convert floating-point tensors to another type; leave the others as they are."""
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


def to_boundary(spec: NetworkSpec, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Convert a network's outputs to the types that `spec` promises; "kept" outputs stay as they are."""
    return [tensor.float() if out.dtype == "float" else tensor
            for out, tensor in zip(spec.outputs, outputs, strict=True)]  # fmt: skip


def _fits(dims: Sequence[int | str], shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Whether a shape agrees with the spec and with the sizes known from earlier inputs; adds its own to `sizes`."""
    if len(dims) != len(shape):
        return False
    for dim, length in zip(dims, shape, strict=True):
        if isinstance(dim, int):
            expected = dim
        else:
            symbol, divisor = split_dim(dim)
            expected = sizes.setdefault(symbol, length * divisor) // divisor
        if length != expected or length == 0:
            return False
    return True


def fitting_weights(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of `tensors` that a network with parameters of these shapes holds.

    Raises: CheckpointError if a shape differs.
    """
    fitting = {name: tensor for name, tensor in tensors.items() if name in shapes}
    for name, tensor in fitting.items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}; the engine's is {tuple(shapes[name])}",
                                  "tune on the base that the engine was built from")  # fmt: skip
    return fitting
