"""Products in place of 1×1 convolutions and of split ones: the same numbers, and what looks different is left alone.

Tests of posecrafter_rt/engines/openvino_linear.py and openvino_patterns.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posecrafter_rt.engines.openvino_linear import use_products
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.spec import NetworkSpec, TensorSpec

openvino = pytest.importorskip("openvino")
op = openvino.opset13

FRAMES, CHANNELS, HEIGHT, WIDTH = 2, 16, 3, 5
PIXELS = [FRAMES, CHANNELS, HEIGHT, WIDTH]
SPEC = NetworkSpec("tried", (TensorSpec("x", (FRAMES, CHANNELS, HEIGHT, WIDTH)),), ())


def draw(*shape: int) -> Any:
    return op.constant(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


def convolved(pixels: Any, side: int = 1, stride: int = 1, has_bias: bool = True) -> Any:
    out = op.convolution(
        pixels, draw(8, pixels.get_output_shape(0)[1], side, side), [stride] * 2, [0] * 2, [0] * 2, [1] * 2
    )
    return op.add(out, draw(1, 8, 1, 1)) if has_bias else out


def to_tokens(pixels: Any, order: tuple[int, ...] = (0, 2, 1)) -> Any:
    frames, channels, height, width = pixels.get_output_shape(0)
    return op.transpose(op.reshape(pixels, np.array([frames, channels, height * width]), False), np.array(order))


def to_pixels(tokens: Any) -> Any:
    frames, _, channels = tokens.get_output_shape(0)
    return op.reshape(op.transpose(tokens, np.array([0, 2, 1])), np.array([frames, channels, HEIGHT, WIDTH]), False)


def linear(tokens: Any, is_stored_transposed: bool, channels: int = 12) -> Any:
    weight = draw(channels, CHANNELS)
    value = op.transpose(weight, np.array([1, 0])) if is_stored_transposed else weight
    return op.add(op.matmul(tokens, value, False, not is_stored_transposed), draw(channels))


def halves(tokens: Any, axis: int = 2) -> Any:
    first, second = op.split(tokens, np.array(axis), 2).outputs()
    return op.multiply(first, op.gelu(second, "erf"))


def build(make: Callable[[Any], Any]) -> Any:
    pixels = op.parameter(PIXELS, np.float32, name="x")
    made = make(pixels)
    return openvino.Model(made if isinstance(made, list) else [made], [pixels])


def run(model: Any) -> list[np.ndarray]:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = {name: tensor.numpy() for name, tensor in random_inputs(SPEC, {}, seed=3).items()}
    return [np.array(value) for value in compiled(list(inputs.values())).values()]


def kinds(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


REWRITTEN: dict[str, Callable[[Any], Any]] = {
    "to tokens": lambda x: to_tokens(convolved(x)),
    "to tokens without a bias": lambda x: to_tokens(convolved(x, has_bias=False)),
    "of tokens": lambda x: op.relu(convolved(to_pixels(op.relu(to_tokens(x))))),
    "of tokens without a bias": lambda x: op.relu(convolved(to_pixels(to_tokens(x)), has_bias=False)),
    "from tokens to tokens": lambda x: to_tokens(convolved(to_pixels(to_tokens(x)))),
    "halves": lambda x: halves(linear(to_tokens(x), False)),
    "halves of a weight that is transposed": lambda x: halves(linear(to_tokens(x), True)),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_it_gives_the_same(name: str) -> None:
    expected, model = run(build(REWRITTEN[name])), build(REWRITTEN[name])
    assert use_products(model) == 1
    model.validate_nodes_and_infer_types()
    assert not kinds(model) & Counter(["Convolution", "Split"])
    (got,) = run(model)
    np.testing.assert_allclose(got, expected[0], rtol=1e-5, atol=1e-5)
    assert got.shape == expected[0].shape


def shared(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What is made, and what it is made of, both as outputs."""

    def both(x: Any) -> list[Any]:
        made = make(x)
        return [made, op.relu(made.input_value(0).get_node())]

    return both


LEFT_ALONE: dict[str, Callable[[Any], Any]] = {
    "pixels to pixels": lambda x: convolved(x),
    "3×3": lambda x: op.transpose(
        op.reshape(convolved(x, side=3), np.array([FRAMES, 8, 3]), False), np.array([0, 2, 1])
    ),
    "stride 2": lambda x: to_tokens(convolved(x, stride=2)),
    "another order": lambda x: to_tokens(convolved(x), (2, 0, 1)),
    "other planes": lambda x: op.transpose(
        op.reshape(convolved(x), np.array([FRAMES, 4, 30]), False), np.array([0, 2, 1])
    ),
    "planes that are read, too": shared(lambda x: to_tokens(convolved(x))),
    "halves of tokens": lambda x: halves(linear(to_tokens(x), False), axis=0),
    "halves of a whole that is read, too": lambda x: [halves(y := linear(to_tokens(x), False)), op.relu(y)],
    "halves of a sum that is wider than the product": lambda x: halves(
        op.add(op.matmul(to_tokens(x), draw(1, CHANNELS), False, True), draw(12))
    ),
    "halves of fewer tokens than channels": lambda x: halves(
        linear(op.gather(to_tokens(x), np.arange(7), np.int64(1)), False)
    ),
    "halves of no layer": lambda x: halves(op.relu(to_tokens(x))),
    "halves of a product of tokens": lambda x: halves(
        op.add(op.matmul(to_tokens(x), x_square(x), False, False), draw(16))
    ),
}


def x_square(x: Any) -> Any:
    """A matrix (N, C, C) that is no constant."""
    return op.matmul(to_tokens(x), to_tokens(x), True, False)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_looks_different_is_left_alone(name: str) -> None:
    model = build(LEFT_ALONE[name])
    before = kinds(model)
    assert use_products(model) == 0 and kinds(model) == before


def test_all_of_an_exported_network_are_found(openvino_networks: Path) -> None:
    model = openvino.Core().read_model(openvino_networks / "unet.xml")
    blocks = kinds(model)["Gelu"]
    assert blocks == 4  # one transformer block each: of three levels' attentions and the middle
    model.reshape({name: [3, *shape[1:]] if shape[0].is_dynamic else shape
                   for name, shape in ((value.any_name, value.get_partial_shape()) for value in model.inputs)})  # fmt: skip
    assert use_products(model) == 3 * blocks  # in, out, and the feed-forward's halves
