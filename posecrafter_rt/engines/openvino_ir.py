"""Networks as OpenVINO's IR: weights by their parameter names, and writing files.

Layer 4.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino


def constants(model: Any) -> dict[str, Any]:
    """Return the network's constants by name; weights have their parameters' names."""
    return {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}


def replace_constants(model: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Give the weights of these names other values, in place; a model saved then is as if exported with them."""
    from openvino import opset13

    for name, node in constants(model).items() if arrays else ():
        if name in arrays:
            constant = opset13.constant(arrays[name])
            constant.set_friendly_name(name)
            constant.output(0).get_tensor().set_names(node.output(0).get_tensor().get_names())
            node.output(0).replace(constant.output(0))


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether float32 arrays are equal in shape and every bit: 0.0 is not -0.0, a NaN equals itself."""
    return np.array_equal(first.view(np.int32), second.view(np.int32))


def save_ir(core: openvino.Core, source: Path, path: Path, replaced: Mapping[str, np.ndarray] = {}) -> Any:
    """Write ONNX or IR as IR with float32 weights, with `replaced` in place of its own; return it as read back.

    A full disk may only show when a file is closed.
    """
    import openvino

    try:
        model = core.read_model(source)
        replace_constants(model, replaced)
        openvino.save_model(model, path, compress_to_fp16=False)
        return core.read_model(path)
    except RuntimeError as error:
        needed = sum(file.stat().st_size for file in source.parent.glob(f"{source.stem}.*"))
        if shutil.disk_usage(path.parent).free < needed:  # OpenVINO does not pass the reason on
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
