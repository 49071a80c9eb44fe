"""Patterns in OpenVINO's graphs that its passes look for: a constant per channel, an addition, a node's only user.

Layer 4: nodes and values are OpenVINO's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

FOUR = 4  # 8-bit numbers that one product takes
MOST_KNOWN = 8  # numbers, about as many as shapes have


def only_user(node: Any) -> Any | None:
    """Return the only node that reads a node's output, or None; asking for its shape is not reading."""
    users = [user.get_node() for user in node.output(0).get_target_inputs()]
    users = [user for user in users if user.get_type_name() != "ShapeOf"]
    return users[0] if len(users) == 1 else None


def has_filter(node: Any, kernel: int, stride: int, padding: int) -> bool:
    """Whether a convolution, or a transposed one, has a square filter of these values and no dilation."""
    facts = node.get_attributes()
    return (
        list(node.get_input_shape(1))[2:] == [kernel] * 2
        and list(facts["strides"]) == [stride] * 2
        and list(facts["dilations"]) == [1, 1]
        and list(facts["pads_begin"]) == list(facts["pads_end"]) == [padding] * 2
        and facts["auto_pad"] in ("explicit", "notset")
    )


def orders(node: Any, kind: str) -> list[tuple[Any, Any]]:
    """Return the two inputs of a node of this type in both orders; nothing for another node."""
    if node.get_type_name() != kind:
        return []
    first, second = node.input_values()
    return [(first, second), (second, first)]


def is_same(first: Any, second: Any) -> bool:
    """Whether two values are the same one; comparing nodes by == would make a new node."""
    return (first.get_node().get_name(), first.get_index()) == (second.get_node().get_name(), second.get_index())


def addition(node: Any) -> tuple[Any, Any] | None:
    """Return the addition that is the only reader of a node, and what it adds, if that is another value."""
    user = only_user(node)
    for own, other in [] if user is None else orders(user, "Add"):
        if is_same(own, node.output(0)) and not is_same(other, own):
            return user, other
    return None


def with_bias(node: Any, channels: int) -> tuple[Any, np.ndarray | None]:
    """Return the node that adds a bias to a node's output, and the bias; the node itself and None if there is none."""
    found = addition(node)
    bias = None if found is None else of_channels(found[1], channels)
    return (node, None) if found is None or bias is None else (found[0], bias)


def with_residual(node: Any) -> tuple[Any, list[Any]]:
    """Return the node that adds something of equal shape to a node's output, and that; else the node and nothing."""
    found = addition(node)
    is_as_large = found is not None and list(found[1].get_shape()) == list(node.get_output_shape(0))
    return (found[0], [found[1]]) if found is not None and is_as_large else (node, [])


def bias_constant(bias: np.ndarray | None, channels: int) -> Any:
    """Return a bias as a node's output; zeros if there is none."""
    from openvino import opset13 as op

    return op.constant(np.zeros(channels, np.float32) if bias is None else bias).output(0)


def is_float_constant(value: Any) -> bool:
    """Whether a value is a constant in float32."""
    return value.get_node().get_type_name() == "Constant" and value.get_element_type().get_type_name() == "f32"


def of_channels(value: Any, channels: int) -> np.ndarray | None:
    """Return the constant numbers (channels) that a value has for the channels; None if it is anything else."""
    constant, shape = value.get_node(), list(value.get_shape())
    while constant.get_type_name() in ("Reshape", "Unsqueeze"):
        constant = constant.input_value(0).get_node()
    if constant.get_type_name() != "Constant" or shape not in ([channels, 1, 1], [1, channels, 1, 1]):
        return None
    return np.array(constant.data, np.float32).reshape(channels)


def is_transpose(node: Any | None, order: list[int]) -> bool:
    """Whether a node transposes dimensions into this order."""
    if node is None or node.get_type_name() != "Transpose":
        return False
    constant = node.input_value(1).get_node()
    return constant.get_type_name() == "Constant" and constant.data.tolist() == order


def known(value: Any) -> np.ndarray | None:
    """Return a few numbers that follow from constants and fixed shapes alone; None if they do not."""
    import openvino

    node = value.get_node()
    kind = node.get_type_name()
    if kind == "ShapeOf":
        return np.array(node.get_input_shape(0))
    if kind in ("Convert", "ConvertLike"):
        inner = known(node.input_value(0))
        return None if inner is None else inner.astype(value.get_element_type().to_dtype())
    if math.prod(value.get_shape()) > MOST_KNOWN:
        return None
    if kind == "Constant":
        return np.asarray(node.data)
    inputs = [known(given) for given in node.input_values()]
    if not inputs or any(given is None for given in inputs):
        return None
    typed = [np.asarray(array, given.get_element_type().to_dtype())
             for array, given in zip(inputs, node.input_values(), strict=True)]  # fmt: skip
    outputs = [openvino.Tensor(output.get_element_type(), output.get_shape()) for output in node.outputs()]
    is_done = node.evaluate(outputs, [openvino.Tensor(array) for array in typed])
    return outputs[value.get_index()].data if is_done else None


def part_of(value: Any) -> tuple[Any, int]:
    """Return the value that this one is a slice of on the last dimension, and where it begins; else itself and 0."""
    node, first = value.get_node(), 0
    while (begin := _begin(value)) is not None:
        first, value = first + begin, node.input_value(0)
        node = value.get_node()
    return value, first


def _begin(value: Any) -> int | None:
    """Return where a node's slice of its input's last dimension begins; None if the node does something else."""
    node = value.get_node()
    kind, rank = node.get_type_name(), len(value.get_shape())
    if kind == "Split":
        axis = known(node.input_value(1))
        is_last = axis is not None and int(axis.item()) % rank == rank - 1
        return value.get_index() * value.get_shape()[-1] if is_last else None
    if kind != "Slice":
        return None
    numbers = [known(given) for given in node.input_values()[1:]]
    single = [int(array.item()) for array in numbers if array is not None and array.size == 1]
    if len(numbers) != 4 or len(single) != 4:
        return None
    begin, _, step, along = single
    return begin if step == 1 and begin >= 0 and along % rank == rank - 1 else None
