"""Weights in 16 bits against PyTorch's float64 of what is rounded alike, and which layers have them.

Tests of posecrafter_rt/engines/openvino_convolutions.py and openvino_linear.py in fp16, on processors that multiply in
float32; test_openvino_in_16_bits.py has those that multiply in 16 bits.
"""

from __future__ import annotations

from pathlib import Path

import openvino
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posecrafter_rt.engines import openvino_convolutions as convolutions
from posecrafter_rt.engines.openvino_convolutions import use_convolutions
from posecrafter_rt.engines.openvino_linear import use_linear
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.doubling import fold_doubling
from tests.engines.conftest import take_vectors
from tests.engines.openvino_models import (
    LAYOUTS,
    Linear,
    Shape,
    convolved,
    doubled,
    draw,
    kinds,
    layers,
    linear_map,
    of_three_frames,
    parameter,
    run,
    weights_of,
    whole,
)

EXACT = 1e-5  # of the largest output, where nothing is rounded but float32
ROUNDED = 1e-3  # where weights are
SCALE = 0.05  # of weights: none is below the least normal number in 16 bits, nor is it one of few


@pytest.fixture(params=[16, 8], ids=lambda lanes: f"{lanes}-lanes")
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Those of vectors that have no products of whole numbers."""
    return take_vectors(request, monkeypatch, request.param, has_vnni=False)


def rounded(weight: Tensor) -> Tensor:
    return weight.half().double()


def map_by_halves(tokens: Tensor, by: Linear) -> Tensor:
    return linear_map(tokens, (rounded(by[0]), by[1]))


@pytest.mark.parametrize("shape", [
    (1, (1, 1), 16, 1),
    (1, (1, 13), 5, 1),
    (5, (9, 11), 320, 20),  # chunks that end within a frame
    (2, (3, 5), 513, 2),  # more than is multiplied at once
    (2, (3, 5), 1024, 1),  # rows that are copied
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linear_map_is_that_by_rounded_weights(layout: str, shape: Shape, lanes: int) -> None:
    model, inputs, unrounded = layers(layout, shape, lanes)
    expected = layers(layout, shape, lanes, map_by_halves)[2]
    use_linear(model, "fp16")
    assert kinds(model)["Linear"] == len(expected)
    for found, wanted, exact in zip(run(model, *inputs), expected, unrounded, strict=True):
        assert relative_error(found, wanted) < EXACT
        assert 10 * relative_error(found, wanted) < relative_error(found, exact) < ROUNDED


@pytest.fixture
def in_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "MOST_BYTES", 0)


def reference(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(pixels.double(), weight.double(), bias.double(), padding=1)


def convolution(pixels: Tensor, weight: Tensor, bias: Tensor) -> openvino.Model:
    given = parameter(pixels)
    return openvino.Model([convolved(given, weight, bias)], [given])


@pytest.mark.parametrize(("frames", "channels", "size"), [
    (1, (8, 16), (2, 2)),  # one tile: weights are kept in 16 bits all the same
    (6, (16, 32), (5, 7)),
    (3, (24, 48), (13, 31)),
    (2, (320, 64), (8, 10)),
])  # fmt: skip
def test_a_convolution_in_tiles_of_two(
    frames: int, channels: tuple[int, int], size: tuple[int, int], in_small_tiles: None, lanes: int
) -> None:
    """Whole multiples of four, whose transforms are whole numbers, are multiplied as they are; others are rounded."""
    read, written = whole(channels[0], lanes), whole(channels[1], 2 * lanes)
    pixels, bias = draw(frames, read, *size), draw(written, seed=2)
    for weight, least, most in ((4 * draw(written, read, 3, 3, seed=1).mul(4).round(), 0, EXACT),
                                (SCALE * draw(written, read, 3, 3, seed=1), EXACT, ROUNDED)):  # fmt: skip
        model = convolution(pixels, weight, bias)
        assert use_convolutions(model, "fp16") == 1
        (node,) = (node for node in model.get_ops() if node.get_type_name() == "FusedConvolution")
        assert node.get_attributes()["in_halves"] and node.get_attributes()["tile"] == 2
        assert least <= relative_error(run(model, pixels)[0], reference(pixels, weight, bias)) < most


def test_a_doubled_pictures_convolution(in_small_tiles: None, lanes: int) -> None:
    pixels, weight = draw(2, lanes, 6, 7), SCALE * draw(2 * lanes, lanes, 3, 3, seed=1)
    bias, given = draw(2 * lanes, seed=2), parameter(pixels)
    model = openvino.Model([doubled(given, fold_doubling(weight), bias)], [given])
    assert use_convolutions(model, "fp16") == 1
    twice = functional.interpolate(pixels, scale_factor=2)
    assert EXACT < relative_error(run(model, pixels)[0], reference(twice, weight, bias)) < ROUNDED


def test_a_convolution_in_tiles_of_four_keeps_its_weights(lanes: int) -> None:
    """Its output's transform would add up their rounding, and where it is chosen they are small."""
    pixels, weight, bias = draw(2, lanes, 24, 24), SCALE * draw(2 * lanes, lanes, 3, 3, seed=1), draw(2 * lanes)
    model, alike = convolution(pixels, weight, bias), convolution(pixels, weight, bias)
    assert use_convolutions(model, "fp16") == use_convolutions(alike) == 1
    assert torch.equal(run(model, pixels)[0], run(alike, pixels)[0])


def test_it_depends_on_no_threads(in_small_tiles: None, lanes: int) -> None:
    pixels, weight, bias = draw(3, 64, 13, 18), SCALE * draw(64, 64, 3, 3, seed=1), draw(64)
    model = convolution(pixels, weight, bias)
    assert use_convolutions(model, "fp16") == 1
    assert torch.equal(run(model, pixels)[0], run(model, pixels, num_threads=1)[0])
    model, inputs, _ = layers("feed-forward", (3, (13, 13), 1040, 2), lanes)
    use_linear(model, "fp16")
    assert all(map(torch.equal, run(model, *inputs), run(model, *inputs, num_threads=1)))


def test_what_16_bits_do_not_hold_is_not_finite(in_small_tiles: None, lanes: int) -> None:
    """So that a render goes on in float32, as where activations are not."""
    pixels, weight = draw(1, lanes, 8, 8), SCALE * draw(2 * lanes, lanes, 3, 3)
    for largest, is_finite in ((65504.0, True), (65536.0, False)):
        weight[3, 0, 1, 1] = largest * 4  # of which a quarter is in the middle of a tile
        model = convolution(pixels, weight, draw(2 * lanes))
        assert use_convolutions(model, "fp16") == 1
        (found,) = run(model, pixels)
        assert bool(found[:, 3].isfinite().all()) == is_finite
        assert bool(found[:, [*range(3), *range(4, 2 * lanes)]].isfinite().all())


def test_all_that_fits_of_an_exported_network_has_them(
    openvino_networks: Path, in_small_tiles: None, lanes: int
) -> None:
    model = of_three_frames(openvino_networks, "unet")
    use_convolutions(model, "fp16")
    use_linear(model, "fp16")
    ours = [node for node in model.get_ops() if node.get_type_name() in ("FusedConvolution", "Linear")]
    assert ours and sum(not node.get_attributes()["in_halves"] for node in ours) == 2  # the first and the last
    assert weights_of(model, "MatMul") == []
    left = [node for node in model.get_ops() if node.get_type_name() == "Convolution"]
    # Which are not done by Winograd's filtering.
    assert all(list(node.get_attributes()["strides"]) == [2, 2] for node in left)
