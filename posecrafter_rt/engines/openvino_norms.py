"""GroupNorm of large pictures as OpenVINO runs it fastest in float32: by channels, in the layout that convolutions leave.

Layer 4. ONNX brings GroupNorm as Reshape → MVN over a group's numbers → Reshape, for which OpenVINO reorders every picture
to channels first and back. Means of channels, joined to those of groups, need no reordering; the result is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino


def normalise_by_channel(model: openvino.Model) -> int:
    """Rewrite every GroupNorm of a model of fixed shapes, in place; returns how many. What looks different is left alone."""
    return sum(_rewrite(node) for node in model.get_ordered_ops() if node.get_type_name() == "MVN")


def _rewrite(mvn: Any) -> bool:
    grouping, back = mvn.input_value(0).get_node(), _end(mvn)
    if grouping.get_type_name() != "Reshape" or back is None:
        return False
    pixels = grouping.input_value(0)
    shape, groups = list(pixels.get_shape()), mvn.get_output_shape(0)[1]
    if len(shape) != 4 or list(back.get_output_shape(0)) != shape or shape[1] % groups or not _is_of_groups(mvn):
        return False
    back.output(0).replace(_normalised(pixels, shape, groups, mvn.get_attributes()["eps"]).output(0))
    return True


def _is_of_groups(mvn: Any) -> bool:
    """Whether it takes mean and variance over the last of three dimensions, eps under the root."""
    axes, facts = mvn.input_value(1).get_node(), mvn.get_attributes()
    return (
        len(mvn.get_output_shape(0)) == 3
        and axes.get_type_name() == "Constant"
        and axes.data.tolist() in ([2], [-1])
        and facts["normalize_variance"]
        and facts["eps_mode"] == "INSIDE_SQRT"
    )


def _end(mvn: Any) -> Any:
    """The Reshape that undoes the grouping, if nothing but a multiplication by 1 and an addition of 0 lies between."""
    node, neutral = mvn, {"Multiply": 1.0, "Add": 0.0}
    while True:
        users = [user.get_node() for user in node.output(0).get_target_inputs()]
        users = [user for user in users if user.get_type_name() != "ShapeOf"]
        if len(users) != 1:
            return None
        node, kind = users[0], users[0].get_type_name()
        if kind == "Reshape":
            return node
        if kind not in neutral or not _is_filled(node.input_value(1).get_node(), neutral[kind]):
            return None


def _is_filled(node: Any, value: float) -> bool:
    """Whether a constant, perhaps reshaped, holds this number alone."""
    while node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and bool((np.asarray(node.data) == value).all())


def _normalised(pixels: Any, shape: list[int], groups: int, eps: float) -> Any:
    from openvino import opset13 as op

    frames, channels, _, _ = shape

    def group_mean(values: Any) -> Any:
        """(N, C, h, w) → (N, C, 1, 1), the mean of each channel's group."""
        means = op.reduce_mean(values, np.array([2, 3]), keep_dims=True)
        grouped = op.reshape(means, np.array([frames, groups, channels // groups]), special_zero=False)
        mean = op.reduce_mean(grouped, np.array([2]), keep_dims=True)
        spread = op.broadcast(mean, np.array([frames, groups, channels // groups]))
        return op.reshape(spread, np.array([frames, channels, 1, 1]), special_zero=False)

    centred = op.subtract(pixels, group_mean(pixels))
    variance = group_mean(op.multiply(centred, centred))
    deviation = op.sqrt(op.add(variance, op.constant(np.float32(eps))))
    return op.multiply(centred, op.divide(op.constant(np.float32(1)), deviation))
