"""Convolutions and linear maps whose products are in 16 bits against PyTorch's float64.

Tests of posecrafter_rt/engines/openvino_convolutions.py and openvino_linear.py in fp16, on processors with AVX512-FP16.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor

from posecrafter_rt.engines.openvino_convolutions import use_convolutions
from posecrafter_rt.engines.openvino_linear import use_linear
from tests.engines.conftest import take_vectors
from tests.engines.openvino_models import (
    LAYOUTS,
    Shape,
    assert_frames_are_apart,
    assert_tokens_are_apart,
    convolved,
    draw,
    kinds,
    layers,
    of_three_frames,
    parameter,
    product,
    run,
    weights_of,
    whole,
)
from tests.engines.test_openvino_bytes import KINDS, Layer, drawn
from tests.engines.test_openvino_bytes import convolve as convolve_in

LEAST, MOST = 1e-5, 3e-3  # what 16 bits lose, as a root of mean squares: more than float32, and no more than this
convolve = partial(convolve_in, precision="fp16")
SCALE = 0.05  # of weights: none is below the least normal number in 16 bits, nor is it one of few


@pytest.fixture
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Those of vectors that have products in 16 bits; skips where there are none."""
    return take_vectors(request, monkeypatch, 16, has_halves=True, has_tiles=False)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def of_small_weights(layer: Layer) -> Layer:
    return layer._replace(weight=layer.weight * SCALE)


@pytest.mark.parametrize(("frames", "channels", "size"), [
    (1, (8, 16), (1, 1)),  # the least of everything
    (2, (24, 48), (13, 31)),  # rows of windows that are multiplied where they are
    (3, (16, 96), (5, 7)),  # and such as are copied, to be multiplied with those of other rows
    (9, (32, 32), (8, 10)),
    (25, (64, 64), (3, 4)),  # frames are divided between threads
    (1, (512, 512), (6, 5)),  # more than is multiplied at once
    (1, (320, 32), (4, 40)),
    (1, (64, 32), (3, 240)),  # a chunk for each row
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_convolution(
    kind: str, frames: int, channels: tuple[int, int], size: tuple[int, int], lanes: int
) -> None:
    layer = of_small_weights(drawn(kind, whole(channels[0], lanes), whole(channels[1], 2 * lanes)))
    pixels = draw(frames, len(layer.norm[0]), *size)
    (found,) = convolve(layer, pixels)
    assert LEAST < error(found, layer.reference(pixels, is_rounded=False)) < MOST


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_width_and_height(kind: str, lanes: int) -> None:
    layer = of_small_weights(drawn(kind, 16, 32))
    pictures = [draw(2, 16, *size) for side in range(1, 34) for size in ((3, side), (side, 2))]
    for found, pixels in zip(convolve(layer, *pictures), pictures, strict=True):
        assert error(found, layer.reference(pixels, is_rounded=False)) < MOST


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_its_own(kind: str, lanes: int) -> None:
    layer, pixels, numbers = of_small_weights(drawn(kind, 32, 64)), draw(4, 32, 11, 9), draw(1, 64, seed=5)
    expected = layer.reference(pixels, is_rounded=False)
    other = draw(*expected.shape, seed=6)
    given = [parameter(values) for values in (pixels, numbers, other)]
    result = op.add(layer.of(given[0]), op.unsqueeze(op.relu(given[1]), np.array([2, 3])))
    model = openvino.Model([op.add(result, given[2])], given)
    assert use_convolutions(model, "fp16") == 1
    added = other + numbers.relu()[:, :, None, None]
    assert error(run(model, pixels, numbers, other)[0], expected + added) < MOST


@pytest.mark.parametrize(("frames", "size"), [(9, (8, 10)), (4, (21, 30)), (3, (5, 7))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_depends_neither_on_its_neighbours_nor_on_threads(
    kind: str, frames: int, size: tuple[int, int], lanes: int
) -> None:
    layer, pixels = drawn(kind, 32, 64), draw(frames, 32, *size)
    assert_frames_are_apart(convolve, layer, pixels)


@pytest.mark.parametrize("shape", [
    (1, (1, 1), 16, 1),  # one row
    (1, (1, 13), 5, 1),  # no whole vectors
    (5, (9, 11), 320, 10),  # chunks that end within a frame
    (2, (3, 5), 513, 2),  # more than is multiplied at once
    (2, (9, 15), 1024, 1),
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_a_linear_map(layout: str, shape: Shape, lanes: int) -> None:
    model, inputs, expected = layers(layout, shape, lanes)
    use_linear(model, "fp16")
    assert set(kinds(model)) == {"Parameter", "Constant", "Linear", "Result"}
    for found, wanted in zip(run(model, *inputs), expected, strict=True):
        assert LEAST < error(found, wanted) < MOST


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_depends_neither_on_others_nor_on_threads(layout: str, lanes: int) -> None:
    assert_tokens_are_apart(lambda model: use_linear(model, "fp16"), layout, 300, lanes)


def test_sums_of_stretches_are_in_float32(lanes: int) -> None:
    """In 16 bits a sum of 4,096 ones would stay at 2,048, and 70,000 would be infinite."""
    tokens, weight = torch.ones(1, 3, 4096), torch.ones(32, 4096)
    weight[1] *= 17
    given = parameter(tokens)
    model = openvino.Model([product(given, weight)], [given])
    assert use_linear(model, "fp16") == 1
    (found,) = run(model, tokens)
    assert torch.equal(found[0, :, 0], torch.full((3,), 4096.0))
    assert torch.equal(found[0, :, 1], torch.full((3,), 4096.0 * 17))


@pytest.mark.parametrize("kind", KINDS)
def test_what_16_bits_do_not_hold_is_not_finite(kind: str, lanes: int) -> None:
    """A number, a weight, or a sum: so that a render goes on in float32. It stays in its frame, or its channel."""
    layer, pixels = of_small_weights(drawn(kind, 32, 64)), draw(3, 32, 6, 5)
    large = layer.weight.clone()
    large[5] = 7e4
    (before,), (of_weight,) = convolve(layer, pixels), convolve(layer._replace(weight=large), pixels)
    channel = torch.arange(64) == 5
    assert not of_weight[:, channel].isfinite().all() and torch.equal(of_weight[:, ~channel], before[:, ~channel])
    if kind == "normed":
        return
    for number in (7e4, 6e4, float("nan")):  # the second is held, not what it adds up to
        spoilt = pixels.clone()
        spoilt[1] = number
        (after,) = convolve(layer._replace(weight=layer.weight.abs()), spoilt)
        assert not after[1].isfinite().any() and bool(after[[0, 2]].isfinite().all())


def test_all_that_fits_of_an_exported_network_is_in_halves(openvino_networks: Path, lanes: int) -> None:
    model = of_three_frames(openvino_networks, "unet")
    use_convolutions(model, "fp16")
    use_linear(model, "fp16")
    ours = [node for node in model.get_ops() if node.get_type_name() in ("FusedConvolution", "Linear")]
    assert ours and all(node.get_attributes()["in_halves"] for node in ours)
    assert {node.get_attributes()["tile"] for node in ours if node.get_type_name() == "FusedConvolution"} == {0}
    assert weights_of(model, "MatMul") == []
    assert all(4 in shape[:2] for shape in weights_of(model, "Convolution"))  # the first and the last


@pytest.mark.parametrize(("size", "channels", "tile"), [
    ((32, 32), 64, 4),  # large pictures: fewer products in float32 take less time than more in 16 bits
    ((32, 40), 64, 4),
    ((28, 32), 64, 0),
    ((32, 32), 704, 0),  # transformed weights would be too large
])  # fmt: skip
def test_large_pictures_are_done_by_winograds_filtering(
    size: tuple[int, int], channels: int, tile: int, lanes: int
) -> None:
    given = op.parameter([1, channels, *size], np.float32)
    model = openvino.Model([convolved(given, torch.zeros(channels, channels, 3, 3))], [given])
    assert use_convolutions(model, "fp16") == 1
    (node,) = (node for node in model.get_ops() if node.get_type_name() == "FusedConvolution")
    assert (node.get_attributes()["tile"], node.get_attributes()["in_halves"]) == (tile, tile == 0)
