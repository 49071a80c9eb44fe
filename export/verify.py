"""Prove an export: compare ONNX Runtime with PyTorch, at several frame counts and sizes.

Layer 4: ONNX Runtime's CPU provider in float32; it inlines our functions itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.spec import Architecture, NetworkSpec

TOLERANCE = 1e-4  # of the largest absolute value of the output


def default_cases(arch: Architecture) -> list[dict[str, int]]:
    """Return sizes other than those traced: one frame, many, two groups, and other heights and widths if free."""
    unit = arch.size_multiple
    cases = [(1, 1, 1, 1, 1), (7, 1, 4, 2, 1), (16, 1, 2, 1, 2), (4, 2, 3, 1, 3), (65, 1, 1, 1, 1)]
    return [
        dict(zip(("frames", "groups", "steps", "window", "height", "width"),
                 (frames, groups, steps, steps + 1, *(arch.size or (height * unit, width * unit))), strict=True))
        for frames, groups, steps, height, width in cases
    ]  # fmt: skip


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return max |result − expected| / max |expected|; infinite if shapes differ or either is not finite.

    Even where both are NaN: such an output proves nothing.
    """
    if result.shape != expected.shape or not all(bool(tensor.isfinite().all()) for tensor in (result, expected)):
        return float("inf")
    return float((result.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def verify_network(path: Path, module: nn.Module, spec: NetworkSpec, cases: Iterable[Mapping[str, int]]) -> float:
    """Compare an exported network with its module on random inputs.

    Args: path: of the ONNX file; module: float32; cases: sizes as `resolve_shape` takes them.
    Returns: the largest relative error over outputs and cases.
    Raises: PoseCrafterError if it exceeds TOLERANCE; the message names network, output and sizes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about unused initialisers
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for case in cases:
        inputs = random_inputs(spec, case, seed=1)
        with torch.no_grad():
            expected = module(*inputs.values())
        results = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for output, result, tensor in zip(spec.outputs, results, expected, strict=True):
            error = relative_error(torch.from_numpy(result), tensor)
            if error > TOLERANCE:
                raise PoseCrafterError(
                    f"the exported {spec.name} differs from PyTorch: {output.name} by {error:.1e} at {dict(case)}",
                    hint="report it with the versions that `posecrafter-rt doctor` prints",
                )
            worst = max(worst, error)
    return worst
