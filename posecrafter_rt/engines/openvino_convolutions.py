"""3×3 convolutions that OpenVINO does not have, fused with the GroupNorm and SiLU before and the addition after them.

Layer 4. They use Winograd's minimal filtering, which takes a quarter or four ninths of the products, or multiply in 16
or 8 bits. The operation is in operations/.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.openvino_norms import GroupNorm, affine_group_norm
from posecrafter_rt.engines.openvino_operations import Operations, operations
from posecrafter_rt.engines.openvino_patterns import (
    addition,
    bias_constant,
    has_filter,
    is_same,
    only_user,
    orders,
    part_of,
    with_bias,
    with_residual,
)
from posecrafter_rt.models.doubling import fold_doubling

if TYPE_CHECKING:
    import openvino

# Tiles of 4×4 outputs take a quarter of a direct convolution's products, and weights four times as large. Tiles of 2×2
# take four ninths, and weights not twice as large. So 4×4 is for large pictures and small weights.
LEAST_TILES = 16  # over all frames; fewer do not pay for the transformed weights, unless these are in 16 bits
LARGE_TILES = 16  # 4×4 tiles in one frame
MANY_TILES = 64  # 4×4 tiles in one frame, if products could be in 16 bits
FOLDING_TOLERANCE = 1e-4  # relative to the largest weight: a folded weight against itself unfolded and folded again
MOST_BYTES = 1 << 26  # of a layer's weights transformed for 4×4, in smaller pictures and in fp16
MOST_BYTES_A_TILE = 1 << 19  # of those per tile of a frame, if products could be in 16 bits


def use_convolutions(model: openvino.Model, precision: Precision = "fp32") -> int:
    """Replace the convolutions that gain by it in a float32 model of fixed shapes, in place; return how many.

    precision: int8 does all that the operation can in 8 bits. The others use Winograd's filtering, which loses nothing;
    fp16 then has weights in 16 bits in tiles of 2×2. If the processor has products in 16 bits, fp16 uses those instead,
    and without AMX Winograd's filtering for those that are `_is_large`. Few channels stay in float32 (`_is_narrow`).
    """
    available = operations(precision)
    if available is None:
        return 0
    gaining = [(node, tile) for node in model.get_ordered_ops() if (tile := _tile(node, available)) is not None]
    for convolution, tile in gaining:
        _rewrite(convolution, tile, available)
    return len(gaining)


def _tile(node: Any, available: Operations) -> int | None:
    """Return the side of the tiles that suit a convolution best, 0 for products in 16 or 8 bits, None to leave it."""
    if not _is_fitting(node, available.lanes):
        return None
    is_single, is_narrow = _is_convolution(node, stride=1), _is_narrow(node, available.lanes)
    has_products = available.precision != "fp32" and available.vectors.has_vnni
    by_fours = available.precision == "fp16" and not available.vectors.has_tiles and is_single and _is_large(node)
    if is_narrow and is_single:
        return 4 if _is_many(node, 4) else None
    if has_products and not by_fours:
        is_doubling = _is_transposed(node) and node.get_input_shape(0)[1] % available.lanes == 0
        return 0 if is_single or is_doubling or (not is_narrow and _is_convolution(node, stride=2)) else None
    if is_narrow:
        return None
    return _winograd_tile(node, available.precision) if is_single or _is_doubling(node) else None


def _winograd_tile(node: Any, precision: Precision) -> int | None:
    """Return the side of the tiles that suit a convolution with products in float32 best; None to leave it."""
    if _weights_by_fours(node) <= MOST_BYTES:
        side = 4
    elif precision == "fp16":
        return 2  # else OpenVINO would keep those weights in float32
    else:
        side = 4 if _tiles(node, 4) >= LARGE_TILES else 2
    return side if _is_many(node, side) else None


def _is_many(node: Any, side: int) -> bool:
    """Whether there are enough tiles, over all frames, to gain by them."""
    return bool(node.get_output_shape(0)[0] * _tiles(node, side) >= LEAST_TILES)


def _is_large(node: Any) -> bool:
    """Whether tiles of 4×4 in float32 are faster than products in 16 bits, and worth the memory."""
    tiles = _tiles(node, 4)
    return tiles >= MANY_TILES and _weights_by_fours(node) <= min(MOST_BYTES, MOST_BYTES_A_TILE * tiles)


def _weights_by_fours(node: Any) -> int:
    """Return the bytes of a convolution's weights when they are transformed for tiles of 4×4."""
    return int(4 * 36 * node.get_output_shape(0)[1] * node.get_input_shape(0)[1])


def _tiles(node: Any, side: int) -> int:
    """Return the number of tiles in a frame."""
    height, width = node.get_output_shape(0)[2:]
    return int(-(-height // side) * -(-width // side))


def _is_narrow(node: Any, lanes: int) -> bool:
    """Whether it has few input or output channels, as for pictures and latents; float32 suits a 3×3 one best."""
    return bool(node.get_input_shape(0)[1] % lanes or node.get_output_shape(0)[1] % (2 * lanes))


def _is_fitting(node: Any, lanes: int) -> bool:
    """Whether it is a float32 convolution of pictures with constant weights, whose channels fill whole vectors (input)
    and panels (output), or make one vector at most.
    """
    is_known = node.get_type_name() in ("Convolution", "ConvolutionBackpropData")
    return (
        is_known
        and len(node.get_output_shape(0)) == 4
        and node.input_value(1).get_node().get_type_name() == "Constant"  # so it is transformed only once
        and all(value.get_element_type().get_type_name() == "f32" for value in node.input_values())
        and (node.get_input_shape(0)[1] % lanes == 0 or node.get_input_shape(0)[1] < lanes)
        and (node.get_output_shape(0)[1] % (2 * lanes) == 0 or node.get_output_shape(0)[1] <= lanes)
    )


def _is_convolution(node: Any, stride: int) -> bool:
    """Whether it is a 3×3 convolution of this stride and padding 1."""
    return node.get_type_name() == "Convolution" and has_filter(node, kernel=3, stride=stride, padding=1)


def _is_transposed(node: Any) -> bool:
    """Whether it is a transposed 4×4 convolution that doubles a picture."""
    is_known = node.get_type_name() == "ConvolutionBackpropData" and len(node.input_values()) == 2
    is_fitting = is_known and has_filter(node, kernel=4, stride=2, padding=1)
    return is_fitting and not any(node.get_attributes()["output_padding"])


def _is_doubling(node: Any) -> bool:
    """Whether it is such a one and stands for a doubled picture's convolution, see `models.folding.fold_doubled`."""
    if not _is_transposed(node):
        return False
    weight = np.asarray(node.input_value(1).get_node().data)
    again = fold_doubling(torch.from_numpy(_unfolded(weight))).numpy()
    return bool(np.abs(again - weight).max() <= FOLDING_TOLERANCE * np.abs(weight).max())


def _unfolded(weight: np.ndarray) -> np.ndarray:
    """Return the weight (out, in, 3, 3) from which `fold_doubling` made this one, (in, out, 4, 4).

    Of the four taps the first is w2, the second w1 + w2, the last w0.
    """
    rows = np.stack([weight[:, :, 3], weight[:, :, 1] - weight[:, :, 0], weight[:, :, 0]], 2)
    both = np.stack([rows[..., 3], rows[..., 1] - rows[..., 0], rows[..., 0]], 3)
    return np.ascontiguousarray(both.transpose(1, 0, 2, 3))


def _rewrite(convolution: Any, tile: int, available: Operations) -> None:
    """Replace a convolution, and with it the GroupNorm and SiLU before and the additions after it, if there are any."""
    from openvino import opset13 as op

    weight, channels = convolution.input_value(1), convolution.get_output_shape(0)[1]
    attributes: dict[str, Any] = {"tile": tile, "stride": convolution.get_attributes()["strides"][0],
                                  "in_halves": available.precision == "fp16" and tile < 4}  # fmt: skip
    outputs = 0  # the weight's axis of output channels
    if convolution.get_type_name() == "ConvolutionBackpropData":
        attributes |= {"times": 2, "stride": 1}
        if tile > 0:
            weight = op.constant(_unfolded(np.asarray(weight.get_node().data))).output(0)
        else:
            outputs = 1
    replaced, numbers = with_bias(convolution, channels)
    bias, added = bias_constant(numbers, channels), list[Any]()
    if _is_narrow(convolution, available.lanes):
        attributes["planes"] = channels
        weight, bias = (_padded(value, axis, 2 * available.lanes) for value, axis in ((weight, outputs), (bias, 0)))
        weight = _padded(weight, 1 - outputs, available.lanes)
    elif (computed := _computed_bias(replaced)) is not None:
        replaced, *added, attributes["added_at"] = computed
    replaced, residual = with_residual(replaced)
    pixels, norms = convolution.input_value(0), list[np.ndarray]()
    before = None if pixels.get_shape()[1] % available.lanes else _before(pixels)
    if before is not None:
        norm, *norms = before
        pixels, attributes = norm.pixels, {**attributes, "groups": norm.groups, "eps": norm.eps}
    inputs = [pixels, weight, bias, *added, *(op.constant(values).output(0) for values in norms), *residual]
    replaced.output(0).replace(available.factory.create("FusedConvolution", inputs, attributes).output(0))


def _padded(value: Any, axis: int, count: int) -> Any:
    """Return a constant with zeros appended on an axis, up to a multiple of `count`."""
    from openvino import opset13 as op

    numbers = np.asarray(value.get_node().data)
    widths = [(0, -numbers.shape[axis] % count if index == axis else 0) for index in range(numbers.ndim)]
    return op.constant(np.pad(numbers, widths)).output(0)


def _computed_bias(node: Any) -> tuple[Any, Any, int] | None:
    """Return the node that adds a number per channel, such as a timestep's; what holds them, and where they begin."""
    found, shape = addition(node), list(node.get_output_shape(0))
    if (
        found is None
        or list(found[0].get_output_shape(0)) != shape
        or list(found[1].get_shape()) != [1, shape[1], 1, 1]
    ):
        return None
    user, numbers = found
    while numbers.get_node().get_type_name() in ("Reshape", "Unsqueeze"):
        numbers = numbers.get_node().input_value(0)
    whole, first = part_of(numbers)
    is_row = math.prod(list(whole.get_shape())[:-1]) == 1  # so that its parts are contiguous
    return (user, whole, first) if is_row else (user, numbers, 0)


def _before(value: Any) -> tuple[GroupNorm, np.ndarray, np.ndarray] | None:
    """Return the GroupNorm, weight and bias in SiLU(GroupNorm(…)); of no groups for a SiLU alone with one reader."""
    for active, gate in orders(value.get_node(), "Multiply"):
        if gate.get_node().get_type_name() == "Sigmoid" and is_same(gate.get_node().input_value(0), active):
            ones = np.ones(active.get_shape()[1], np.float32)
            alone = (GroupNorm(active, 0, 0.0), ones, 0 * ones) if only_user(value.get_node()) is not None else None
            return affine_group_norm(active) or alone
    return None
