"""Trace networks with torch.export, dynamic in the free dimensions of their specs, for ONNX and AOTInductor.

Layer 4.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from posecrafter_rt.export.shapes import random_inputs, split_dim
from posecrafter_rt.spec import Architecture, NetworkSpec, TensorSpec


def trace(module: nn.Module, spec: NetworkSpec, arch: Architecture) -> ExportedProgram:
    """Trace one network of `models.networks`, in evaluation mode, in its parameters' dtype and on their device.

    Its forward takes `spec.inputs` in order. With a size in the architecture, fewer dimensions are symbols: faster.
    """
    sizes = {
        "frames": 4,
        "groups": 2,
        "steps": 3,
        "window": 3,
        "height": 3 * arch.size_multiple,
        "width": 2 * arch.size_multiple,
    }
    like = next(module.parameters())
    inputs = [tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
              for tensor in random_inputs(spec, sizes).values()]  # fmt: skip
    shapes = _dynamic_shapes(module, spec, arch)
    with torch.no_grad(), quiet():
        return torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, strict=False)


def _dynamic_shapes(module: nn.Module, spec: NetworkSpec, arch: Architecture) -> tuple[Any, ...]:
    """Return torch.export's description of the free dimensions, in the structure of the module's forward.

    Height and width are multiples of one unit, so that halving them is exact. Frames, groups and steps are left to the
    tracer: diffusers tests frames ≥ 64 (for a memory layout that ONNX does not have), and the tracer would refuse that
    for a named dimension.
    """
    units: dict[str, Any] = {}

    def dimension(dim: str) -> Any:
        symbol, divisor = split_dim(dim)
        if symbol not in ("height", "width"):
            return torch.export.Dim.DYNAMIC
        unit = units.setdefault(symbol, torch.export.Dim(f"{symbol}_units"))
        factor = arch.size_multiple // divisor
        return unit if factor == 1 else factor * unit

    def tensor_dims(tensor: TensorSpec) -> dict[int, Any]:
        return {axis: dimension(dim) for axis, dim in enumerate(tensor.dims) if isinstance(dim, str)}

    dims = [tensor_dims(tensor) for tensor in spec.inputs]
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    num_named = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
    return (*dims[:num_named], tuple(dims[num_named:])) if num_named < len(dims) else tuple(dims)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's messages about packages that are not needed and about its own deprecations."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
