"""Attention as one operation: it computes scores, weights and means for a few rows at a time, and copies no heads.

Layer 4. Exported attention is a product, a softmax and a product, all of transposed heads. OpenVINO copies heads that
are channels of something wider, or of the same tokens in several frames. A stream's attention, of one frame to those
before it, is exported as sums of products of whole tensors. The operation is in operations/.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.openvino_operations import Operations, operations
from posecrafter_rt.engines.openvino_patterns import (
    FOUR,
    is_same,
    is_transpose,
    known,
    only_user,
    orders,
    part_of,
)

if TYPE_CHECKING:
    import openvino

ROWS_LAST = [0, 2, 1, 3]  # (N, n, heads, width) to (N, heads, n, width), or (G, F, n, C) to (G, n, F, C); and back
KEYS_LAST = [0, 2, 3, 1]  # to (N, heads, width, n)
HIDDEN = -1e29  # lower scores have no weight


class Heads(NamedTuple):
    """Queries, keys or values: a tensor (…, heads · width), and its other dimensions in the operation's form."""

    source: Any
    heads: int
    width: int
    dims: list[int]

    def tokens(self) -> tuple[Any, int]:
        """Return the tensor in these dimensions, or the wider one that it is part of; and its first channel there."""
        from openvino import opset13 as op

        whole, first = part_of(self.source)
        shape = [*self.dims, whole.get_shape()[-1]]
        is_there = list(whole.get_shape()) == shape
        return whole if is_there else op.reshape(whole, shape, special_zero=False).output(0), first


class Scores(NamedTuple):
    """Queries and keys, both with transposed heads, whose products are the scores; and the scores' divisor."""

    query: Any
    key: Any
    divisor: float


def use_attention(model: openvino.Model, precision: Precision = "fp32") -> int:
    """Replace every known form of attention in a float32 model of fixed shapes, in place; return how many.

    precision: for attention to tokens of a picture or a text, int8 has products in 8 and 16 bits, and fp16 with AMX has
        products of pairs of 16-bit floats. All others are in float32.
    """
    available = operations(precision)
    if available is None:
        return 0
    softmaxes = [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]
    return sum(_attend(node, available) or _attend_masked(node, available) for node in softmaxes)


def _attend(softmax: Any, available: Operations) -> bool:
    """Replace attention over transposed heads: to tokens of a picture, or to the same token in several frames."""
    scores, weighted = _scores(softmax.input_value(0)), only_user(softmax)
    if scores is None or weighted is None or not _is_product(weighted):
        return False
    joined, is_last = only_user(weighted), softmax.get_attributes()["axis"] in (-1, 3)
    if not is_last or not is_same(weighted.input_value(0), softmax.output(0)) or not is_transpose(joined, ROWS_LAST):
        return False
    query, key = _transposed(scores.query, ROWS_LAST), _transposed(scores.key, KEYS_LAST) or _turned_keys(scores.key)
    value = _transposed(weighted.input_value(1), ROWS_LAST)
    if query is None or key is None or value is None:
        return False
    found, last = [query, key, value], _turned_back(joined)
    if last is not None and all(is_transpose(each.source.get_node(), ROWS_LAST) for each in found):
        before = [each.source.get_node().input_value(0) for each in found]
        if list(before[0].get_shape()) == list(last.get_output_shape(0)) and query.dims[1] == before[0].get_shape()[1]:
            joined = last  # over frames
            found = [each._replace(source=value, dims=list(value.get_shape())[:3])
                     for each, value in zip(found, before, strict=True)]  # fmt: skip
    return _replace(joined, found, scores.divisor, available)


def _scores(value: Any) -> Scores | None:
    """Return a value's scores: divided, or of queries and keys that were both scaled, as in torch's own attention."""
    scaled = _scaled(value)
    product, divisor = (value.get_node(), 1.0) if scaled is None else scaled
    if not _is_product(product):
        return None
    factors = [_multiplied(given) for given in product.input_values()]
    (query, by), (key, also_by) = factors
    return Scores(query, key, divisor / (by * also_by)) if by > 0 < also_by else None


def _multiplied(value: Any) -> tuple[Any, float]:
    """Return what a value is before one number multiplies it, and that number; itself and 1 if none does."""
    for before, factor in orders(value.get_node(), "Multiply"):
        number = known(factor)
        if number is not None and number.size == 1:
            return before, float(number.item())
    return value, 1.0


def _turned_keys(value: Any) -> Heads | None:
    """Return the heads of keys (N, heads, width, n) that were transposed while (N · heads, n, width) in shape."""
    reshape = value.get_node()
    if reshape.get_type_name() != "Reshape" or len(value.get_shape()) != 4:
        return None
    turned, (batch, heads, width, tokens) = reshape.input_value(0).get_node(), value.get_shape()
    before = turned.input_value(0).get_node() if is_transpose(turned, [0, 2, 1]) else None
    if before is None or before.get_type_name() != "Reshape":
        return None
    rows = before.input_value(0)
    is_turned = list(turned.get_output_shape(0)) == [batch * heads, width, tokens]
    is_turned = is_turned and list(rows.get_shape()) == [batch, heads, tokens, width]
    return _transposed(rows, ROWS_LAST) if is_turned else None


def _turned_back(joined: Any) -> Any | None:
    """Return the node that makes (G, F, n, C) of (G · n, F, heads, width), if nothing else reads these."""
    reshape = only_user(joined)
    last = None if reshape is None or reshape.get_type_name() != "Reshape" else only_user(reshape)
    return last if is_transpose(last, ROWS_LAST) else None


def _attend_masked(softmax: Any, available: Operations) -> bool:
    """Replace a stream's attention, masked sums of (N, F, 1, n · heads, width) · (N, 1, K, n · heads, width)."""
    select, weighted = softmax.input_value(0).get_node(), only_user(softmax)
    if select.get_type_name() != "Select" or softmax.get_attributes()["axis"] != 2 or weighted is None:
        return False
    mask, value, otherwise = select.input_values()
    scores, hidden, means = _scaled(value), known(otherwise), only_user(weighted)
    pair, weighed = None if scores is None else _summed(scores[0], 4), _summed(means, 2)
    if scores is None or pair is None or weighed is None or hidden is None or (hidden > HIDDEN).any():
        return False
    query, key, values = _spread(pair[0], 2), _spread(pair[1], 1), _spread(weighed[1], 1)
    if not is_same(weighed[0], softmax.output(0)) or query is None or key is None or values is None:
        return False
    is_fitting = list(mask.get_shape()) == [key.dims[0], 1, key.dims[1], 1, 1]
    return is_fitting and _replace(means, [query, key, values], scores[1], available, mask)


def _replace(last: Any, found: list[Heads], scale: float, available: Operations, mask: Any | None = None) -> bool:
    """Replace what ends at node `last` with the operation, if it can compute that; return whether it can."""
    from openvino import opset13 as op

    query, key, value = found
    is_one = {(each.heads, each.width) for each in found} == {(query.heads, query.width)}
    is_fitting = key.dims == value.dims and [*query.dims[:1], *query.dims[2:]] == [*key.dims[:1], *key.dims[2:]]
    if not is_one or not is_fitting or not math.isclose(scale, math.sqrt(query.width), rel_tol=1e-5):
        return False
    (queries, query_at), (keys, key_at), (values, value_at) = (each.tokens() for each in found)
    inputs, own = [queries, keys, values], None
    if mask is not None:
        own = _apart(keys) if is_same(keys, values) else None
        inputs[1:] = [keys, values] if own is None else [own[0]] * 2
        inputs.append(op.reshape(mask, key.dims[:2], special_zero=False).output(0))
        inputs += own[1:] if own is not None else []
    attributes = {"heads": query.heads, "width": query.width, "query_at": query_at, "key_at": key_at, "value_at": value_at,
                  "has_own": own is not None, "in_bytes": available.precision == "int8" and query.width % FOUR == 0,
                  "in_halves": available.precision == "fp16"}  # fmt: skip
    made = available.factory.create("Attention", inputs, attributes)
    last.output(0).replace(op.reshape(made, list(last.get_output_shape(0)), special_zero=False).output(0))
    return True


def _apart(tokens: Any) -> list[Any] | None:
    """Return the two parts that tokens were joined of: those of other frames, and the frame's own."""
    concat = tokens.get_node()
    if concat.get_type_name() != "Concat" or concat.get_attributes()["axis"] % 4 != 1 or len(tokens.get_shape()) != 4:
        return None
    parts = concat.input_values()
    return parts if len(parts) == 2 and parts[1].get_shape()[1] == 1 else None


def _scaled(value: Any) -> tuple[Any, float] | None:
    """Return the node whose output a number divides, and that number."""
    divide = value.get_node()
    divisor = known(divide.input_value(1)) if divide.get_type_name() == "Divide" else None
    return None if divisor is None or divisor.size != 1 else (divide.input_value(0).get_node(), float(divisor.item()))


def _is_product(node: Any) -> bool:
    facts = node.get_attributes()
    return node.get_type_name() == "MatMul" and not facts["transpose_a"] and not facts["transpose_b"]


def _transposed(value: Any, order: list[int]) -> Heads | None:
    """Return the heads (N, n, heads, width) that a value has in this order."""
    transpose = value.get_node()
    if not is_transpose(transpose, order) or transpose.input_value(0).get_node().get_type_name() != "Reshape":
        return None
    reshape = transpose.input_value(0).get_node()
    source, (batch, rows, heads, width) = reshape.input_value(0), reshape.get_output_shape(0)
    return Heads(source, heads, width, [batch, rows]) if source.get_shape()[-1] == heads * width else None


def _summed(node: Any | None, axis: int) -> list[Any] | None:
    """Return the two values whose products a node sums over this axis."""
    if node is None or node.get_type_name() != "ReduceSum":
        return None
    product, axes = node.input_value(0).get_node(), known(node.input_value(1))
    is_over = axes is not None and (axes % len(product.get_output_shape(0))).tolist() == [axis]
    return product.input_values() if is_over and product.get_type_name() == "Multiply" else None


def _spread(value: Any, axis: int) -> Heads | None:
    """Return tokens (N, F, n, C) whose heads became rows, (N, F, n · heads, width), with a new axis inserted here."""
    unsqueeze = _unconverted(value).get_node()
    axes = known(unsqueeze.input_value(1)) if unsqueeze.get_type_name() == "Unsqueeze" else None
    if axes is None or (axes % len(value.get_shape())).tolist() != [axis]:
        return None
    reshape = _unconverted(unsqueeze.input_value(0)).get_node()
    if reshape.get_type_name() != "Reshape" or len(reshape.get_input_shape(0)) != 4:
        return None
    batch, frames, tokens, channels = reshape.get_input_shape(0)
    width = reshape.get_output_shape(0)[-1]
    heads = channels // width
    is_made = list(reshape.get_output_shape(0)) == [batch, frames, tokens * heads, width] and heads * width == channels
    return Heads(reshape.input_value(0), heads, width, [batch, frames, tokens]) if is_made else None


def _unconverted(value: Any) -> Any:
    """Return a value as it is before type conversions that change nothing."""
    while value.get_node().get_type_name() in ("Convert", "ConvertLike"):
        before = value.get_node().input_value(0)
        if before.get_element_type() != value.get_element_type():
            break
        value = before
    return value
