"""Convolutions and linear maps in eight bits against PyTorch's of what is rounded alike, in float64, and what is left alone.

Tests of posecrafter_rt/engines/openvino_convolutions.py and openvino_linear.py in int8.
"""

from __future__ import annotations

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
from torch.nn import functional

from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.openvino_convolutions import use_convolutions
from posecrafter_rt.engines.openvino_linear import use_linear
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.doubling import fold_doubling
from tests.engines.openvino_models import (
    LAYOUTS,
    Linear,
    Shape,
    assert_frames_are_apart,
    assert_tokens_are_apart,
    compiled,
    constant,
    convolved,
    doubled,
    draw,
    gated,
    infer,
    kinds,
    layers,
    linear_map,
    of_three_frames,
    parameter,
    product,
    reshaped,
    run,
    silu_of_norm,
    weights_of,
    whole,
)

EXACT = 1e-5  # of the largest output, where nothing is rounded but float32
COARSE = 0.04  # what eight bits lose, as a root of mean squares
NEARER = 8  # times, to what is rounded alike than to what is not; a half that float32 rounds otherwise is a step off
KINDS = ("plain", "halved", "doubled", "normed")  # of convolutions
GROUPS = 4
LEAST_SILU = -1.2784645, -0.2784646  # where it is, and what


@pytest.fixture
def lanes(lanes: int, byte_operation: None) -> int:
    """Those of vectors that have products in eight bits; skips where they have none."""
    return lanes


def in_steps(values: Tensor, low: Tensor, high: Tensor, is_zero_exact: bool) -> Tensor:
    """Rounded to 256 numbers from low to high, moved so that zero is one of them where it must be."""
    step = torch.where(high > low, (high - low) / 255, 1.0)
    origin = (low / step).round() * step if is_zero_exact else low
    return ((values - origin) / step).round().clamp(0, 255) * step + origin


def weights_in_steps(weight: Tensor) -> Tensor:
    """Those of each output channel rounded to 127 steps of either sign."""
    step = weight.double().abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1)) / 127
    return (weight.double() / step).round() * step


def map_in_steps(tokens: Tensor, by: Linear) -> Tensor:
    """`linear_map` in eight bits: each token has a scale of its own."""
    rounded = in_steps(tokens, tokens.amin(-1, True), tokens.amax(-1, True), is_zero_exact=False)
    return linear_map(rounded, (weights_in_steps(by[0]), by[1]))


def assert_rounded(found: Tensor, expected: Tensor, unrounded: Tensor) -> None:
    """Near to what eight bits give, and no nearer to what float64 gives than these come."""

    def distance(other: Tensor) -> float:
        return float((found.double() - other).norm() / unrounded.norm())

    assert NEARER * distance(expected) < distance(unrounded) < COARSE


class Layer(NamedTuple):
    """A convolution of some kind: weight (out, in, 3, 3), bias (out), and a norm's weight and bias (in)."""

    kind: str
    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor]

    def of(self, pixels: Any) -> Any:
        """It as OpenVINO's own operations."""
        if self.kind == "doubled":
            return doubled(pixels, fold_doubling(self.weight), self.bias)
        before = silu_of_norm(pixels, GROUPS, self.norm) if self.kind == "normed" else pixels
        return convolved(before, self.weight, self.bias, stride=2 if self.kind == "halved" else 1)

    def reference(self, pixels: Tensor, is_rounded: bool) -> Tensor:
        """What it gives, of what is rounded to eight bits or is not."""
        values = pixels.double()
        lows, highs = values.amin((2, 3)), values.amax((2, 3))
        if self.kind == "normed":
            values = functional.group_norm(values, GROUPS, *(numbers.double() for numbers in self.norm))
            lows, highs = silu_bounds(values.amin((2, 3)), values.amax((2, 3)))
            values = functional.silu(values)
        if is_rounded:
            low, high = lows.amin(1).clamp(max=0), highs.amax(1).clamp(min=0)
            values = in_steps(values, *(bound[:, None, None, None] for bound in (low, high)), is_zero_exact=True)
        kernel = weights_in_steps if is_rounded else Tensor.double
        if self.kind == "doubled":
            result = doubled_by(values, lambda row, column: kernel(folded(self.weight, row, column)))
        else:
            result = functional.conv2d(values, kernel(self.weight), None, 2 if self.kind == "halved" else 1, 1)
        return result + self.bias.double()[:, None, None]


def silu_bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Between which numbers SiLU is, of all numbers between two."""
    ends = functional.silu(low), functional.silu(high)
    has_least = (low < LEAST_SILU[0]) & (high > LEAST_SILU[0])
    return torch.where(has_least, LEAST_SILU[1], torch.minimum(*ends)), torch.maximum(*ends)


def folded(weight: Tensor, row: int, column: int) -> Tensor:
    """The kernel (out, in, 2, 2) by which even (0) or odd (1) rows and columns of a doubled picture's outputs are."""
    taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=weight.dtype)
    return torch.einsum("ay,oiyx,bx->oiab", taps[row], weight, taps[column])


def doubled_by(values: Tensor, kernel: Callable[[int, int], Tensor]) -> Tensor:
    """Outputs of even and odd rows and columns beside each other."""

    def outputs(row: int, column: int) -> Tensor:
        padded = functional.pad(values, (1 - column, column, 1 - row, row))
        return functional.conv2d(padded, kernel(row, column))

    rows = [torch.stack([outputs(row, 0), outputs(row, 1)], -1).flatten(-2) for row in (0, 1)]
    return torch.stack(rows, -2).flatten(-3, -2)


def drawn(kind: str, read: int, written: int) -> Layer:
    return Layer(
        kind, draw(written, read, 3, 3, seed=1), draw(written, seed=2), (draw(read, seed=3), draw(read, seed=4))
    )


def convolve(layer: Layer, *pictures: Tensor, num_threads: int = 2, precision: Precision = "int8") -> list[Tensor]:
    """What the operation gives of each."""
    given = [parameter(pixels) for pixels in pictures]
    model = openvino.Model([layer.of(pixels) for pixels in given], given)
    assert use_convolutions(model, precision) == len(given)
    assert set(kinds(model)) == {"Parameter", "Constant", "FusedConvolution", "Result"}
    return run(model, *pictures, num_threads=num_threads)


@pytest.mark.parametrize(("frames", "channels", "size"), [
    (1, (8, 16), (1, 1)),  # the least of everything
    (2, (24, 48), (13, 31)),
    (3, (16, 96), (5, 7)),
    (9, (32, 32), (8, 10)),
    (25, (64, 64), (3, 4)),  # frames are divided between threads
    (1, (512, 512), (6, 5)),
    (1, (64, 32), (9, 400)),  # a chunk for each row
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_convolution(
    kind: str, frames: int, channels: tuple[int, int], size: tuple[int, int], lanes: int
) -> None:
    layer = drawn(kind, whole(channels[0], lanes), whole(channels[1], 2 * lanes))
    pixels = draw(frames, len(layer.norm[0]), *size)
    pixels[1::2] = pixels[1::2] * 5 + 2  # of a scale of their own
    (found,) = convolve(layer, pixels)
    assert_rounded(found, *(layer.reference(pixels, is_rounded) for is_rounded in (True, False)))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_width_and_height(kind: str, lanes: int) -> None:
    layer = drawn(kind, 16, 32)
    pictures = [draw(2, 16, *size) for side in range(1, 18) for size in ((3, side), (side, 2))]
    for found, pixels in zip(convolve(layer, *pictures), pictures, strict=True):
        assert_rounded(found, *(layer.reference(pixels, is_rounded) for is_rounded in (True, False)))


@pytest.mark.parametrize("has_timestep", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_its_own(kind: str, has_timestep: bool, lanes: int) -> None:
    """What is as large, and a number for each channel that is computed."""
    layer, pixels, numbers = drawn(kind, 32, 64), draw(4, 32, 11, 9), draw(1, 64, seed=5)
    expected, unrounded = (layer.reference(pixels, is_rounded) for is_rounded in (True, False))
    other = draw(*expected.shape, seed=6) * 17  # as large as the output
    given = [parameter(values) for values in (pixels, numbers, other)]
    result = layer.of(given[0])
    if has_timestep:
        result = op.add(result, op.unsqueeze(op.relu(given[1]), np.array([2, 3])))
    model = openvino.Model([op.add(result, given[2])], given)
    assert use_convolutions(model, "int8") == 1
    assert not any(node.get_type_name() == "Add" and len(node.get_output_shape(0)) == 4 for node in model.get_ops())
    added = other + (numbers.relu()[:, :, None, None] if has_timestep else 0)
    assert_rounded(run(model, pixels, numbers, other)[0], expected + added, unrounded + added)


@pytest.mark.parametrize(("frames", "size"), [(9, (8, 10)), (4, (21, 18)), (3, (5, 7))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_depends_neither_on_its_neighbours_nor_on_threads(
    kind: str, frames: int, size: tuple[int, int], lanes: int
) -> None:
    layer, pixels = drawn(kind, 32, 64), draw(frames, 32, *size)
    pixels[::2] *= 3
    assert_frames_are_apart(convolve, layer, pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_frame(kind: str, lanes: int) -> None:
    layer, pixels = drawn(kind, 32, 64), draw(4, 32, 5, 6)
    spoilt = [pixels.clone() for _ in range(4)]
    for picture, place, number in zip(spoilt, ((0, 0, 0), (17, 3, 1), (31, 4, 5), (8, 2, 2)),
                                      (np.nan, np.inf, -np.inf, np.nan), strict=True):  # fmt: skip
        picture[(2, *place)] = number
    before, *found = convolve(layer, pixels, *spoilt)
    for after in found:
        assert not after[2].isfinite().any()
        assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


def test_what_is_the_same_everywhere(lanes: int) -> None:
    """Has no range, or one on one side of zero: nothing is lost of it."""
    numbers = torch.tensor([0.0, 3.0, -2.0, 1e-30])
    pixels = numbers[:, None, None, None].expand(4, 32, 5, 6).contiguous()
    for kind in ("plain", "halved", "doubled"):
        layer = drawn(kind, 32, 64)
        (found,) = convolve(layer, pixels)
        assert torch.equal(found[0], layer.bias[:, None, None].expand_as(found[0]))
        assert relative_error(found, layer.reference(pixels, is_rounded=True)) < EXACT
    tokens, weight, bias = numbers[None, :, None].expand(2, 4, 32).contiguous(), draw(64, 32), draw(64, seed=1)
    (found,) = mapped(product, tokens, weight, bias)
    assert torch.equal(found[0, 0], bias)
    assert relative_error(found, map_in_steps(tokens.double(), (weight, bias))) < EXACT


@pytest.mark.parametrize(("weight", "stride"), [
    ((32, 20, 3, 3), 1),  # no whole vectors
    ((20, 32, 3, 3), 1),  # no whole panels
    ((32, 4, 3, 3), 2),
    ((32, 32, 5, 5), 1),
    ((32, 32, 1, 1), 1),
    ((32, 32, 3, 3), 3),
])  # fmt: skip
def test_convolutions_that_do_not_fit_stay(weight: tuple[int, ...], stride: int, lanes: int) -> None:
    given = op.parameter([1, weight[1], 16, 16], np.float32)
    model = openvino.Model([convolved(given, draw(*weight), stride=stride)], [given])
    assert use_convolutions(model, "int8") == 0


@pytest.mark.parametrize("weight", [(32, 4, 3, 3), (4, 32, 3, 3)])
def test_the_first_and_the_last_of_a_network_are_in_float32(weight: tuple[int, ...], lanes: int) -> None:
    given = op.parameter([1, weight[1], 16, 16], np.float32)
    model = openvino.Model([convolved(given, draw(*weight, seed=1))], [given])
    assert use_convolutions(model, "int8") == 1
    pixels = draw(1, weight[1], 16, 16)
    expected = functional.conv2d(pixels.double(), draw(*weight, seed=1).double(), padding=1)
    assert relative_error(run(model, pixels)[0], expected) < EXACT


@pytest.mark.parametrize("channels", [32, 3])
def test_any_transposed_convolution_that_doubles_is_done_so(channels: int, lanes: int) -> None:
    """To few channels, too, as a decoder's last."""
    pixels, weight, bias = draw(2, 32, 9, 7), draw(32, channels, 4, 4, seed=1), draw(channels, seed=2)
    given = parameter(pixels)
    model = openvino.Model([doubled(given, weight, bias)], [given])
    assert use_convolutions(model, "int8") == 1
    assert set(kinds(model)) == {"Parameter", "Constant", "FusedConvolution", "Result"}
    expected = functional.conv_transpose2d(pixels.double(), weight.double(), bias.double(), stride=2, padding=1)
    assert EXACT < relative_error(run(model, pixels)[0], expected) < COARSE


def mapped(of: Callable[..., Any], tokens: Tensor, *numbers: Tensor) -> list[Tensor]:
    """What the operation gives of tokens."""
    given = parameter(tokens)
    model = openvino.Model([of(given, *numbers)], [given])
    assert use_linear(model, "int8") == 1
    assert set(kinds(model)) == {"Parameter", "Constant", "Linear", "Result"}
    return run(model, tokens)


@pytest.mark.parametrize("shape", [
    (1, (1, 1), 16, 1),  # one row
    (1, (1, 13), 4, 1),
    (25, (4, 4), 36, 2),  # no whole vectors
    (2, (13, 13), 64, 1),  # a token more than a chunk
    (5, (9, 11), 320, 10),  # chunks that end within a frame
    (2, (9, 15), 2048, 1),  # smaller chunks
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_a_linear_map(layout: str, shape: Shape, lanes: int) -> None:
    model, inputs, expected = layers(layout, shape, lanes, map_in_steps)
    use_linear(model, "int8")
    assert set(kinds(model)) == {"Parameter", "Constant", "Linear", "Result"}
    unrounded = layers(layout, shape, lanes)[2]
    for found, *wanted in zip(run(model, *inputs), expected, unrounded, strict=True):
        assert_rounded(found, *wanted)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_alone_is_one(has_bias: bool, lanes: int) -> None:
    """In float32 it stays OpenVINO's."""
    tokens, by = draw(3, 7, 20), (draw(64, 20, seed=1), draw(64, seed=2) if has_bias else None)
    (found,) = mapped(product, tokens, *by)
    assert_rounded(found, map_in_steps(tokens.double(), by), linear_map(tokens.double(), by))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_depends_neither_on_others_nor_on_threads(layout: str, lanes: int) -> None:
    assert_tokens_are_apart(lambda model: use_linear(model, "int8"), layout, 64, lanes)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_spoils_its_channel(number: float, lanes: int) -> None:
    """As it does in float32."""
    tokens, weight, bias = draw(2, 7, 32), draw(64, 32, seed=1), draw(64, seed=2)
    spoilt = weight.clone()
    spoilt[5, 3] = number
    (before,), (after,) = (mapped(product, tokens, numbers, bias) for numbers in (weight, spoilt))
    channel = torch.arange(64) == 5
    assert not after[..., channel].isfinite().any() and torch.equal(after[..., ~channel], before[..., ~channel])


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["pixels to pixels", "product", "feed-forward"])
def test_what_is_not_finite_stays_in_its_token(layout: str, number: float, lanes: int) -> None:
    model, (given, other), _ = layers(layout, (2, (3, 5), 32, 1), lanes)
    use_linear(model, "int8")
    of_pixels, token = layout == "pixels to pixels", torch.arange(15) == 7
    spoilt = given.clone()
    (spoilt.flatten(2).mT if of_pixels else spoilt)[1, 7, 3] = number
    for before, after in zip(run(model, given, other), run(model, spoilt, other), strict=True):
        tokens, unspoilt = (values.flatten(2).mT if of_pixels else values for values in (after, before))
        assert not tokens[1, 7].isfinite().any()
        assert torch.equal(tokens[0], unspoilt[0]) and torch.equal(tokens[1, ~token], unspoilt[1, ~token])


def test_large_gates_are_what_they_are(lanes: int) -> None:
    """A token of one number beside zeros loses nothing, so GELU is of the number itself."""
    gates = torch.cat([torch.linspace(-50, 50, 401), torch.linspace(-6, 6, 601)])
    tokens, weight = torch.zeros(1, len(gates), 4), torch.zeros(4 * lanes, 4)
    tokens[0, :, 0], weight[2 * lanes :, 0] = gates, 1
    bias = torch.cat([torch.ones(2 * lanes), torch.zeros(2 * lanes)])  # a value of one
    (found,) = mapped(lambda given: gated(product(given, weight, bias)), tokens)
    expected = functional.gelu(gates.double())[:, None]
    assert bool(((found[0] - expected).abs() <= 1e-6 * gates.abs()[:, None] + 1e-30).all())


def test_a_feed_forward_is_one_operation(lanes: int) -> None:
    model, *_ = layers("feed-forward", (2, (3, 5), 32, 1), lanes)
    assert use_linear(model, "int8") == 8
    made = [node for node in model.get_ops() if node.get_type_name() == "Linear"]
    assert len(made) == 4 and not {"Split", "Gelu", "MatMul"} & set(kinds(model))
    for node in made:
        facts = node.get_attributes()
        assert facts["is_gated"] and facts["in_bytes"] and node.get_input_size() >= 5


def computed(*shape: int) -> Any:
    """No constant to whoever looks at its node."""
    return op.relu(constant(draw(*shape)))


STAYING: dict[str, Callable[[Any], Any]] = {
    "two of what is computed": lambda tokens: op.matmul(tokens, computed(2, 64, 18), False, True),
    "no whole fours": lambda tokens: product(tokens, draw(64, 18)),
    "no whole fours in a gated one": lambda tokens: gated(product(tokens, draw(128, 18))),
    "no whole panels": lambda tokens: product(reshaped(tokens, 2, 9, 24), draw(24, 24)),
    "of a matrix": lambda tokens: product(reshaped(tokens, 9, 48), draw(64, 48)),
}


@pytest.mark.parametrize("name", STAYING)
def test_products_that_do_not_fit_stay(name: str, lanes: int) -> None:
    given = op.parameter([2, 12, 18], np.float32)
    model = openvino.Model([STAYING[name](given)], [given])
    assert use_linear(model, "int8") == 0 and kinds(model)["MatMul"] == 1


def test_two_threads_at_once(lanes: int) -> None:
    """Two requests of one compiled network share its weights, and no thread's memory."""
    pictures, layer = [draw(4, 32, 13, 15, seed=seed) for seed in range(6)], drawn("normed", 32, 64)
    given = parameter(pictures[0])
    tokens = op.transpose(reshaped(layer.of(given), 4, 64, 195), np.array([0, 2, 1]))
    model = openvino.Model([product(gated(product(tokens, draw(128, 64))), draw(64, 64))], [given])
    assert use_convolutions(model, "int8") == 1 and use_linear(model, "int8") == 2
    alone, shared = [run(model, pixels)[0] for pixels in pictures], compiled(model, NUM_STREAMS=2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda pixels: infer(shared.create_infer_request(), pixels)[0], pictures)
            assert all(map(torch.equal, found, alone))


def test_all_that_fits_of_an_exported_network_is_in_bytes(openvino_networks: Path, lanes: int) -> None:
    model = of_three_frames(openvino_networks, "unet")
    use_convolutions(model, "int8")
    use_linear(model, "int8")
    assert weights_of(model, "Convolution") == []
    ours = [node for node in model.get_ops() if node.get_type_name() == "FusedConvolution"]
    assert sum(node.get_attributes()["tile"] > 0 for node in ours) == 2  # the first and the last
    assert weights_of(model, "MatMul") == []
