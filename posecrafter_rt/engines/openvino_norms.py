"""GroupNorm of large pictures as OpenVINO runs it fastest in float32: by channels, in the layout that convolutions leave.

Layer 4. ONNX brings GroupNorm as Reshape → MVN over a group's numbers → Reshape, for which OpenVINO reorders every picture
to channels first and back. Means of channels, joined to those of groups, need no reordering; the result is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import openvino


class GroupNorm(NamedTuple):
    """A GroupNorm without weight and bias: of which output, over how many groups."""

    pixels: Any
    groups: int
    eps: float


def normalise_by_channel(model: openvino.Model) -> int:
    """Rewrite every GroupNorm of a model of fixed shapes, in place; returns how many. What looks different is left alone."""
    found = [(node, norm) for node in model.get_ordered_ops() if (norm := group_norm(node)) is not None]
    for node, norm in found:
        node.output(0).replace(_normalised(norm).output(0))
    return len(found)


def group_norm(node: Any) -> GroupNorm | None:
    """The GroupNorm that ends at this node: a Reshape which undoes the grouping of what was normalised."""
    if node.get_type_name() != "Reshape":
        return None
    inner, neutral = node.input_value(0).get_node(), {"Multiply": 1.0, "Add": 0.0}
    while (kind := inner.get_type_name()) in neutral and _is_filled(inner.input_value(1).get_node(), neutral[kind]):
        inner = inner.input_value(0).get_node()
    if inner.get_type_name() != "MVN" or not _is_of_groups(inner):
        return None
    grouping = inner.input_value(0).get_node()
    if grouping.get_type_name() != "Reshape":
        return None
    pixels, (frames, groups, _) = grouping.input_value(0), inner.get_output_shape(0)
    shape = list(pixels.get_shape())
    if len(shape) != 4 or list(node.get_output_shape(0)) != shape or frames != shape[0] or shape[1] % groups:
        return None
    return GroupNorm(pixels, groups, inner.get_attributes()["eps"])


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


def _is_filled(node: Any, value: float) -> bool:
    """Whether a constant, perhaps reshaped, holds this number alone."""
    while node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and bool((np.asarray(node.data) == value).all())


def _normalised(norm: GroupNorm) -> Any:
    from openvino import opset13 as op

    pixels, groups, eps = norm
    frames, channels, _, _ = pixels.get_shape()

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
