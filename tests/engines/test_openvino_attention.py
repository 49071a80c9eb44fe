"""Attention against PyTorch's in float64, in eight bits against that of what is rounded alike, and what is left alone.

Tests of posecrafter_rt/engines/openvino_attention.py and openvino_patterns.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor

from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.openvino_attention import use_attention
from posecrafter_rt.export.verify import relative_error
from tests.engines.openvino_models import (
    compiled,
    constant,
    draw,
    infer,
    kinds,
    of_three_frames,
    parameter,
    reshaped,
    run,
)

EXACT = 3e-6  # of the largest output, in float32
COARSE = 0.03  # what eight bits lose, as a root of mean squares
NEARER = 8  # times, to what is rounded alike than to what is not: a half that float32 rounds otherwise is a step off
ROWS_LAST, KEYS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)


class Shape(NamedTuple):
    """Of queries (batch, rows, places, heads · width), and how many keys they have."""

    batch: int
    rows: int
    keys: int
    places: int
    heads: int
    width: int

    @property
    def channels(self) -> int:
        return self.heads * self.width


def turned(value: Any, *order: int) -> Any:
    return op.transpose(value, np.array(order))


def shape_of(tokens: Any) -> list[int]:
    return list(tokens.get_shape() if isinstance(tokens, openvino.Output) else tokens.get_output_shape(0))


def heads(tokens: Any, shape: Shape, order: tuple[int, ...]) -> Any:
    """Of tokens (…, n, C)."""
    return turned(reshaped(tokens, -1, shape_of(tokens)[-2], shape.heads, shape.width), *order)


def root(width: int) -> Any:
    """The root of a width as it is exported: computed from a shape, in the type of a tensor."""
    return op.sqrt(op.convert_like(constant(torch.tensor([width])), constant(torch.zeros(1))))


def attend(query: Any, key: Any, value: Any, shape: Shape, scale: Any = None, axis: int = -1) -> Any:
    """(…, n, C) to (…, m, C), as `posecrafter::keyframe_attention` is exported."""
    scores = op.matmul(heads(query, shape, ROWS_LAST), heads(key, shape, KEYS_LAST), False, False)
    weights = op.softmax(op.divide(scores, root(shape.width) if scale is None else scale), axis)
    means = turned(op.matmul(weights, heads(value, shape, ROWS_LAST), False, False), *ROWS_LAST)
    return reshaped(means, *query.get_output_shape(0))


def of_a_picture(given: list[Any], shape: Shape) -> Any:
    """Keys and values apart."""
    return attend(*given, shape)


def of_a_text(given: list[Any], shape: Shape) -> Any:
    """Keys and values are halves of a part of something wider."""
    query, key, value = given
    more = constant(draw(*key.get_output_shape(0)[:2], 5))
    begin, end, step, axis = (constant(torch.tensor([number])) for number in (5, 5 + 2 * shape.channels, 1, 2))
    both = op.slice(op.concat([more, key, value, more], 2), begin, end, step, axis)
    return attend(query, *op.split(both, np.array(-1), 2).outputs(), shape)


def as_torch_does(given: list[Any], shape: Shape) -> Any:
    """Queries and keys are multiplied by the fourth root each, and keys turned by way of three dimensions."""
    query, key, value = (heads(each, shape, ROWS_LAST) for each in given)
    batch, rows = shape.batch, given[1].get_output_shape(0)[-2]
    turned_keys = turned(reshaped(key, batch * shape.heads, rows, shape.width), 0, 2, 1)
    turned_keys = reshaped(turned_keys, batch, shape.heads, shape.width, rows)
    root = constant(torch.tensor([shape.width**-0.25]))
    scores = op.matmul(op.multiply(query, root), op.multiply(turned_keys, root), False, False)
    means = turned(op.matmul(op.softmax(scores, -1), value, False, False), *ROWS_LAST)
    return reshaped(means, *given[0].get_output_shape(0))


def over_frames(given: list[Any], shape: Shape) -> Any:
    """As `posecrafter::temporal_attention` is: tokens (G, F, n, C) come as (G, n, F, C)."""
    found = attend(*(turned(each, *ROWS_LAST) for each in given), shape)
    return turned(found, *ROWS_LAST)


def masked(given: list[Any], shape: Shape, mask: Any, least: float = -1e30) -> Any:
    """A stream's, to keys for which a mask (N, K) is true."""
    query, key, value = given

    def spread(tokens: Any, axis: int) -> Any:
        rows = reshaped(tokens, *shape_of(tokens)[:2], -1, shape.width)
        return op.convert(op.unsqueeze(rows, np.array([axis])), np.float32)

    scores = op.reduce_sum(op.multiply(spread(query, 2), spread(key, 1)), np.array([-1]), keep_dims=True)
    chosen = op.unsqueeze(op.unsqueeze(mask, np.array([1])), np.array([3, 4]))
    hidden = op.select(chosen, op.divide(scores, root(shape.width)), constant(torch.tensor(least)))
    means = op.reduce_sum(op.multiply(op.softmax(hidden, 2), spread(value, 1)), np.array([2]), keep_dims=False)
    return reshaped(op.convert_like(means, query), *query.get_output_shape(0))


def scores_of(query: Tensor, key: Tensor, shape: Shape) -> Tensor:
    """(batch, places, heads, rows, keys)"""
    return by_head(query, shape) @ by_head(key, shape).mT / math.sqrt(shape.width)


def by_head(tokens: Tensor, shape: Shape) -> Tensor:
    """(batch, rows, places, C) → (batch, places, heads, rows, width), in float64."""
    return tokens.double().unflatten(-1, (shape.heads, shape.width)).permute(0, 2, 3, 1, 4)


def joined(means: Tensor) -> Tensor:
    """The opposite."""
    return means.permute(0, 3, 1, 2, 4).flatten(-2)


def reference(given: list[Tensor], shape: Shape, mask: Tensor | None = None) -> Tensor:
    """(batch, rows, places, C)"""
    scores = scores_of(given[0], given[1], shape)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, None], -1e30)
    return joined(scores.softmax(-1) @ by_head(given[2], shape))


def drawn(shape: Shape) -> list[Tensor]:
    """Query, key and value."""
    query = 2 * draw(shape.batch, shape.rows, shape.places, shape.channels, seed=1)
    return [query, *(draw(shape.batch, shape.keys, shape.places, shape.channels, seed=seed) for seed in (2, 3))]


Build = Callable[[list[Any], Shape], Any]


def model_of(build: Build, shape: Shape) -> tuple[openvino.Model, list[Tensor]]:
    """A model and its inputs, of three dimensions where there is one place."""
    given = drawn(shape)
    if build is not over_frames:
        given = [tensor[:, :, 0] for tensor in given]
    inputs = [parameter(tensor) for tensor in given]
    return openvino.Model([build(inputs, shape)], inputs), given


PICTURES = [
    Shape(1, 1, 1, 1, 1, 8),
    Shape(2, 7, 77, 1, 2, 40),  # keys that are no whole panel, a head that is none
    Shape(1, 13, 33, 1, 3, 4),
    Shape(3, 15, 16, 1, 1, 64),
    Shape(1, 320, 320, 1, 2, 64),
    Shape(1, 450, 80, 1, 3, 40),  # rows are divided among threads
    Shape(1, 130, 40, 1, 1, 12),
    Shape(2, 30, 1100, 1, 1, 160),  # more keys than are summed at once
]  # fmt: skip
FRAMES = [
    Shape(1, 1, 1, 5, 2, 8),
    Shape(2, 4, 4, 9, 2, 20),
    Shape(1, 12, 12, 3, 1, 40),  # as many as are not packed
    Shape(1, 13, 13, 4, 2, 64),
    Shape(2, 33, 33, 2, 3, 7),
]  # fmt: skip
CASES = [*((build, shape) for build in (of_a_picture, of_a_text, as_torch_does) for shape in PICTURES),
         *((over_frames, shape) for shape in FRAMES)]  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), CASES)
def test_it_is_attention(build: Build, shape: Shape, lanes: int) -> None:
    model, given = model_of(build, shape)
    assert use_attention(model) == 1
    model.validate_nodes_and_infer_types()
    assert kinds(model)["Attention"] == 1 and not {"MatMul", "Softmax", "Split", "Slice", "Transpose"} & set(
        kinds(model)
    )
    found = run(model, *given)[0]
    assert relative_error(found.reshape(drawn(shape)[0].shape), reference(drawn(shape), shape)) < EXACT


@pytest.mark.parametrize("number", [3, 4])
def test_a_frames_own_key_that_is_not_given_is_missed(number: int, operation: None) -> None:
    available = operations.operations()
    assert available is not None
    inputs = [op.parameter(shape, np.float32).output(0) for shape in ([1, 2, 3, 8], *[[1, 4, 3, 8]] * 2)]
    mask = op.parameter([1, 5], np.bool_).output(0)
    with pytest.raises(RuntimeError, match="no query, key and value"):
        available.factory.create("Attention", [*inputs, mask][:number], {"heads": 1, "width": 8, "has_own": True})


MASKED = [Shape(1, 1, 5, 12, 2, 64), Shape(3, 1, 1, 4, 1, 8), Shape(2, 3, 7, 5, 3, 20), Shape(1, 1, 32, 6, 2, 40)]


def run_masked(shape: Shape, given: list[Tensor], mask: Tensor) -> Tensor:
    chosen = op.parameter(list(mask.shape), np.bool_)
    inputs = [parameter(tensor) for tensor in given]
    model = openvino.Model([masked(inputs, shape, chosen)], [*inputs, chosen])
    assert use_attention(model) == 1
    assert kinds(model)["Attention"] == 1 and not {"ReduceSum", "Softmax", "Select"} & set(kinds(model))
    return run(model, *given, mask)[0]


@pytest.mark.parametrize("shape", [shape for shape in MASKED if shape.keys > 1])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_frames_own_key_is_read_where_it_lies(shape: Shape, is_last: bool, lanes: int) -> None:
    """If it comes after the others, as a stream's does."""
    query, key, value = drawn(shape)
    mask = (torch.arange(shape.keys) + torch.arange(shape.batch)[:, None]) % 3 != 1
    others, own = torch.cat([key, value], -1).split([shape.keys - 1, 1] if is_last else [1, shape.keys - 1], 1)
    given, chosen = [query, others, own], op.parameter(list(mask.shape), np.bool_)
    inputs = [parameter(tensor.contiguous()) for tensor in given]
    parts = op.split(op.concat(inputs[1:], 1), np.array(3), 2).outputs()
    model = openvino.Model([masked([inputs[0], *parts], shape, chosen)], [*inputs, chosen])
    assert use_attention(model) == 1
    assert kinds(model)["Concat"] == (not is_last)
    found = run(model, *(tensor.contiguous() for tensor in given), mask)[0]
    assert relative_error(found, reference([query, key, value], shape, mask)) < EXACT


@pytest.mark.parametrize("shape", MASKED)
def test_a_mask_hides_keys(shape: Shape, lanes: int) -> None:
    """Others in each batch, whatever they are; where all are hidden each weighs as much."""
    given = drawn(shape)
    mask = (torch.arange(shape.keys) + torch.arange(shape.batch)[:, None]) % 3 != 1
    for chosen in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
        assert relative_error(run_masked(shape, given, chosen), reference(given, shape, chosen)) < EXACT
    if bool(mask.any(1).all()):
        given[1][~mask] = math.nan
        found, finite = run_masked(shape, given, mask), [given[0], given[1].nan_to_num(), given[2]]
        assert relative_error(found, reference(finite, shape, mask)) < EXACT


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("build", "shape"), CASES)
def test_it_depends_on_no_threads(build: Build, shape: Shape, precision: Precision, lanes: int, request: Any) -> None:
    if precision == "int8":
        request.getfixturevalue("byte_operation")
    model, given = model_of(build, shape)
    assert use_attention(model, precision) == 1
    assert all(map(torch.equal, run(model, *given), run(model, *given, num_threads=1)))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_two_threads_at_once(precision: Precision, lanes: int, request: Any) -> None:
    if precision == "int8":
        request.getfixturevalue("byte_operation")
    model, given = model_of(of_a_picture, Shape(2, 99, 77, 1, 3, 40))
    assert use_attention(model, precision) == 1
    shared, queries = compiled(model, NUM_STREAMS=2), [draw(2, 99, 120, seed=seed) for seed in range(6)]
    alone = [run(model, query, *given[1:]) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            again = pool.map(lambda query: infer(shared.create_infer_request(), query, *given[1:]), queries)
            assert all(all(map(torch.equal, *pair)) for pair in zip(again, alone, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(number: float, precision: Precision, lanes: int, request: Any) -> None:
    """In a query: its row; in a key: all rows, unless it hides that key; in a value: its channel, or in bytes its column."""
    if precision == "int8":
        request.getfixturevalue("byte_operation")
    shape = Shape(1, 20, 40, 1, 2, 8)
    model, given = model_of(of_a_picture, shape)
    assert use_attention(model, precision) == 1
    query, key, value = (tensor.clone() for tensor in given)
    query[0, 3, 1] = number
    found = run(model, query, key, value)[0][0]
    assert bool(found[3, :8].isnan().all())
    found[3, :8] = 0
    assert bool(found.isfinite().all())
    value[0, 5, 9] = number
    found = run(model, given[0], key, value)[0][0]
    assert not bool(found[:, 9].isfinite().any())
    assert bool(found[:, :9].isfinite().all())
    key[0, 7, 2] = math.nan
    assert bool(run(model, given[0], key, given[2])[0][0, :, :8].isnan().all())


def test_scores_of_any_size(lanes: int) -> None:
    """The largest weighs all, without an overflow."""
    shape = Shape(1, 4, 40, 1, 1, 8)
    model, (query, key, value) = model_of(of_a_picture, shape)
    assert use_attention(model) == 1
    given = [query * 1e6, key * 1e6, value]
    found, expected = run(model, *given)[0], reference([each[:, :, None] for each in given], shape)[:, :, 0]
    assert relative_error(found, expected) < EXACT


def in_steps(values: Tensor, steps: int, dim: int) -> Tensor:
    """Rounded to so many steps of either sign, by the largest number along a dimension."""
    step = values.abs().amax(dim, keepdim=True) / steps
    return torch.where(step > 0, (values / step).round() * step, values)


@pytest.mark.parametrize(("build", "shape"), [case for case in CASES if case[0] is not over_frames])
def test_in_bytes_it_is_that_of_what_is_rounded(build: Build, shape: Shape, lanes: int, byte_operation: None) -> None:
    """Queries to 255 steps from the least to the most, keys to 127, weights to 14 bits, values to ten."""
    model, given = model_of(build, shape)
    assert use_attention(model, "int8") == 1
    found = run(model, *given)[0].double().reshape(drawn(shape)[0].shape)
    query, key, value = (by_head(tensor, shape) for tensor in drawn(shape))
    low, high = query.amin(-1, True), query.amax(-1, True)
    step = torch.where(high > low, (high - low) / 255, 1.0)
    scores = (((query - low) / step).round() * step + low) @ in_steps(key, 127, -1).mT / math.sqrt(shape.width)
    weights = ((scores - scores.amax(-1, True)).exp() * (2**14 - 1)).round()
    rounded = joined(weights / weights.sum(-1, True) @ in_steps(value, 2**9 - 1, -2))
    expected = reference(drawn(shape), shape)
    lost, missed = (float((found - other).square().mean().sqrt() / expected.square().mean().sqrt())
                    for other in (expected, rounded))  # fmt: skip
    assert lost < COARSE
    assert missed < lost / NEARER or missed < EXACT


def test_in_bytes_many_small_weights_beside_a_large_one_count(lanes: int, byte_operation: None) -> None:
    """4,096 keys, of which one has a score 6 above all others: these have together ten times its weight."""
    shape = Shape(1, 3, 4096, 1, 1, 8)
    query, key, value = drawn(shape)
    query[:], key[:] = 0, 0
    query[..., 0], key[..., 0] = 1.0, -6 * math.sqrt(8)
    key[:, 9] = 0
    model, _ = model_of(of_a_picture, shape)
    assert use_attention(model, "int8") == 1
    found = run(model, *(each[:, :, 0] for each in (query, key, value)))[0][:, :, None]
    assert relative_error(found, reference([query, key, value], shape)) < COARSE


def test_frames_stay_in_float32(lanes: int, byte_operation: None) -> None:
    model, given = model_of(over_frames, FRAMES[3])
    assert use_attention(model, "int8") == 1
    other, _ = model_of(over_frames, FRAMES[3])
    use_attention(other)
    assert torch.equal(run(model, *given)[0], run(other, *given)[0])


def test_heads_that_bytes_do_not_serve_stay_in_float32(lanes: int) -> None:
    model, _ = model_of(of_a_picture, Shape(1, 3, 5, 1, 2, 6))
    assert use_attention(model, "int8") == 1
    (node,) = (node for node in model.get_ops() if node.get_type_name() == "Attention")
    assert not node.get_attributes()["in_bytes"]


SHAPE = Shape(2, 6, 6, 1, 2, 8)
Graphs = dict[str, Callable[[Any, Any, Any], list[Any]]]


def parts(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Scores, weights and means by OpenVINO's own operations."""
    scores = op.divide(op.matmul(heads(query, SHAPE, ROWS_LAST), heads(key, SHAPE, KEYS_LAST), False, False), root(8))
    weights = op.softmax(scores, -1)
    return scores, weights, op.matmul(weights, heads(value, SHAPE, ROWS_LAST), False, False)


LEFT_ALONE: Graphs = {
    "heads that are not turned": lambda q, k, v: [turned(op.matmul(parts(q, k, v)[1], reshaped(v, 2, 2, 6, 8), False, False), *ROWS_LAST)],
    "values that all heads share": lambda q, k, v: [turned(op.matmul(parts(q, k, v)[1], reshaped(op.gather(v, np.array([0]), np.int64(0)), 1, 6, 16), False, False), *ROWS_LAST)],
    "a root that is truncated": lambda q, k, v: [attend(q, k, v, SHAPE, op.convert(op.convert(root(8), np.int64), np.float32))],
    "another scale": lambda q, k, v: [attend(q, k, v, SHAPE, constant(torch.tensor(8.0)))],
    "a scale that is computed": lambda q, k, v: [attend(q, k, v, SHAPE, op.reduce_max(q, np.array([0, 1, 2])))],
    "a scale for each key": lambda q, k, v: [attend(q, k, v, SHAPE, constant(torch.full((6,), math.sqrt(8))))],
    "weights of queries": lambda q, k, v: [attend(q, k, v, SHAPE, axis=2)],
    "weights that are read, too": lambda q, k, v: [turned((p := parts(q, k, v))[2], *ROWS_LAST), p[1]],
    "means that are read, too": lambda q, k, v: [turned(m := parts(q, k, v)[2], *ROWS_LAST), op.relu(m)],
    "means that are turned otherwise": lambda q, k, v: [turned(parts(q, k, v)[2], 0, 2, 3, 1)],
    "means from the left": lambda q, k, v: [turned(op.matmul(heads(v, SHAPE, KEYS_LAST), parts(q, k, v)[1], False, False), *ROWS_LAST)],
    "scores that are added to": lambda q, k, v: [turned(op.matmul(op.softmax(op.add(parts(q, k, v)[0], constant(draw(6))), -1), heads(v, SHAPE, ROWS_LAST), False, False), *ROWS_LAST)],
    "heads of another width": lambda q, k, v: [attend(q, k, v, SHAPE._replace(heads=4, width=4), root(8))],
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_looks_different_is_left_alone(name: str, lanes: int) -> None:
    inputs = [op.parameter([2, 6, 16], np.float32) for _ in range(3)]
    model = openvino.Model(LEFT_ALONE[name](*inputs), inputs)
    before = kinds(model)
    assert use_attention(model) == 0 and kinds(model) == before


def test_frames_that_come_back_as_others_are_attended_to_as_they_are_given(lanes: int) -> None:
    """Of (2, 3, 6, C), turned to twelve times three rows, that come back as (4, 3, 3, C)."""
    given = [draw(2, 3, 6, 16, seed=seed) for seed in range(3)]
    inputs = [parameter(tensor) for tensor in given]

    def build() -> openvino.Model:
        means = attend(*(turned(each, *ROWS_LAST) for each in inputs), SHAPE)
        return openvino.Model([turned(reshaped(means, 4, 3, 3, 16), *ROWS_LAST)], inputs)

    model = build()
    assert use_attention(model) == 1
    assert [len(node.get_input_shape(0)) for node in model.get_ops() if node.get_type_name() == "Attention"] == [3]
    assert relative_error(run(model, *given)[0], run(build(), *given)[0].double()) < EXACT


def test_a_mask_that_hides_little_is_left_alone(lanes: int) -> None:
    given, mask = drawn(Shape(1, 1, 3, 4, 2, 8)), op.parameter([1, 3], np.bool_)
    inputs = [parameter(tensor) for tensor in given]
    model = openvino.Model([masked(inputs, Shape(1, 1, 3, 4, 2, 8), mask, least=-1.0)], [*inputs, mask])
    assert use_attention(model) == 0


@pytest.mark.parametrize(("network", "attentions"), [
    ("unet", 11), ("controlnet", 4), ("unet_stream", 11), ("controlnet_stream", 4),
])  # fmt: skip
def test_all_of_an_exported_network_are_found(
    network: str, attentions: int, openvino_networks: Path, lanes: int
) -> None:
    model = of_three_frames(openvino_networks, network)
    assert kinds(model)["Softmax"] == attentions
    assert use_attention(model) == attentions
    assert kinds(model)["Softmax"] == 0
    found = [node for node in model.get_ops() if node.get_type_name() == "Attention"]
    assert {len(node.get_input_shape(0)) for node in found} == ({3} if network.startswith("controlnet") else {3, 4})
    # Keys and values that are given, as a text's always are, lie beside each other and are read where they do.
    beside = [node for node in found if node.get_attributes()["value_at"] > node.get_attributes()["key_at"]]
    assert len(beside) == (attentions if network.endswith("stream") else (4 if network == "unet" else 2))
    assert not {"Split", "VariadicSplit"} & {
        node.input_value(index).get_node().get_type_name() for node in found for index in (1, 2)
    }
