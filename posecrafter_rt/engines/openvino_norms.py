"""Norms as ONNX exports them, and GroupNorm of large pictures as OpenVINO runs it fastest in float32: by channels.

Layer 4. ONNX has GroupNorm as Reshape → MVN over a group's numbers → Reshape, for which OpenVINO reorders every picture
to channels first and back. Means of channels, combined into means of groups, keep the layout that convolutions leave;
the result is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posecrafter_rt.engines.openvino_patterns import is_float_constant, known, of_channels, orders

if TYPE_CHECKING:
    import openvino


class GroupNorm(NamedTuple):
    """A GroupNorm without weight and bias: the pixels (N, C, h, w) that it normalises, over how many groups."""

    pixels: Any
    groups: int
    eps: float


class LayerNorm(NamedTuple):
    """A LayerNorm over the last dimension: the tokens that it normalises, its weight and bias (C)."""

    tokens: Any
    weight: Any
    bias: Any
    eps: float


def layer_norm(value: Any) -> LayerNorm | None:
    """Return the LayerNorm, with a weight and a bias, whose output a value (N, n, C) is."""
    shape = list(value.get_shape())
    for scaled, bias in orders(value.get_node(), "Add"):
        for normed, weight in orders(scaled.get_node(), "Multiply"):
            mvn, axes = normed.get_node(), None
            if mvn.get_type_name() == "MVN":
                axes = known(mvn.input_value(1))
            is_last = axes is not None and (axes % len(shape)).tolist() == [len(shape) - 1] and len(shape) == 3
            are_constant = all(
                is_float_constant(each) and list(each.get_shape()) == shape[-1:] for each in (weight, bias)
            )
            if is_last and are_constant and _divides_inside(mvn):
                return LayerNorm(mvn.input_value(0), weight, bias, mvn.get_attributes()["eps"])
    return None


def choose_before_norm(node: Any) -> None:
    """If tokens are chosen from a LayerNorm's output, as a key frame's from all frames', normalise only those."""
    from openvino import opset13 as op

    axis = known(node.input_value(2)) if node.get_type_name() == "Gather" else None
    if axis is None or node.get_attributes()["batch_dims"] != 0:
        return
    grouped = _as_it_is(node.input_value(0))
    is_reshape = grouped.get_node().get_type_name() == "Reshape"
    norm = layer_norm(grouped.get_node().input_value(0) if is_reshape else grouped)
    shape, last = list(grouped.get_shape()), len(grouped.get_shape()) - 1
    if norm is None or shape[-1] != norm.tokens.get_shape()[-1] or int(axis.item()) % (last + 1) == last:
        return
    tokens = op.reshape(norm.tokens, shape, special_zero=False)
    chosen = op.gather(tokens, node.input_value(1), node.input_value(2))
    normed = op.mvn(chosen, op.constant(np.array([-1])), True, norm.eps, "inside_sqrt")
    node.output(0).replace(op.add(op.multiply(normed, norm.weight), norm.bias).output(0))


def _as_it_is(value: Any) -> Any:
    """Return the value that this one is a slice of, as long as the slice leaves nothing out."""
    while (node := value.get_node()).get_type_name() == "Slice" and node.get_input_shape(0) == value.get_shape():
        step = known(node.input_value(3))
        if step is None or step.min() < 1:  # reversed
            break
        value = node.input_value(0)
    return value


def _divides_inside(mvn: Any) -> bool:
    """Whether it divides by the deviation, with eps under the root."""
    facts = mvn.get_attributes()
    return bool(facts["normalize_variance"]) and facts["eps_mode"] == "INSIDE_SQRT"


def normalise_by_channel(model: openvino.Model) -> int:
    """Rewrite every GroupNorm of a model of fixed shapes, in place; return how many. Other forms are left alone."""
    found = [(node, norm) for node in model.get_ordered_ops() if (norm := group_norm(node)) is not None]
    for node, norm in found:
        node.output(0).replace(_normalised(norm).output(0))
    return len(found)


def group_norm(node: Any) -> GroupNorm | None:
    """Return the GroupNorm that ends at this node, a Reshape that undoes the grouping of what was normalised."""
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


def affine_group_norm(normed: Any) -> tuple[GroupNorm, np.ndarray, np.ndarray] | None:
    """Return the GroupNorm, with its weight and its bias, whose output a value is."""
    channels = normed.get_shape()[1]
    for scaled, shift in orders(normed.get_node(), "Add"):
        for grouped, factor in orders(scaled.get_node(), "Multiply"):
            norm, weight = group_norm(grouped.get_node()), of_channels(factor, channels)
            bias = of_channels(shift, channels)
            if norm is not None and weight is not None and bias is not None:
                return norm, weight, bias
    return None


def _is_of_groups(mvn: Any) -> bool:
    """Whether it takes mean and variance over the last of three dimensions, with eps under the root."""
    axes = mvn.input_value(1).get_node()
    return (
        len(mvn.get_output_shape(0)) == 3
        and axes.get_type_name() == "Constant"
        and axes.data.tolist() in ([2], [-1])
        and _divides_inside(mvn)
    )


def _is_filled(node: Any, value: float) -> bool:
    """Whether a constant, perhaps reshaped, holds only this number."""
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
