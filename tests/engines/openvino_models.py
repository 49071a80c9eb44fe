"""What tests of the OpenVINO operations share: numbers, constants of them, and what becomes of a small model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as op
from torch import Tensor
from torch.nn import functional

from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.engines.openvino_weights import weights_path

PIXELS = ("pixels to pixels", "pixels to tokens", "tokens to pixels", "tokens to tokens")  # by convolutions
LAYOUTS = (*PIXELS, "product", "gated", "feed-forward")
Shape = tuple[int, tuple[int, int], int, int]  # frames, height and width, input channels, panels of output channels
Linear = tuple[Tensor, Tensor | None]  # weight and bias
Mapping = Callable[[Tensor, Linear], Tensor]


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


def doubled(pixels: Any, weight: Tensor, bias: Tensor) -> Any:
    """A transposed convolution by a weight (in, out, 4, 4), as `fold_doubling` makes it."""
    result = op.convolution_backprop_data(pixels, constant(weight), [2, 2], None, [1, 1], [1, 1])
    return op.add(result, reshaped(constant(bias), 1, len(bias), 1, 1))


def silu_of_norm(pixels: Any, groups: int, norm: tuple[Tensor, Tensor]) -> Any:
    """SiLU ∘ GroupNorm, spelled as ONNX brings it."""
    shape = pixels.get_output_shape(0)
    normed = op.mvn(reshaped(pixels, shape[0], groups, -1), np.array([2]), True, 1e-5, "INSIDE_SQRT")
    factor, added = (op.unsqueeze(constant(values), np.array([1, 2])) for values in norm)
    normed = op.add(op.multiply(reshaped(normed, *shape), factor), added)
    return op.multiply(normed, op.sigmoid(normed))


def silu_of_norm_reference(pixels: Tensor, groups: int, norm: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = norm
    return functional.silu(functional.group_norm(pixels.double(), groups, weight.double(), bias.double()))


def whole(channels: int, of: int) -> int:
    """So many channels, or as many more as whole vectors or panels have."""
    return -(-channels // of) * of


def kinds(model: openvino.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


def weights_of(model: openvino.Model, kind: str) -> list[list[int]]:
    """The shapes of the constants that nodes of this kind multiply by."""
    return [list(node.get_input_shape(1)) for node in model.get_ops()
            if node.get_type_name() == kind and node.input_value(1).get_node().get_type_name() == "Constant"]  # fmt: skip


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


def to_tokens(pixels: Any, order: tuple[int, ...] = (0, 2, 1)) -> Any:
    frames, channels, height, width = pixels.get_output_shape(0)
    return op.transpose(reshaped(pixels, frames, channels, height * width), np.array(order))


def to_pixels(tokens: Any, height: int) -> Any:
    frames, size, channels = tokens.get_output_shape(0)
    return reshaped(op.transpose(tokens, np.array([0, 2, 1])), frames, channels, height, size // height)


def product(tokens: Any, weight: Tensor, bias: Tensor | None = None, is_stored_transposed: bool = False) -> Any:
    matrix = op.transpose(constant(weight), np.array([1, 0])) if is_stored_transposed else constant(weight)
    result = op.matmul(tokens, matrix, False, not is_stored_transposed)
    return result if bias is None else op.add(result, constant(bias))


def gated(whole: Any, axis: int = 2, approximation: str = "erf") -> Any:
    value, gate = op.split(whole, np.array(axis), 2).outputs()
    return op.multiply(value, op.gelu(gate, approximation))


def layer(layout: str, given: Any, height: int, of: Linear, after: Linear) -> Any:
    """One as OpenVINO's own operations, of a feed-forward two; with a bias its weights are stored transposed."""
    if layout in PIXELS:
        weight, bias = of
        pixels = to_pixels(given, height) if layout.startswith("tokens") else given
        result = convolved(pixels, weight[:, :, None, None], bias)
        return to_tokens(result) if layout.endswith("tokens") else result
    result = product(given, *of, is_stored_transposed=of[1] is not None)
    if layout == "product":
        return result
    return gated(result) if layout == "gated" else product(gated(result), *after)


def linear_map(tokens: Tensor, by: Linear) -> Tensor:
    """In float64."""
    return functional.linear(tokens, by[0].double(), None if by[1] is None else by[1].double())


def reference(layout: str, given: Tensor, height: int, by: tuple[Linear, Linear], mapped: Mapping) -> Tensor:
    """What `layer` gives, where each linear map is done as `mapped` says."""
    of, after = by
    result = mapped((given.flatten(2).mT if layout.startswith("pixels") else given).double(), of)
    if layout in PIXELS:
        frames, size, channels = result.shape
        return result.mT.reshape(frames, channels, height, size // height) if layout.endswith("pixels") else result
    value, gate = result.chunk(2, -1)
    active = value * functional.gelu(gate)
    return {"product": result, "gated": active, "feed-forward": mapped(active, after)}[layout]


def layers(
    layout: str, shape: Shape, lanes: int, mapped: Mapping = linear_map
) -> tuple[openvino.Model, list[Tensor], list[Tensor]]:
    """A model of four, with and without bias and addition; its inputs, and what it should give."""
    frames, (height, width), read, panels = shape
    read = whole(read, lanes) if layout.startswith("pixels") else read
    written, rows = 2 * lanes * panels, 2 * lanes * panels * (1 if layout in (*PIXELS, "product") else 2)
    given = draw(frames, read, height, width) if layout.startswith("pixels") else draw(frames, height * width, read)
    size = (written, height, width) if layout.endswith("pixels") else (height * width, written)
    other = draw(frames, *size, seed=3) * math.sqrt(read)
    inputs, outputs, expected = [parameter(given), parameter(other)], [], []
    for has_bias in (True, False):
        of = draw(rows, read, seed=1), draw(rows, seed=2) if has_bias else None
        after = draw(written, rows // 2, seed=4), draw(written, seed=5) if has_bias else None
        for is_added in (True, False) if layout != "product" else (True,):
            result = layer(layout, inputs[0], height, of, after)
            sides = (inputs[1], result) if has_bias else (result, inputs[1])
            outputs.append(op.add(*sides) if is_added else result)
            expected.append(reference(layout, given, height, (of, after), mapped) + (other if is_added else 0))
    return openvino.Model(outputs, inputs), [given, other], expected


def of_three_frames(folder: Path, network: str) -> openvino.Model:
    """An exported network, with one prompt and where it has a window one of two."""
    graph = folder / f"{network}.xml"
    model = openvino.Core().read_model(graph, weights_path(graph))
    sizes = {"temporal_kv": [3, 2], "window_mask": [3, 2], "text_kv": [1, 77], "conditioning_scale": [1]}

    def first(value: Any) -> list[int]:
        return next((size for name, size in sizes.items() if value.any_name.startswith(name)), [3])

    model.reshape({value.any_name: shape if (shape := value.get_partial_shape())[0].is_static
                   else [*first(value), *shape[len(first(value)):]] for value in model.inputs})  # fmt: skip
    return model


def assert_frames_are_apart(convolve: Callable[..., list[Tensor]], layer: Any, pixels: Tensor) -> None:
    """What `convolve(layer, *pictures)` gives of a frame depends neither on its neighbours nor on threads."""
    (together,) = convolve(layer, pixels)
    assert torch.equal(together, convolve(layer, pixels, num_threads=1)[0])
    some = (0, len(pixels) // 2, len(pixels) - 1)
    alone = convolve(layer, *(pixels[frame : frame + 1] for frame in some))
    assert all(torch.equal(together[frame : frame + 1], one) for frame, one in zip(some, alone, strict=True))


def assert_tokens_are_apart(rewrite: Callable[[openvino.Model], Any], layout: str, read: int, lanes: int) -> None:
    """What the rewritten `layers` give of a frame's tokens depends neither on others nor on threads."""
    (together, inputs, _), (alone, *_) = (layers(layout, (frames, (13, 13), read, 2), lanes) for frames in (3, 1))
    for model in (together, alone):
        rewrite(model)
    found = run(together, *inputs)
    assert all(map(torch.equal, found, run(together, *inputs, num_threads=1)))
    frame = run(alone, *(values[1:2] for values in inputs))
    assert all(torch.equal(values[1:2], one) for values, one in zip(found, frame, strict=True))
