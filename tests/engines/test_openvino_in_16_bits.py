"""Convolutions and linear maps in whole numbers of 16 bits against PyTorch's float64: as they are, or by tiles in two digits of eight.

Tests of posecrafter_rt/engines/operations/words.h, digits.h and what uses them, in fp16, on processors with VNNI and AMX.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor

from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.engines.base import BEYOND_FP16
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
from tests.engines.test_openvino_bytes import KINDS, drawn
from tests.engines.test_openvino_bytes import convolve as convolve_in

convolve = partial(convolve_in, precision="fp16")


class Way(NamedTuple):
    """How products are done, and what is lost by it, as a root of mean squares: more than in float32, and no more than this."""

    lanes: int
    has_tiles: bool
    least: float
    most: float


WORDS, NARROW_WORDS, DIGITS = Way(16, False, 1e-5, 4e-4), Way(8, False, 1e-5, 4e-4), Way(16, True, 3e-6, 3e-4)


@pytest.fixture(params=[WORDS, NARROW_WORDS, DIGITS], ids=["words", "words-of-8-lanes", "digits"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Skips where this processor has none of it."""
    wanted: Way = request.param
    take_vectors(request, monkeypatch, wanted.lanes, has_vnni=True, has_tiles=wanted.has_tiles)
    return wanted


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("frames", "channels", "size"), [
    (1, (8, 16), (1, 1)),  # the least of everything
    (2, (24, 48), (13, 31)),  # rows of windows
    (3, (16, 96), (5, 7)),  # and such as are multiplied with those of other rows
    (9, (32, 32), (8, 10)),
    (25, (64, 64), (3, 4)),  # frames are divided between threads
    (24, (64, 64), (20, 20)),
    (1, (512, 512), (6, 5)),  # more than is multiplied at once; weights are divided
    (1, (320, 32), (4, 40)),
    (1, (160, 32), (4, 40)),  # no whole tiles
    (1, (64, 32), (3, 240)),  # a chunk for each row
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_convolution(
    kind: str, frames: int, channels: tuple[int, int], size: tuple[int, int], way: Way
) -> None:
    layer = drawn(kind, whole(channels[0], way.lanes), whole(channels[1], 2 * way.lanes))
    pixels = draw(frames, len(layer.norm[0]), *size)
    pixels[1::2] = pixels[1::2] * 5 + 2  # of a scale of their own
    (found,) = convolve(layer, pixels)
    assert way.least < error(found, layer.reference(pixels, is_rounded=False)) < way.most


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_large_convolution(kind: str, way: Way) -> None:
    """Rows are divided, in several blocks."""
    if not way.has_tiles and kind in ("plain", "normed"):
        pytest.skip("Winograd's filtering does it")
    layer, pixels = drawn(kind, 64, 64), draw(1, 64, 9, 400)
    assert way.least < error(convolve(layer, pixels)[0], layer.reference(pixels, is_rounded=False)) < way.most


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_width_and_height(kind: str, way: Way) -> None:
    layer = drawn(kind, 16, 32)
    pictures = [draw(2, 16, *size) for side in range(1, 34) for size in ((3, side), (side, 2))]
    for found, pixels in zip(convolve(layer, *pictures), pictures, strict=True):
        assert error(found, layer.reference(pixels, is_rounded=False)) < way.most


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_its_own(kind: str, way: Way) -> None:
    layer, pixels, numbers = drawn(kind, 32, 64), draw(4, 32, 11, 9), draw(1, 64, seed=5)
    expected = layer.reference(pixels, is_rounded=False)
    other = draw(*expected.shape, seed=6)
    given = [parameter(values) for values in (pixels, numbers, other)]
    result = op.add(layer.of(given[0]), op.unsqueeze(op.relu(given[1]), np.array([2, 3])))
    model = openvino.Model([op.add(result, given[2])], given)
    assert use_convolutions(model, "fp16") == 1
    added = other + numbers.relu()[:, :, None, None]
    assert error(run(model, pixels, numbers, other)[0], expected + added) < way.most


@pytest.mark.parametrize(("frames", "size"), [(9, (8, 10)), (4, (21, 30)), (3, (5, 7)), (4, (32, 33))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_depends_neither_on_its_neighbours_nor_on_threads(
    kind: str, frames: int, size: tuple[int, int], way: Way
) -> None:
    layer, pixels = drawn(kind, 32, 64), draw(frames, 32, *size)
    pixels[::2] *= 3
    assert_frames_are_apart(convolve, layer, pixels)


@pytest.mark.parametrize("shape", [
    (1, (1, 1), 16, 1),  # one row
    (1, (1, 13), 5, 1),  # no whole vectors, no pairs
    (5, (9, 11), 320, 10),  # rows that end within a frame
    (2, (3, 5), 513, 2),  # more than is multiplied at once
    (2, (9, 15), 1024, 1),
    (9, (20, 21), 320, 1),  # several blocks
    (1, (2, 3), 640, 40),  # weights are divided
])  # fmt: skip
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_a_linear_map(layout: str, shape: Shape, way: Way) -> None:
    model, inputs, expected = layers(layout, shape, way.lanes)
    use_linear(model, "fp16")
    assert set(kinds(model)) == {"Parameter", "Constant", "Linear", "Result"}
    for found, wanted in zip(run(model, *inputs), expected, strict=True):
        assert way.least < error(found, wanted) < way.most


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_depends_neither_on_others_nor_on_threads(layout: str, way: Way) -> None:
    assert_tokens_are_apart(lambda model: use_linear(model, "fp16"), layout, 300, way.lanes)


@pytest.mark.parametrize("num_large", [0, 1, 40])
def test_no_sum_leaves_its_range(num_large: int, way: Way) -> None:
    """Each number is as large as it may be and has its weight's sign, so that sums are the largest there can be."""
    signs = torch.sign(draw(3, 4096))
    weight = signs.repeat_interleave(11, 0)[:32] * draw(32, 4096, seed=1).abs()
    weight[:, :num_large] *= 40
    given = parameter(signs[None])
    model = openvino.Model([product(given, weight)], [given])
    assert use_linear(model, "fp16") == 1
    (found,) = run(model, signs[None])
    expected = signs.double() @ weight.double().T
    assert expected.max() > 3000 and error(found[0], expected) < way.most


@pytest.mark.parametrize("kind", KINDS)
def test_what_float16_does_not_hold_is_held(kind: str, way: Way) -> None:
    """Numbers, weights and sums beyond its range, as the VAE has them: each frame and channel has its own scale."""
    layer, pixels = drawn(kind, 32, 64), draw(3, 32, 6, 5)
    layer.weight[5] *= 1e6
    pixels[1] *= 1e7
    (found,) = convolve(layer, pixels)
    expected = layer.reference(pixels, is_rounded=False)
    for frame in range(3):
        for channels in (slice(5, 6), slice(6, 64)):
            assert error(found[frame, channels], expected[frame, channels]) < way.most


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_frame(kind: str, number: float, way: Way) -> None:
    layer, pixels = drawn(kind, 32, 64), draw(4, 32, 5, 6)
    spoilt = pixels.clone()
    spoilt[2, 17, 3, 1] = number
    before, after = convolve(layer, pixels, spoilt)
    assert not after[2].isfinite().any()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_spoils_its_channel(number: float, way: Way) -> None:
    layer, pixels = drawn("plain", 32, 64), draw(2, 32, 5, 6)
    spoilt = layer.weight.clone()
    spoilt[5, 3, 1, 1] = number
    (before,), (after,) = convolve(layer, pixels), convolve(layer._replace(weight=spoilt), pixels)
    channel = torch.arange(64) == 5
    assert not after[:, channel].isfinite().any() and torch.equal(after[:, ~channel], before[:, ~channel])


def test_what_is_the_same_everywhere(way: Way) -> None:
    """Has no range, or one on one side of zero: nothing is lost of it."""
    numbers = torch.tensor([0.0, 3.0, -2.0, 1e-30])
    pixels = numbers[:, None, None, None].expand(4, 32, 5, 6).contiguous()
    layer = drawn("plain", 32, 64)
    (found,) = convolve(layer, pixels)
    assert torch.equal(found[0], layer.bias[:, None, None].expand_as(found[0]))
    assert error(found, layer.reference(pixels, is_rounded=False)) < way.most


def test_all_that_fits_of_an_exported_network_is_done_so(openvino_networks: Path, way: Way) -> None:
    model, plain = (of_three_frames(openvino_networks, "unet") for _ in range(2))
    assert use_convolutions(model, "fp16") > 0 and use_linear(model, "fp16") > 0
    ours = [node for node in model.get_ops() if node.get_type_name() in ("FusedConvolution", "Linear")]
    narrow = [node for node in ours if not node.get_attributes()["in_halves"]]
    assert [node.get_attributes()["tile"] for node in narrow] == [4, 4]  # the first and the last
    whole = [node for node in ours if node.get_attributes()["in_halves"]]
    assert {node.get_attributes()["tile"] for node in whole if node.get_type_name() == "FusedConvolution"} == {0}
    assert weights_of(model, "MatMul") == weights_of(model, "Convolution") == []
    given = [draw(*tensor.shape, seed=seed) for seed, tensor in enumerate(plain.inputs)]
    for found, wanted in zip(run(model, *given), run(plain, *given), strict=True):
        assert error(found, wanted.double()) < way.most


@pytest.mark.parametrize(("size", "channels", "is_large"), [
    ((32, 32), 64, True),  # without tiles fewer products in float32 take less time than more in 16 bits
    ((32, 40), 64, True),
    ((28, 32), 64, False),
    ((32, 32), 480, True),
    ((32, 32), 512, False),  # transformed weights would be too large for so few tiles
    ((64, 64), 512, True),
    ((64, 64), 704, False),  # or for any number
])  # fmt: skip
def test_large_pictures(size: tuple[int, int], channels: int, is_large: bool, way: Way) -> None:
    given = op.parameter([1, channels, *size], np.float32)
    model = openvino.Model([convolved(given, torch.zeros(channels, channels, 3, 3))], [given])
    assert use_convolutions(model, "fp16") == 1
    (node,) = (node for node in model.get_ops() if node.get_type_name() == "FusedConvolution")
    by_fours = is_large and not way.has_tiles
    assert (node.get_attributes()["tile"], node.get_attributes()["in_halves"]) == (4 * by_fours, not by_fours)


def test_what_leaves_float16s_range(way: Way) -> None:
    for name in BEYOND_FP16:
        assert operations.network_precision(name, "fp16") == "fp16"
    assert operations.network_precision("text_encoder", "fp16") == "fp32"
    assert operations.network_precision("unet", "fp16") == "fp16"
