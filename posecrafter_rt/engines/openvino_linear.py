"""Linear maps of a transformer where OpenVINO needs no other layout for them, beside pictures whose channels come first.

Layer 4. Between pictures and tokens diffusers has 1×1 convolutions, for which OpenVINO reorders the picture that it then
transposes: on tokens they are products. And it copies both halves of a gated unit's product apart: two products need no copy.
Compiled networks are kept by `openvino_winograd.REWRITING`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from posecrafter_rt.engines.openvino_patterns import has_filter, only_user, with_bias

if TYPE_CHECKING:
    import openvino

SWAPPED = [0, 2, 1]  # flat pictures (N, C, h·w) to tokens (N, h·w, C), and back


def use_products(model: openvino.Model) -> int:
    """Rewrite both in a model of fixed shapes, in place; returns how many. What looks different is left alone."""
    return sum(_convolve_tokens(node) or _multiply_apart(node) for node in model.get_ordered_ops())


def _convolve_tokens(node: Any) -> bool:
    """A 1×1 convolution of what tokens were made of, or that tokens are made of, as a product of tokens."""
    from openvino import opset13 as op

    if not _is_pointwise(node):
        return False
    (frames, channels, height, width), in_channels = node.get_output_shape(0), node.get_input_shape(0)[1]
    last, bias = with_bias(node, channels)
    tokens, read_as_tokens = _tokens_of(node.input_value(0)), _read_as_tokens(last)
    if tokens is None and read_as_tokens is None:
        return False
    if tokens is None:
        flat = op.reshape(node.input_value(0), np.array([frames, in_channels, height * width]), special_zero=False)
        tokens = op.transpose(flat, np.array(SWAPPED)).output(0)
    weight = op.reshape(node.input_value(1), np.array([channels, in_channels]), special_zero=False)
    out = _linear(tokens, weight, bias)
    if read_as_tokens is not None:
        read_as_tokens.output(0).replace(out)
    else:
        planes = op.transpose(out, np.array(SWAPPED))
        shape = np.array([frames, channels, height, width])
        last.output(0).replace(op.reshape(planes, shape, special_zero=False).output(0))
    return True


def _is_pointwise(node: Any) -> bool:
    """Whether it is a float32 convolution of 1×1 and stride 1 with constant weights."""
    is_constant = node.get_type_name() == "Convolution" and _is_float_constant(node.input_value(1))
    return is_constant and has_filter(node, kernel=1, stride=1, padding=0)


def _tokens_of(pixels: Any) -> Any | None:
    """The tokens (N, h·w, C) that pixels (N, C, h, w) were made of."""
    reshape = pixels.get_node()
    if reshape.get_type_name() != "Reshape":
        return None
    transpose, (frames, channels, height, width) = reshape.input_value(0).get_node(), pixels.get_shape()
    is_made = _is_transpose(transpose, SWAPPED) and list(transpose.get_output_shape(0)) == [
        frames,
        channels,
        height * width,
    ]
    return transpose.input_value(0) if is_made else None


def _read_as_tokens(node: Any) -> Any | None:
    """The node that makes tokens (N, h·w, C) of a node's pixels (N, C, h, w), if nothing else reads those."""
    reshape, (frames, channels, height, width) = only_user(node), node.get_output_shape(0)
    if reshape is None or reshape.get_type_name() != "Reshape":
        return None
    transpose = only_user(reshape)
    is_read = list(reshape.get_output_shape(0)) == [frames, channels, height * width] and _is_transpose(
        transpose, SWAPPED
    )
    return transpose if is_read else None


def _is_transpose(node: Any | None, order: list[int]) -> bool:
    if node is None or node.get_type_name() != "Transpose":
        return False
    constant = node.input_value(1).get_node()
    return constant.get_type_name() == "Constant" and constant.data.tolist() == order


def _multiply_apart(split: Any) -> bool:
    """The parts of a linear layer's output, each as a product with its part of the weights."""
    from openvino import opset13 as op

    if split.get_type_name() != "Split" or not _is_along_last(split):
        return False
    layer = _linear_layer(split.input_value(0).get_node())
    if layer is None:
        return False
    tokens, weight, bias = layer
    *rows, in_channels = tokens.get_shape()
    if np.prod(rows) < in_channels:  # then the weights, which are copied here, are the larger ones
        return False
    number = split.get_output_size()
    for output, part, numbers in zip(split.outputs(), np.split(weight, number), np.split(bias, number), strict=True):
        output.replace(_linear(tokens, op.constant(np.ascontiguousarray(part)), numbers))
    return True


def _is_along_last(split: Any) -> bool:
    axis = split.input_value(1).get_node()
    rank = len(split.get_input_shape(0))
    return axis.get_type_name() == "Constant" and int(axis.data) in (-1, rank - 1)


def _linear_layer(add: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """Input (…, in), weight (out, in) and bias (out) of x · weightᵀ + bias, which one node reads."""
    if add.get_type_name() != "Add" or only_user(add) is None:
        return None
    product, bias = (value.get_node() for value in add.input_values())
    if product.get_type_name() != "MatMul" or only_user(product) is None or not _is_float_constant(add.input_value(1)):
        return None
    facts, value = product.get_attributes(), product.input_value(1)
    is_transposed = facts["transpose_b"]
    if _is_transpose(value.get_node(), [1, 0]):
        value, is_transposed = value.get_node().input_value(0), not is_transposed
    channels = add.get_output_shape(0)[-1]
    if facts["transpose_a"] or not _is_float_constant(value) or list(bias.get_output_shape(0)) != [channels]:
        return None
    weight = np.asarray(value.get_node().data)
    weight = weight if is_transposed else weight.T
    is_matrix = weight.ndim == 2 and len(weight) == channels  # a bias may broadcast what is narrower
    return (product.input_value(0), weight, np.asarray(bias.data)) if is_matrix else None


def _is_float_constant(value: Any) -> bool:
    return value.get_node().get_type_name() == "Constant" and value.get_element_type().get_type_name() == "f32"


def _linear(tokens: Any, weight: Any, bias: np.ndarray | None) -> Any:
    """tokens · weightᵀ + bias, an output; weight (out, in), a node."""
    from openvino import opset13 as op

    out = op.matmul(tokens, weight, False, True)
    return (out if bias is None else op.add(out, op.constant(bias))).output(0)
