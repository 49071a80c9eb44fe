"""Linear maps of a transformer, fused with what surrounds them: channels-first pictures, a norm, a gate, an addition.

Layer 4. Between pictures and tokens diffusers has 1×1 convolutions; OpenVINO reorders the picture for these, and then
transposes it. It copies both halves of a gated unit's product, and reads and writes a product once more to add to it. A
LayerNorm is two more operations, and each of the maps that read one picture's tokens would read them again. The
operation is in operations/. In float32, products without any of these stay OpenVINO's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.openvino_norms import affine_group_norm, choose_before_norm, layer_norm
from posecrafter_rt.engines.openvino_operations import Operations, operations
from posecrafter_rt.engines.openvino_patterns import (
    FOUR,
    bias_constant,
    has_filter,
    is_float_constant,
    is_same,
    is_transpose,
    only_user,
    orders,
    with_bias,
    with_residual,
)

if TYPE_CHECKING:
    import openvino

MOST_BETWEEN = 2560  # channels between two layers; with more, weights would be read again for every few tokens
SWAPPED = [0, 2, 1]  # flat pictures (N, C, h·w) to tokens (N, h·w, C), and back


class Layer(NamedTuple):
    """input · weightᵀ + bias: tokens (N, n, in) or pixels (N, in, h, w); weight (out, in, …), swapped (in, out)."""

    last: Any  # the node whose output it is
    input: Any
    weight: Any
    is_swapped: bool
    bias: np.ndarray | None  # (out)

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return int(self.weight.get_shape()[self.is_swapped])

    @property
    def in_channels(self) -> int:
        """The number of input channels."""
        return int(self.weight.get_shape()[not self.is_swapped])

    def rows(self) -> np.ndarray:
        """Return the weight of a product as (out, in)."""
        weight = np.asarray(self.weight.get_node().data)
        return np.ascontiguousarray(weight.T) if self.is_swapped else weight

    def biases(self) -> np.ndarray:
        """Return the bias (out); zeros if there is none."""
        return np.zeros(self.channels, np.float32) if self.bias is None else self.bias


def use_linear(model: openvino.Model, precision: Precision = "fp32") -> int:
    """Replace the linear maps that gain by it in a float32 model of fixed shapes, in place; return how many.

    precision: int8 and fp16 replace all that the operation can do: OpenVINO keeps weights and products in float32.
    """
    available = operations(precision)
    if available is None:
        return 0
    for node in model.get_ordered_ops():
        choose_before_norm(node)
    for node in model.get_ordered_ops() if precision != "fp32" else ():
        _join(node)
    rewrites = (_convolve, _gate, _follow_or_add, _share)  # a gate is taken before its layer is taken alone
    return sum(rewrite(node, available) for rewrite in rewrites for node in model.get_ordered_ops())


def _join(concat: Any) -> None:
    """Make one product of products of the same tokens that are concatenated, as a stream's keys and values are."""
    from openvino import opset13 as op

    if concat.get_type_name() != "Concat":
        return
    rank = len(concat.get_output_shape(0))
    if concat.get_attributes()["axis"] % rank != rank - 1:
        return
    layers = [_joinable(value) for value in concat.input_values()]
    found = [layer for layer in layers if layer is not None and is_same(layer.input, (layers[0] or layer).input)]
    if len(found) < len(layers):
        return
    weight = op.constant(np.concatenate([layer.rows() for layer in found]))
    joined = op.matmul(found[0].input, weight, False, True)
    concat.output(0).replace(op.reshape(joined, list(concat.get_output_shape(0)), special_zero=False).output(0))


def _joinable(value: Any) -> Layer | None:
    """Return the product without a bias that a value is, perhaps reshaped, if nothing else reads it."""
    node = value.get_node()
    product = node.input_value(0).get_node() if node.get_type_name() == "Reshape" else node
    layer = _linear_layer(product)
    is_alone = only_user(node) is not None and only_user(product) is not None
    is_plain = layer is not None and layer.bias is None and value.get_shape()[-1] == layer.channels
    return layer if is_plain and is_alone else None


def _convolve(node: Any, available: Operations) -> bool:
    """Replace a 1×1 convolution, with the steps from and to tokens around it and what is added to its output."""
    is_pointwise = node.get_type_name() == "Convolution" and has_filter(node, kernel=1, stride=1, padding=0)
    if not is_pointwise or not is_float_constant(node.input_value(1)):
        return False
    channels, height = node.get_output_shape(0)[1:3]
    last, bias = with_bias(node, channels)
    tokens, read_as_tokens = _tokens_of(node.input_value(0)), _read_as_tokens(last)
    if tokens is None and node.get_input_shape(0)[1] % available.lanes:
        return False
    layer = Layer(read_as_tokens or last, tokens or node.input_value(0), node.input_value(1), False, bias)
    return _rewrite(layer, available, height=0 if read_as_tokens else height)


def _gate(product: Any, available: Operations) -> bool:
    """Replace value · GELU(gate) of the two halves of one layer's output."""
    for value, active in orders(product, "Multiply"):
        gelu, split = active.get_node(), value.get_node()
        if gelu.get_type_name() != "Gelu" or split.get_type_name() != "Split" or split.get_output_size() != 2:
            continue
        is_exact = gelu.get_attributes().get("approximation_mode", "").lower() == "erf"
        is_gate = is_same(gelu.input_value(0), split.output(1)) and is_same(value, split.output(0))
        is_gate = is_gate and all(len(part.get_target_inputs()) == 1 for part in (*split.outputs(), active))
        layer = _linear_layer(split.input_value(0).get_node())
        if is_exact and is_gate and layer is not None and _is_along_last(split) and only_user(layer.last) is not None:
            return _rewrite(layer._replace(last=product), available, is_gated=True)
    return False


def _follow_or_add(node: Any, available: Operations) -> bool:
    """Replace a layer that follows a gated one, as in a feed-forward, or whose output is added to something."""
    layer = _linear_layer(node)
    if layer is None or _with_its_bias(node) is not node:
        return False
    before = _gated_before(layer)
    gains = bool(before or with_residual(layer.last)[1])
    return gains and _rewrite(layer, available, before=before)


def _gated_before(layer: Layer) -> Any | None:
    """Return the gated layer that only this layer reads, if what is between them is not too wide."""
    gated = layer.input.get_node()
    if gated.get_type_name() != "Linear" or not gated.get_attributes()["is_gated"] or only_user(gated) is None:
        return None
    is_single = gated.get_input_size() == (5 if gated.get_attributes()["eps"] else 3)
    return gated if is_single and layer.input.get_shape()[-1] <= MOST_BETWEEN else None


def _share(node: Any, available: Operations) -> bool:
    """Replace all layers of the same tokens, at the first of them, with one product that has all their outputs."""
    from openvino import opset13 as op

    is_there = node.output(0).get_target_inputs() and _with_its_bias(node) is node  # it may be replaced already
    first = _linear_layer(node) if is_there else None
    if first is None or (available.precision == "fp32" and layer_norm(first.input) is None):
        return False
    users = [_linear_layer(_with_its_bias(user.get_node())) for user in first.input.get_target_inputs()]
    layers = [
        each for each in users if each is not None and is_same(each.input, first.input) and _fits(each, available)
    ]
    if not layers:
        return False
    layers.sort(key=lambda each: str(each.last.get_friendly_name()))
    weight = layers[0].weight
    if len(layers) > 1 or layers[0].is_swapped:
        weight = op.constant(np.concatenate([each.rows() for each in layers])).output(0)
    bias = op.constant(np.concatenate([each.biases() for each in layers])).output(0)
    inputs, attributes = _normed(first.input)
    attributes |= {**_bits(available), "widths": [each.channels for each in layers]}
    made = available.factory.create("Linear", [*inputs, weight, bias], attributes)
    for each, output in zip(layers, made.outputs(), strict=True):
        each.last.output(0).replace(output)
    return True


def _with_its_bias(product: Any) -> Any:
    """Return the addition of its bias if only that reads a product; else the product."""
    user = only_user(product)
    return product if user is None or user.get_type_name() != "Add" or _linear_layer(user) is None else user


def _fits(layer: Layer, available: Operations, parts: int = 1) -> bool:
    """Whether the operation can take these channels, divided into so many parts."""
    panels = layer.channels / (2 * available.lanes)
    return panels % parts == 0 and not (available.precision == "int8" and layer.in_channels % FOUR)


def _bits(available: Operations) -> dict[str, bool]:
    return {"in_bytes": available.precision == "int8", "in_halves": available.precision == "fp16"}


def _normed(value: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the operation's first inputs and attributes for tokens or pixels; fuse the norm before them."""
    from openvino import opset13 as op

    if len(value.get_shape()) == 4:
        found = affine_group_norm(value)
        if found is None:
            return [value], {}
        norm, *numbers = found
        inputs = [norm.pixels, *(op.constant(array).output(0) for array in numbers)]
        return inputs, {"groups": norm.groups, "eps": norm.eps}
    tokens = layer_norm(value)
    return ([value], {}) if tokens is None else ([tokens.tokens, tokens.weight, tokens.bias], {"eps": tokens.eps})


def _rewrite(
    layer: Layer, available: Operations, height: int = 0, is_gated: bool = False, before: Any | None = None
) -> bool:
    """Replace a layer, the gated one before it and what is added to its output, if possible; return whether it was."""
    from openvino import opset13 as op

    if not _fits(layer, available, 2 if is_gated else 1) or len(layer.last.get_output_shape(0)) != (4 if height else 3):
        return False
    weight, bias = layer.weight, bias_constant(layer.bias, layer.channels)
    if layer.is_swapped:
        weight = op.constant(layer.rows()).output(0)
    last, residual = with_residual(layer.last)
    first, attributes = _normed(layer.input)
    if before is not None:
        first, attributes = before.input_values(), {"eps": before.get_attributes()["eps"]}
    attributes |= {"height": height, "is_gated": is_gated or before is not None, **_bits(available)}
    made = available.factory.create("Linear", [*first, weight, bias, *residual], attributes)
    last.output(0).replace(made.output(0))
    return True


def _tokens_of(pixels: Any) -> Any | None:
    """Return the tokens (N, h·w, C) from which pixels (N, C, h, w) were made."""
    reshape = pixels.get_node()
    if reshape.get_type_name() != "Reshape":
        return None
    transpose, (frames, channels, height, width) = reshape.input_value(0).get_node(), pixels.get_shape()
    flat = [frames, channels, height * width]
    is_made = is_transpose(transpose, SWAPPED) and list(transpose.get_output_shape(0)) == flat
    return transpose.input_value(0) if is_made else None


def _read_as_tokens(node: Any) -> Any | None:
    """Return the node that makes tokens (N, h·w, C) of a node's pixels (N, C, h, w), if nothing else reads those."""
    reshape, (frames, channels, height, width) = only_user(node), node.get_output_shape(0)
    if reshape is None or reshape.get_type_name() != "Reshape":
        return None
    transpose, flat = only_user(reshape), [frames, channels, height * width]
    is_read = list(reshape.get_output_shape(0)) == flat and is_transpose(transpose, SWAPPED)
    return transpose if is_read else None


def _is_along_last(split: Any) -> bool:
    axis = split.input_value(1).get_node()
    rank = len(split.get_input_shape(0))
    return axis.get_type_name() == "Constant" and int(axis.data) in (-1, rank - 1)


def _linear_layer(last: Any) -> Layer | None:
    """Return the layer of tokens (N, n, in) that ends at a node, with or without a bias."""
    product, bias = last, None
    for value, numbers in orders(last, "Add"):
        if value.get_node().get_type_name() == "MatMul" and is_float_constant(numbers):
            product, bias = value.get_node(), np.asarray(numbers.get_node().data)
    if product.get_type_name() != "MatMul" or len(product.get_input_shape(0)) != 3:
        return None
    facts, weight = product.get_attributes(), product.input_value(1)
    is_swapped = not facts["transpose_b"]
    if is_transpose(weight.get_node(), [1, 0]):
        weight, is_swapped = weight.get_node().input_value(0), not is_swapped
    is_matrix = not facts["transpose_a"] and is_float_constant(weight) and len(weight.get_shape()) == 2
    is_bias = bias is None or (only_user(product) is not None and bias.shape == (product.get_output_shape(0)[-1],))
    return Layer(last, product.input_value(0), weight, is_swapped, bias) if is_matrix and is_bias else None
