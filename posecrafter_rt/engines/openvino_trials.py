"""Trials of the operations for OpenVINO, once they are compiled: small models by its own operations and by ours.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from posecrafter_rt.engines.base import Precision
from posecrafter_rt.models.doubling import fold_doubling

if TYPE_CHECKING:
    from posecrafter_rt.engines.openvino_operations import Vectors


def all_trials(factory: Any, pixels: Any) -> list[Trial]:
    """Return trials of each operation in each of its ways. pixels: (F, lanes, h, w), a model's input."""
    return [trial for make in (convolutions, linear_maps, attentions) for trial in make(factory, pixels)]


class Trial(NamedTuple):
    """Makes the same output by OpenVINO's operations and by one of ours."""

    own: Callable[[], Any]
    ours: Callable[[], Any]
    precision: Precision = "fp32"
    is_narrow: bool = False  # whether products are in that precision, too

    def suits(self, vectors: Vectors) -> bool:
        """Whether operations compiled for these vectors can do it."""
        return not self.is_narrow or vectors.has_vnni


def _constant(*shape: int) -> Any:
    from openvino import opset13 as op

    return op.constant(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


def convolutions(factory: Any, pixels: Any) -> list[Trial]:
    """Return trials: tiles of both sizes, a doubled picture, GroupNorm and SiLU before, few channels, a residual."""
    from openvino import opset13 as op

    frames, lanes, height, width = pixels.get_output_shape(0)
    weight, bias = _constant(2 * lanes, lanes, 3, 3), _constant(2 * lanes)
    scale, shift = _constant(lanes), _constant(lanes)

    def by_channel(values: Any) -> Any:
        return op.unsqueeze(values, np.array([1, 2]))

    def own(of: Any, stride: int = 1) -> Any:
        return op.add(op.convolution(of, weight, [stride] * 2, [1, 1], [1, 1], [1, 1]), by_channel(bias))

    def ours(*more: Any, weight: Any = weight, **attributes: Any) -> Any:
        return factory.create(
            "FusedConvolution", [node.output(0) for node in (pixels, weight, bias, *more)], attributes
        )

    folded = op.constant(fold_doubling(torch.tensor(weight.data)).numpy())
    rows, columns = (np.repeat(np.arange(side), 2) for side in (height, width))
    doubled = op.gather(op.gather(pixels, rows, np.int64(2)), columns, np.int64(3))
    grouped = op.reshape(pixels, np.array([frames, 4, -1]), special_zero=False)
    normed = op.mvn(grouped, np.array([2]), True, 1e-5, "INSIDE_SQRT")
    normed = op.reshape(normed, np.array([frames, lanes, height, width]), special_zero=False)
    normed = op.add(op.multiply(normed, by_channel(scale)), by_channel(shift))
    active, residual = op.multiply(normed, op.sigmoid(normed)), op.concat([pixels, pixels], 1)
    norm, few = partial(ours, scale, shift, groups=4, eps=1e-5), op.constant(np.arange(3))
    active_alone = op.multiply(pixels, op.sigmoid(pixels))
    ones, zeros = (op.constant(np.full(lanes, value, np.float32)) for value in (1, 0))
    alone = partial(ours, ones, zeros, groups=0)
    return [Trial(partial(own, pixels), ours), Trial(partial(own, pixels), partial(ours, tile=2)),
            Trial(partial(own, doubled), partial(ours, times=2)), Trial(partial(own, active), norm),
            Trial(lambda: op.add(own(pixels), residual), partial(ours, residual)),
            Trial(lambda: op.gather(own(active_alone), few, np.int64(1)), partial(alone, planes=3)),
            Trial(partial(own, active), partial(norm, tile=2, in_halves=True), "fp16"),
            *(Trial(wanted, partial(found, tile=0, in_halves=precision == "fp16"), precision, is_narrow=True)
              for precision in ("fp16", "int8")
              for wanted, found in ((partial(own, pixels, 2), partial(ours, stride=2)),
                                    (partial(own, doubled), partial(ours, times=2, weight=folded)),
                                    (partial(own, active_alone), alone),
                                    (lambda: op.add(own(active), residual), partial(norm, residual))))]  # fmt: skip


def linear_maps(factory: Any, pixels: Any) -> list[Trial]:
    """Return trials: pixels to pixels with a residual, a gated layer of tokens, one after that with a residual, after a
    norm, tokens to two outputs.
    """
    from openvino import opset13 as op

    frames, lanes, height, width = pixels.get_output_shape(0)
    weight, bias, residual = _constant(8 * lanes, lanes), _constant(8 * lanes), op.concat([pixels] * 8, 1)
    flat = op.reshape(pixels, np.array([frames, lanes, height * width]), special_zero=False)
    tokens = op.transpose(flat, np.array([0, 2, 1]))
    mapped = op.add(op.matmul(tokens, weight, False, True), bias)
    shape = np.array([frames, 8 * lanes, height, width])
    planes = op.reshape(op.transpose(mapped, np.array([0, 2, 1])), shape, special_zero=False)
    value, gate = op.split(mapped, np.array(2), 2).outputs()
    gated = op.multiply(value, op.gelu(gate, "erf"))
    back, shift, added = _constant(6 * lanes, 4 * lanes), _constant(6 * lanes), op.concat([tokens] * 6, 2)
    fed = op.add(op.add(op.matmul(gated, back, False, True), shift), added)

    def ours(*inputs: Any, **attributes: Any) -> Any:
        return factory.create("Linear", [node.output(0) for node in inputs], attributes)

    to_planes = partial(ours, pixels, weight, bias, residual, height=height)
    feed = partial(ours, tokens, weight, bias, back, shift, added, is_gated=True)
    scale, shift = _constant(lanes), _constant(lanes)

    def normed_tokens() -> Any:
        centred = op.mvn(tokens, np.array([2]), True, 1e-5, "INSIDE_SQRT")
        return op.add(op.matmul(op.add(op.multiply(centred, scale), shift), weight, False, True), bias)

    def normed_planes() -> Any:
        grouped = op.reshape(pixels, np.array([frames, 4, -1]), special_zero=False)
        centred = op.reshape(
            op.mvn(grouped, np.array([2]), True, 1e-5, "INSIDE_SQRT"), flat.get_output_shape(0), special_zero=False
        )
        rows = op.transpose(centred, np.array([0, 2, 1]))
        return op.add(op.matmul(op.add(op.multiply(rows, scale), shift), weight, False, True), bias)

    def both(**attributes: Any) -> Any:
        parts = ours(tokens, scale, shift, weight, bias, eps=1e-5, widths=[2 * lanes, 6 * lanes], **attributes)
        return op.concat(parts.outputs(), 2)

    of_planes = partial(ours, pixels, scale, shift, weight, bias, eps=1e-5, groups=4)
    owns = [lambda: op.add(planes, residual), lambda: gated, lambda: fed]
    return [Trial(normed_tokens, both), Trial(normed_planes, of_planes),
            Trial(normed_tokens, partial(both, in_bytes=True), "int8", is_narrow=True), Trial(owns[0], to_planes), Trial(owns[1], partial(ours, tokens, weight, bias, is_gated=True)),
            Trial(owns[2], feed), Trial(owns[2], partial(feed, in_halves=True), "fp16"),
            Trial(owns[0], partial(to_planes, in_bytes=True), "int8", is_narrow=True),
            Trial(owns[2], partial(feed, in_bytes=True), "int8", is_narrow=True)]  # fmt: skip


def attentions(factory: Any, pixels: Any) -> list[Trial]:
    """Return trials: a picture's tokens to each other, to the same ones in all frames or in one; keys beside values."""
    from openvino import opset13 as op

    frames, lanes, height, width = pixels.get_output_shape(0)
    flat = op.reshape(pixels, np.array([frames, lanes, height * width]), special_zero=False)
    query = op.transpose(flat, np.array([0, 2, 1]))
    key, value = op.multiply(query, op.constant(np.float32(-0.5))), op.sin(query)
    both = op.concat([key, value], 2)

    def heads(tokens: Any, order: list[int]) -> Any:
        batch, rows, channels = tokens.get_output_shape(0)
        return op.transpose(
            op.reshape(tokens, np.array([batch, rows, 2, channels // 2]), special_zero=False), np.array(order)
        )

    def attend(query: Any, key: Any, value: Any) -> Any:
        scores = op.matmul(heads(query, [0, 2, 1, 3]), heads(key, [0, 2, 3, 1]), False, False)
        weights = op.softmax(op.divide(scores, op.constant(np.float32((lanes // 2) ** 0.5))), 3)
        means = op.transpose(op.matmul(weights, heads(value, [0, 2, 1, 3]), False, False), np.array([0, 2, 1, 3]))
        return op.reshape(means, np.array(query.get_output_shape(0)), special_zero=False)

    def over_frames() -> Any:
        turned = (op.transpose(tokens, np.array([1, 0, 2])) for tokens in (query, key, value))
        return op.unsqueeze(op.transpose(attend(*turned), np.array([1, 0, 2])), np.array(0))

    def first_frame() -> Any:
        first = op.gather(value, np.zeros(frames, np.int64), np.int64(0))
        return op.unsqueeze(first, np.array(0))

    def own_apart() -> Any:
        """Attend from the last frame to the others, which the mask hides, and to itself."""
        ends = [op.gather(tokens, np.arange(first, last), np.int64(0)) for tokens in (query, both)
                for first, last in ((0, frames - 1), (frames - 1, frames))]  # fmt: skip
        queries, others, own = (op.unsqueeze(tokens, np.array(0)) for tokens in ends[1:])
        mask = op.constant(np.arange(frames)[None] >= frames - 1)
        attributes = {"heads": 2, "width": lanes // 2, "value_at": lanes, "has_own": True}
        given = [node.output(0) for node in (queries, others, others, mask, own)]
        return factory.create("Attention", given, attributes)

    def last_frame() -> Any:
        return op.unsqueeze(op.gather(value, np.arange(frames - 1, frames), np.int64(0)), np.array(0))

    def ours(*inputs: Any, is_over_frames: bool = False, **attributes: Any) -> Any:
        given = [op.unsqueeze(node, np.array(0)) if is_over_frames else node for node in inputs[:3]]
        attributes |= {"heads": 2, "width": lanes // 2, "value_at": lanes}
        return factory.create("Attention", [node.output(0) for node in (*given, *inputs[3:])], attributes)

    tokens, own, mask = (
        (query, both, both),
        partial(attend, query, key, value),
        op.constant(np.arange(frames)[None] == 0),
    )
    return [Trial(own, partial(ours, *tokens)), Trial(own, partial(ours, *tokens, in_bytes=True), "int8", is_narrow=True),
            Trial(own, partial(ours, *tokens, in_halves=True), "fp16", is_narrow=True),
            Trial(last_frame, own_apart), Trial(over_frames, partial(ours, *tokens, is_over_frames=True)),
            Trial(first_frame, partial(ours, *tokens, mask, is_over_frames=True))]  # fmt: skip
