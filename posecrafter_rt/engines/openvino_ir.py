"""Networks as OpenVINO's IR: weights by their parameter names, and writing files.

Layer 4.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posecrafter_rt.engines.openvino_weights import SharedWeights

if TYPE_CHECKING:
    import openvino


def constants(model: Any) -> dict[str, Any]:
    """Return the network's constants by name; weights have their parameters' names."""
    return {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}


def replace_constants(model: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Give the weights of these names other values, in place; the model then refers to the arrays' memory."""
    from openvino import opset13

    for name, node in constants(model).items() if arrays else ():
        if name in arrays:
            constant = opset13.constant(arrays[name], shared_memory=True)
            constant.set_friendly_name(name)
            constant.output(0).get_tensor().set_names(node.output(0).get_tensor().get_names())
            node.output(0).replace(constant.output(0))


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether float32 arrays are equal in shape and every bit: 0.0 is not -0.0, a NaN equals itself."""
    return np.array_equal(first.view(np.int32), second.view(np.int32))


def save_ir(
    core: openvino.Core, source: Path, path: Path, weights: Mapping[str, np.ndarray], apart: Container[str],
    shared: SharedWeights,
) -> tuple[set[str], int]:  # fmt: skip
    """Write ONNX as IR with float32 weights, these in `shared`.

    Those whose names are in `apart` are written as zeros, of which the file holds each shape once.
    A full disk may only show when a file is closed.

    Args: weights: by the names of their parameters, as they were exported.
    Returns: the names of those weights of which the IR holds every bit, or zeros in their place; and its constants'
        number of bytes.
    """
    import openvino

    def held(model: Any, expected: Mapping[str, np.ndarray]) -> set[str]:
        stored = {name: node.data for name, node in constants(model).items() if name in expected}
        return {name for name, array in stored.items() if same_bits(array, expected[name])}

    try:
        model = core.read_model(source)
        found = held(model, weights)
        zeros = {name: np.zeros_like(weights[name]) for name in found if name in apart}
        replace_constants(model, zeros)
        openvino.save_model(model, path, compress_to_fp16=False)
        num_bytes = shared.add(path)
        return found & held(core.read_model(path, shared.path), {**weights, **zeros}), num_bytes
    except RuntimeError as error:
        needed = sum(file.stat().st_size for file in source.parent.glob(f"{source.stem}.*"))
        if shutil.disk_usage(path.parent).free < needed:  # OpenVINO does not pass the reason on
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
