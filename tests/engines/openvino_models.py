"""What tests of the OpenVINO operations share: numbers, constants of them, and what becomes of a small model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as op
from torch import Tensor

from posecrafter_rt.engines import openvino_operations as operations


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def constant(values: Tensor) -> Any:
    return op.constant(values.numpy())


def parameter(values: Tensor) -> Any:
    """An input of the shape of these."""
    return op.parameter(list(values.shape), np.float32)


def reshaped(value: Any, *shape: int) -> Any:
    return op.reshape(value, np.array(shape), special_zero=False)


def convolved(
    pixels: Any, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int | None = None
) -> Any:
    """A convolution, its bias as ONNX brings it. padding: None keeps the size, at stride 1."""
    pads = [weight.shape[-1] // 2 if padding is None else padding] * 2
    result = op.convolution(pixels, constant(weight), [stride] * 2, pads, pads, [1, 1])
    return result if bias is None else op.add(result, reshaped(constant(bias), 1, len(bias), 1, 1))


def whole(channels: int, of: int) -> int:
    """So many channels, or as many more as whole vectors or panels have."""
    return -(-channels // of) * of


def kinds(model: openvino.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


def compiled(model: openvino.Model, **properties: Any) -> Any:
    core = openvino.Core()
    operations.extend(core)
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **properties})


def infer(request: Any, *inputs: Tensor) -> list[Tensor]:
    """What a compiled model, or a request of one, gives, which does not change with its next call."""
    given = [values.numpy() for values in inputs]
    outputs = request.infer(given) if hasattr(request, "infer") else request(given)
    return [torch.from_numpy(values.copy()) for values in outputs.values()]


def run(model: openvino.Model, *inputs: Tensor, num_threads: int = 2) -> list[Tensor]:
    """The outputs of a model."""
    return infer(compiled(model, INFERENCE_NUM_THREADS=num_threads), *inputs)
