"""Linear maps against PyTorch's in float64, and what is left alone.

Tests of posecrafter_rt/engines/openvino_linear.py and openvino_patterns.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor
from torch.nn import functional

from posecrafter_rt.engines import openvino_linear
from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.openvino_linear import use_linear
from posecrafter_rt.engines.openvino_operations import hold_weights
from posecrafter_rt.export.verify import relative_error
from tests.engines.openvino_models import (
    LAYOUTS,
    Shape,
    compiled,
    constant,
    convolved,
    draw,
    gated,
    infer,
    kinds,
    layer,
    layers,
    linear_map,
    of_three_frames,
    parameter,
    product,
    reference,
    reshaped,
    run,
    to_tokens,
)

ROUNDING = 2.0**-24  # of one float32
REPLACED = {"Parameter", "Constant", "Linear", "Result"}  # all that is left


def exact(channels: int, is_gated: bool = False) -> float:
    """What float32 allows, of the largest output: a sum's roundings add up to the root of their number, and two are gated."""
    return ROUNDING * (4 + math.sqrt(channels)) * (2 if is_gated else 1)


@pytest.mark.parametrize("shape", [
    (1, (1, 1), 16, 1),  # one row
    (1, (1, 13), 5, 1),  # one less than AVX-512 takes at once; tokens of any number of channels
    (2, (3, 5), 40, 3),
    (25, (4, 4), 32, 2),  # many frames in a chunk
    (2, (13, 13), 64, 1),  # a token more than a chunk
    (3, (8, 21), 48, 1),  # whole chunks
    (5, (9, 11), 320, 20),  # chunks that end within a frame
    (2, (3, 5), 513, 2),  # more than is multiplied at once
    (2, (3, 5), 1024, 1),  # rows that are copied
    (2, (9, 15), 2048, 1),  # the same, and in smaller chunks
    (1, (11, 11), 1040, 2),
    (1, (10, 9), 5120, 1),  # the smallest chunks
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_a_linear_map(layout: str, shape: Shape, lanes: int) -> None:
    model, inputs, expected = layers(layout, shape, lanes)
    use_linear(model)
    model.validate_nodes_and_infer_types()
    assert set(kinds(model)) == REPLACED and kinds(model)["Linear"] == len(expected)
    allowed = exact(inputs[0].shape[1 if layout.startswith("pixels") else 2], layout in ("gated", "feed-forward"))
    for found, wanted in zip(run(model, *inputs), expected, strict=True):
        assert relative_error(found, wanted) < allowed


@pytest.mark.parametrize("shape", [
    (1, (1, 1), 16, 1),  # a part for one thread alone
    (1, (3, 5), 32, 3),  # panels are divided
    (3, (13, 13), 1040, 2),  # tokens are
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_depends_on_no_threads(layout: str, shape: Shape, lanes: int) -> None:
    model, inputs, _ = layers(layout, shape, lanes)
    use_linear(model)
    assert all(map(torch.equal, run(model, *inputs), run(model, *inputs, num_threads=1)))


def test_two_threads_at_once(lanes: int) -> None:
    """Two requests of one compiled network share its weights, and no thread's memory."""
    model, (_, other), _ = layers("gated", (5, (9, 11), 1024, 2), lanes)
    assert use_linear(model) == 4
    given, shared = [draw(5, 99, 1024, seed=seed) for seed in range(6)], compiled(model, NUM_STREAMS=2)
    alone = [run(model, tokens, other) for tokens in given]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, expected in zip(
                pool.map(lambda tokens: infer(shared.create_infer_request(), tokens, other), given), alone, strict=True
            ):
                assert all(map(torch.equal, found, expected))


def test_gelu_holds_at_its_ends(lanes: int) -> None:
    """Where exp vanishes it is x, or 0; and what is not a number stays so, in its row."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 200.0, -200.0, float("nan"), 0.0])
    gate = torch.cat([ends, torch.linspace(-200, 200, 401), torch.linspace(-6, 6, 1001)])
    weight = torch.cat([torch.zeros(2 * lanes, 1), torch.ones(2 * lanes, 1)])
    bias = torch.cat([torch.ones(2 * lanes), torch.zeros(2 * lanes)])  # a value of one
    given = parameter(gate[None, :, None])
    model = openvino.Model([gated(product(given, weight, bias))], [given])
    assert use_linear(model) == 1
    found = run(model, gate[None, :, None])[0][0].double()
    expected = functional.gelu(gate.double())[:, None].expand(-1, 2 * lanes)
    assert torch.equal(found.isnan(), expected.isnan())
    # erf to 1.5e-7 of one, so x · Φ(x) to half that of x, and roundings
    assert bool(((found - expected).abs() <= 2e-7 * gate.double().abs()[:, None] + 1e-37)[~found.isnan()].all())


def normed(tokens: Any, weight: Tensor, bias: Tensor, axis: int = -1) -> Any:
    """LayerNorm as ONNX brings it."""
    mean = op.mvn(tokens, np.array([axis]), True, 1e-5, "INSIDE_SQRT")
    return op.add(op.multiply(mean, constant(weight)), constant(bias))


@pytest.mark.parametrize("shape", [(1, (1, 1), 16, 1), (2, (3, 5), 40, 3), (3, (13, 13), 1040, 2), (2, (9, 15), 5, 1)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("layout", ["product", "gated", "feed-forward"])
def test_a_layer_norm_before_it_is_its_own(layout: str, offset: float, shape: Shape, lanes: int) -> None:
    frames, (height, width), read, panels = shape
    tokens, norm = draw(frames, height * width, read) + offset, (draw(read, seed=6), draw(read, seed=7))
    written, rows = 2 * lanes * panels, 2 * lanes * panels * (1 if layout == "product" else 2)
    of, after = (draw(rows, read, seed=1), None), (draw(written, rows // 2, seed=4), None)
    given = parameter(tokens)
    model = openvino.Model([layer(layout, normed(given, *norm), height, of, after)], [given])
    assert use_linear(model) > 0
    assert set(kinds(model)) == REPLACED and kinds(model)["Linear"] == 1
    weight, bias = (numbers.double() for numbers in norm)
    wanted = reference(
        layout, functional.layer_norm(tokens.double(), [read], weight, bias), height, (of, after), linear_map
    )
    assert relative_error(run(model, tokens)[0], wanted) < 4 * exact(read, layout != "product") * (1 + offset)


@pytest.mark.parametrize("layout", ["pixels to pixels", "pixels to tokens"])
def test_a_group_norm_before_it_is_its_own(layout: str, lanes: int) -> None:
    read = 3 * lanes
    pixels, norm, of = (
        draw(2, read, 5, 7),
        (draw(read, seed=6), draw(read, seed=7)),
        (draw(2 * lanes, read, seed=1), None),
    )
    given = parameter(pixels)
    grouped = reshaped(op.mvn(reshaped(given, 2, lanes, -1), np.array([2]), True, 1e-5, "INSIDE_SQRT"), 2, read, 5, 7)
    weight, bias = (op.unsqueeze(constant(numbers), np.array([1, 2])) for numbers in norm)
    model = openvino.Model([layer(layout, op.add(op.multiply(grouped, weight), bias), 5, of, of)], [given])
    assert use_linear(model) == 1
    assert set(kinds(model)) == REPLACED
    wanted = functional.group_norm(pixels.double(), lanes, *(numbers.double() for numbers in norm))
    assert relative_error(run(model, pixels)[0], reference(layout, wanted, 5, (of, of), linear_map)) < 4 * exact(read)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_layers_of_the_same_normed_tokens_are_one(precision: Precision, lanes: int, request: Any) -> None:
    """Of which each has an output of its own, in whatever order they are; one that is added to something is apart."""
    if precision == "int8":
        request.getfixturevalue("byte_operation")
    tokens, norm = draw(3, 35, 48), (draw(48, seed=6), draw(48, seed=7))
    by = [
        (draw(2 * lanes * panels, 48, seed=panels), draw(2 * lanes * panels) if panels != 2 else None)
        for panels in (1, 2, 3)
    ]

    def build() -> openvino.Model:
        given = parameter(tokens)
        of = normed(given, *norm)
        results = [layer("product", of, 5, each, each) for each in by]
        more = layer("product", of, 5, by[0], by[0])
        return openvino.Model([*results, op.add(more, computed(3, 35, 2 * lanes))], [given])

    model = build()
    assert use_linear(model, precision) == 2
    made = [len(node.get_attributes()["widths"]) for node in model.get_ops() if node.get_type_name() == "Linear"]
    assert sorted(made) == [0, 3] and kinds(model)["MVN"] == 0
    allowed = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.03}[precision]
    for found, expected in zip(run(model, tokens), run(build(), tokens), strict=True):
        assert relative_error(found, expected) < allowed
    held = build()
    use_linear(held, precision)
    hold_weights(held, lambda: None)
    assert all(map(torch.equal, run(held, tokens), run(model, tokens)))


def sliced(value: Any, axis: int, begin: int, end: int, step: int) -> Any:
    return op.slice(value, *(np.array([number]) for number in (begin, end, step, axis)))


def chosen(value: Any, index: int, axis: int) -> Any:
    return op.gather(value, np.array(index), np.array(axis))


LEAST, MOST = -(2**63), 2**63 - 1
# Of normed tokens (6, 12, 32), and whether a norm stays apart from the product of them.
CHOICES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "a group's key frame": (lambda t: chosen(sliced(reshaped(t, 2, 3, 12, 32), 0, 0, MOST, 1), 0, 1), False),
    "another frame, from the end": (lambda t: chosen(reshaped(t, 2, 3, 12, 32), -1, -3), False),
    "frames": (lambda t: op.gather(t, np.array([4, 1]), np.array(0)), False),
    "a token of each group": (lambda t: chosen(reshaped(t, 6, 3, 4, 32), 1, 2), False),
    "frames the other way round": (lambda t: chosen(sliced(reshaped(t, 2, 3, 12, 32), 1, -1, LEAST, -1), 0, 1), True),
    "fewer frames": (lambda t: chosen(sliced(reshaped(t, 2, 3, 12, 32), 1, 1, 3, 1), 0, 1), True),
    "channels": (lambda t: op.gather(t, np.arange(31, -1, -1), np.array(2)), True),
    "tokens one by one": (lambda t: chosen(reshaped(t, 6, 12, 1, 32), 0, 2), False),
    "parts of tokens": (lambda t: op.gather(reshaped(t, 6, 24, 16), np.arange(12), np.array(1)), True),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_tokens_that_are_chosen_are_normed_alone(name: str, lanes: int) -> None:
    """And what chooses otherwise stays after the norm."""
    tokens, (choose, is_apart) = draw(6, 12, 32) * 3 + 1, CHOICES[name]

    def build() -> openvino.Model:
        given = parameter(tokens)
        of = normed(given, draw(32, seed=6), draw(32, seed=7))
        key = choose(of)
        key_map = product(key, draw(2 * lanes, key.get_output_shape(0)[-1], seed=3))
        return openvino.Model([product(of, draw(2 * lanes, 32, seed=2)), key_map], [given])

    model = build()
    assert use_linear(model) == 2 - is_apart
    assert kinds(model)["MVN"] == is_apart
    for found, expected in zip(run(model, tokens), run(build(), tokens), strict=True):
        assert relative_error(found, expected) < 1e-5


SIZE, TOKENS = (2, 32, 3, 4), (2, 12, 32)
Graphs = dict[str, Callable[[Any, Any], list[Any]]]  # of pixels and tokens of these sizes


def make(name: str, graphs: Graphs) -> openvino.Model:
    inputs = [op.parameter(list(size), np.float32) for size in (SIZE, TOKENS)]
    return openvino.Model(graphs[name](*inputs), inputs)


def drawn(*shape: int) -> Any:
    return constant(draw(*shape))


def computed(*shape: int) -> Any:
    """No constant to whoever looks at its node."""
    return op.relu(drawn(*shape))


def pointwise(pixels: Any) -> Any:
    return convolved(pixels, draw(32, 32, 1, 1), draw(32))


def swapped(value: Any, *order: int) -> Any:
    return op.transpose(value, np.array(order or (0, 2, 1)))


def mapped(tokens: Any) -> Any:
    return product(tokens, draw(32, 32), draw(32))


def halves(tokens: Any, has_bias: bool = True) -> Any:
    """What a gated product is of."""
    return product(tokens, draw(128, 32), draw(128) if has_bias else None)


def gelu(gate: Any) -> Any:
    return op.gelu(gate, "erf")


def parted(whole: Any, use: Callable[[Any, Any], list[Any]], parts: int = 2) -> list[Any]:
    """What is made of the first two parts of something."""
    first, second, *_ = op.split(whole, np.array(2), parts).outputs()
    return use(first, second)


OTHERWISE: Graphs = {
    "pixels to tokens that come first": lambda x, t: [to_tokens(pointwise(x), (2, 0, 1))],
    "pixels to other tokens": lambda x, t: [swapped(reshaped(pointwise(x), 2, 64, 6))],
    "pixels that are read, too": lambda x, t: [to_tokens(y := pointwise(x)), op.relu(y)],
    "flat pixels that are read, too": lambda x, t: [swapped(y := reshaped(pointwise(x), 2, 32, 12)), y],
    "pixels added to before they are tokens": lambda x, t: [to_tokens(op.add(pointwise(x), x))],
    "pixels of other tokens": lambda x, t: [pointwise(reshaped(swapped(reshaped(t, 2, 6, 64)), *SIZE))],
    "pixels of tokens that came first": lambda x, t: [pointwise(reshaped(swapped(reshaped(t, 12, 2, 32), 1, 2, 0), *SIZE))],
    "pixels of tokens as they lie": lambda x, t: [pointwise(reshaped(t, *SIZE))],
    "a bias after what is read, too": lambda x, t: [op.add(y := convolved(x, draw(32, 32, 1, 1)), drawn(1, 32, 1, 1)), y],
    "a layer after a gated one that is read, too": lambda x, t: [product(y := gated(halves(t)), draw(32, 64)), y],
    "a layer after a gated one that is added to": lambda x, t: [product(op.add(gated(halves(t)), computed(2, 12, 64)), draw(32, 64))],
    "a layer after a gated one and something else": lambda x, t: [product(op.relu(gated(halves(t))), draw(32, 64), draw(32))],
    "no whole panel after a gated one": lambda x, t: [product(gated(halves(t)), draw(24, 64))],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_surrounds_it_otherwise_stays(name: str, lanes: int) -> None:
    """Beside the layer, whose result is as before."""
    model, inputs = make(name, OTHERWISE), [draw(*SIZE, seed=1), draw(*TOKENS, seed=2)]
    assert use_linear(model) == 1
    assert set(kinds(model)) > REPLACED
    for found, expected in zip(run(model, *inputs), run(make(name, OTHERWISE), *inputs), strict=True):
        assert relative_error(found, expected) < exact(64, is_gated=True)


LEFT_ALONE: Graphs = {
    "a norm of each channel": lambda x, t: [mapped(normed(t, draw(32), draw(32), axis=1))],
    "a norm without a weight": lambda x, t: [mapped(op.mvn(t, np.array([-1]), True, 1e-5, "INSIDE_SQRT"))],
    "a norm with a weight for each token": lambda x, t: [mapped(normed(t, draw(12, 1), draw(32)))],
    "a norm with eps outside": lambda x, t: [mapped(op.add(op.multiply(op.mvn(t, np.array([-1]), True, 1e-5, "OUTSIDE_SQRT"), drawn(32)), drawn(32)))],
    "3×3": lambda x, t: [convolved(x, draw(32, 32, 3, 3))],
    "stride 2": lambda x, t: [to_tokens(convolved(x, draw(32, 32, 1, 1), stride=2))],
    "padding": lambda x, t: [to_tokens(convolved(x, draw(32, 32, 1, 1), padding=1))],
    "weights that are computed": lambda x, t: [op.convolution(x, computed(32, 32, 1, 1), [1, 1], [0, 0], [0, 0], [1, 1])],
    "a product alone": lambda x, t: [mapped(t)],
    "a product of two": lambda x, t: [op.add(op.matmul(t, computed(2, 32, 32), False, True), t)],
    "a product with a matrix for each frame": lambda x, t: [op.add(op.matmul(t, drawn(2, 32, 32), False, True), t)],
    "a product of pixels": lambda x, t: [op.add(op.matmul(x, drawn(4, 4), False, True), x)],
    "a product of a matrix": lambda x, t: [op.add(y := reshaped(t, 24, 32), mapped(y))],
    "a product of what is transposed": lambda x, t: [op.add(op.matmul(reshaped(t, 2, 32, 12), drawn(32, 32), True, True), t)],
    "a product from the left": lambda x, t: [op.add(op.matmul(drawn(12, 12), t, False, False), t)],
    "itself": lambda x, t: [op.add(y := mapped(t), y)],
    "what is read, too": lambda x, t: [op.add(y := mapped(t), t), op.relu(y)],
    "what is read, too, without its bias": lambda x, t: [op.add(op.add(y := product(t, draw(32, 32)), drawn(32)), t), y],
    "what is added to all frames": lambda x, t: [op.add(mapped(t), computed(1, 12, 32))],
    "a layer of one frame that is added to all": lambda x, t: [op.add(mapped(op.gather(t, np.array([0]), np.int64(0))), t)],
    "a bias of one number": lambda x, t: [op.add(op.add(product(t, draw(32, 32)), drawn(1)), t)],
    "a bias for each token": lambda x, t: [op.add(op.add(product(t, draw(32, 32)), drawn(12, 1)), t)],
    "a bias that is wider than the product": lambda x, t: [gated(op.add(product(t, draw(1, 32)), drawn(128)))],
    "tanh": lambda x, t: [gated(halves(t), approximation="tanh")],
    "halves of tokens": lambda x, t: [gated(halves(t), axis=1)],
    "halves of no layer": lambda x, t: [gated(op.relu(halves(t)))],
    "the other half": lambda x, t: parted(halves(t), lambda value, gate: [op.multiply(gelu(value), gate)]),
    "one half alone": lambda x, t: parted(halves(t), lambda value, gate: [op.multiply(gate, gelu(gate))]),
    "two of four parts": lambda x, t: parted(halves(t), lambda value, gate: [op.multiply(value, gelu(gate))], 4),
    "a gate without GELU": lambda x, t: parted(halves(t), lambda value, gate: [op.multiply(value, op.sigmoid(gate))]),
    "a whole that is read, too": lambda x, t: [gated(y := halves(t)), op.relu(y)],
    "a whole that is read, too, without its bias": lambda x, t: [gated(op.add(y := halves(t, has_bias=False), drawn(128))), y],
    "a value that is read, too": lambda x, t: parted(halves(t), lambda value, gate: [op.multiply(value, gelu(gate)), op.relu(value)]),
    "a gate that is read, too": lambda x, t: parted(halves(t), lambda value, gate: [op.multiply(value, gelu(gate)), op.relu(gate)]),
    "a GELU that is read, too": lambda x, t: parted(halves(t), lambda value, gate: [op.multiply(value, y := gelu(gate)), y]),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_looks_different_is_left_alone(name: str, lanes: int) -> None:
    model = make(name, LEFT_ALONE)
    before = kinds(model)
    assert use_linear(model) == 0 and kinds(model) == before


JOINED: Graphs = {
    "keys and values": lambda x, t: [beside(product(t, draw(32, 32)), product(t, draw(64, 32, seed=1)))],
    "stored transposed": lambda x, t: [beside(*(product(t, draw(32, 32, seed=seed), None, True) for seed in (1, 2)))],
    "three of frames": lambda x, t: [beside(*(reshaped(product(t, draw(32, 32, seed=seed)), 1, 2, 12, 32) for seed in range(3)))],
}  # fmt: skip
APART: Graphs = {
    "of other tokens": lambda x, t: [beside(product(t, draw(32, 32)), product(op.relu(t), draw(32, 32)))],
    "a bias": lambda x, t: [beside(mapped(t), product(t, draw(32, 32)))],
    "one that is read, too": lambda x, t: [beside(y := product(t, draw(32, 32)), product(t, draw(32, 32))), op.relu(y)],
    "one that is reshaped and read": lambda x, t: [beside(reshaped(y := product(t, draw(32, 32)), 1, 2, 12, 32), reshaped(product(t, draw(32, 32)), 1, 2, 12, 32)), y],
    "tokens of one after those of another": lambda x, t: [op.concat([product(t, draw(32, 32)), product(t, draw(32, 32))], 1)],
    "channels that are rows": lambda x, t: [beside(*(reshaped(product(t, draw(32, 32)), 2, 24, 16) for _ in range(2)))],
    "no product": lambda x, t: [beside(t, product(t, draw(32, 32)))],
}  # fmt: skip


def beside(*values: Any) -> Any:
    return op.concat(list(values), -1)


@pytest.mark.parametrize("name", JOINED)
def test_products_in_bytes_that_lie_beside_each_other_are_one(name: str, lanes: int, byte_operation: None) -> None:
    model, inputs = make(name, JOINED), [draw(*SIZE, seed=1), draw(*TOKENS, seed=2)]
    assert use_linear(model) == 0 and kinds(model) == kinds(make(name, JOINED))  # without loss they stay OpenVINO's
    assert use_linear(model, "int8") == 1
    assert (kinds(model)["Linear"], kinds(model)["Concat"], kinds(model)["MatMul"]) == (1, 0, 0)
    (found,), (expected,) = run(model, *inputs), run(make(name, JOINED), *inputs)
    assert found.shape == expected.shape and relative_error(found, expected) < 0.02


@pytest.mark.parametrize("name", APART)
def test_others_stay_apart(name: str, lanes: int, byte_operation: None) -> None:
    model = make(name, APART)
    products = kinds(model)["MatMul"]
    made = 2 if name == "of other tokens" else 1  # of the same ones: one with two outputs
    assert use_linear(model, "int8") == kinds(model)["Linear"] == made
    outputs = [len(node.get_attributes()["widths"]) for node in model.get_ops() if node.get_type_name() == "Linear"]
    assert sum(outputs) == products and kinds(model)["Concat"] == 1
    inputs = [draw(*SIZE, seed=1), draw(*TOKENS, seed=2)]
    for found, expected in zip(run(model, *inputs), run(make(name, APART), *inputs), strict=True):
        assert relative_error(found, expected) < 0.02


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "feed-forward"])
def test_channels_that_are_no_whole_panels_are_left_alone(layout: str, lanes: int) -> None:
    """Nor are those of pixels that are no whole vectors, or a half of a gated layer's."""
    sizes = [(2 * lanes, 3 * lanes), (2 * lanes, 2 * lanes + 1), (lanes + 1, 2 * lanes)]
    for read, written in sizes if layout.startswith("pixels") else sizes[:2]:
        of = draw(written * (2 if layout == "gated" else 1), read), None
        given = parameter(draw(2, read, 3, 4) if layout.startswith("pixels") else draw(2, 12, read))
        result = layer(layout, given, 3, of, of)
        model = openvino.Model([op.add(result, computed(*result.get_output_shape(0)))], [given])
        assert use_linear(model) == 0


@pytest.mark.parametrize(("wider", "found", "apart"), [
    (0, 8, {"Linear": 4, "MatMul": 0}),
    (1, 6, {"Linear": 6, "MatMul": 2}),  # those to which nothing is added are products alone
])  # fmt: skip
def test_layers_with_much_between_them_stay_apart(
    wider: int, found: int, apart: dict[str, int], lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_linear, "MOST_BETWEEN", 2 * lanes - wider)
    model, inputs, expected = layers("feed-forward", (1, (3, 5), 16, 1), lanes)
    assert use_linear(model) == found
    assert {kind: kinds(model)[kind] for kind in apart} == apart
    for given, wanted in zip(run(model, *inputs), expected, strict=True):
        assert relative_error(given, wanted) < exact(16, is_gated=True)


@pytest.mark.parametrize(("network", "found"), [("unet_stream", 4 + 3), ("controlnet_stream", 2)])
def test_keys_and_values_of_a_stream_are_one_product(
    network: str, found: int, openvino_networks: Path, lanes: int, byte_operation: None
) -> None:
    """Of key-frame attention in each block, and of temporal attention in all but the middle."""
    before, model = (of_three_frames(openvino_networks, network) for _ in range(2))
    assert use_linear(before) > 0 < use_linear(model, "int8")
    assert kinds(before)["Concat"] - kinds(model)["Concat"] == found


def test_all_of_an_exported_network_are_found(openvino_networks: Path, lanes: int) -> None:
    model = of_three_frames(openvino_networks, "unet")
    blocks = kinds(model)["Gelu"]
    assert blocks == 4  # one transformer block each: of three levels' attentions and the middle
    # In, out, both attentions' outputs, which are added, and the feed-forward's two; temporal attention's in all but the
    # middle; shortcuts where a residual block's channels change. Of tokens after a norm those of the first are one, and
    # so are queries to the text, and keys and values of the key frame.
    found = 7 * blocks + 3 + 5 + 2 * blocks
    assert use_linear(model) == found
    assert kinds(model)["Linear"] == found - blocks  # the feed-forward's two are one
    assert kinds(model)["Gelu"] == 0
