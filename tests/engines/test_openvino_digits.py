"""Convolutions and linear maps in two digits of eight bits against PyTorch's float64.

Tests of posecrafter_rt/engines/operations/digits.h and what uses it, in fp16, on processors with AMX.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op

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
    run,
    whole,
)
from tests.engines.test_openvino_bytes import KINDS, drawn
from tests.engines.test_openvino_bytes import convolve as convolve_in
from tests.engines.test_openvino_in_halves import error

LEAST, MOST = (
    3e-6,
    3e-4,
)  # what two digits lose, as a root of mean squares: more than float32, a tenth of what halves do
convolve = partial(convolve_in, precision="fp16")


@pytest.fixture
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Those of vectors that have tiles; skips where there are none."""
    return take_vectors(request, monkeypatch, 16, has_tiles=True)


@pytest.mark.parametrize(("frames", "channels", "size"), [
    (1, (8, 16), (1, 1)),  # the least of everything
    (2, (24, 48), (13, 31)),
    (3, (16, 96), (5, 7)),
    (9, (32, 32), (8, 10)),
    (24, (64, 64), (20, 20)),  # frames are divided between threads
    (1, (512, 512), (6, 5)),  # weights are
    (1, (160, 32), (4, 40)),  # no whole tiles
    (1, (64, 64), (9, 400)),  # rows are, in several blocks
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_convolution(
    kind: str, frames: int, channels: tuple[int, int], size: tuple[int, int], lanes: int
) -> None:
    layer = drawn(kind, whole(channels[0], lanes), whole(channels[1], 2 * lanes))
    pixels = draw(frames, len(layer.norm[0]), *size)
    pixels[1::2] = pixels[1::2] * 5 + 2  # of a scale of their own
    (found,) = convolve(layer, pixels)
    assert LEAST < error(found, layer.reference(pixels, is_rounded=False)) < MOST


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_any_width_and_height(kind: str, lanes: int) -> None:
    layer = drawn(kind, 16, 32)
    pictures = [draw(2, 16, *size) for side in range(1, 34) for size in ((3, side), (side, 2))]
    for found, pixels in zip(convolve(layer, *pictures), pictures, strict=True):
        assert error(found, layer.reference(pixels, is_rounded=False)) < MOST


@pytest.mark.parametrize(("frames", "size"), [(9, (8, 10)), (4, (21, 30)), (3, (5, 7)), (4, (32, 33))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_depends_neither_on_its_neighbours_nor_on_threads(
    kind: str, frames: int, size: tuple[int, int], lanes: int
) -> None:
    layer, pixels = drawn(kind, 32, 64), draw(frames, 32, *size)
    pixels[::2] *= 3
    assert_frames_are_apart(convolve, layer, pixels)


@pytest.mark.parametrize("shape", [
    (1, (1, 1), 16, 1),  # one row
    (1, (1, 13), 5, 1),  # no whole vectors
    (5, (9, 11), 320, 10),  # rows that end within a frame
    (2, (3, 5), 513, 2),
    (2, (9, 15), 1024, 1),
    (9, (20, 21), 320, 1),  # several blocks
    (1, (2, 3), 640, 40),  # weights are divided
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_16_bits_do_not_hold_is_held(kind: str, lanes: int) -> None:
    """Numbers, weights and sums beyond float16's range, as the VAE has them: each frame and channel has its own scale."""
    layer, pixels = drawn(kind, 32, 64), draw(3, 32, 6, 5)
    layer.weight[5] *= 1e6
    pixels[1] *= 1e7
    (found,) = convolve(layer, pixels)
    expected = layer.reference(pixels, is_rounded=False)
    for frame in range(3):
        for channels in (slice(5, 6), slice(6, 64)):
            assert error(found[frame, channels], expected[frame, channels]) < MOST


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_frame(kind: str, number: float, lanes: int) -> None:
    layer, pixels = drawn(kind, 32, 64), draw(4, 32, 5, 6)
    spoilt = pixels.clone()
    spoilt[2, 17, 3, 1] = number
    before, after = convolve(layer, pixels, spoilt)
    assert not after[2].isfinite().any()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_spoils_its_channel(number: float, lanes: int) -> None:
    layer, pixels = drawn("plain", 32, 64), draw(2, 32, 5, 6)
    spoilt = layer.weight.clone()
    spoilt[5, 3, 1, 1] = number
    (before,), (after,) = convolve(layer, pixels), convolve(layer._replace(weight=spoilt), pixels)
    channel = torch.arange(64) == 5
    assert not after[:, channel].isfinite().any() and torch.equal(after[:, ~channel], before[:, ~channel])


def test_what_is_the_same_everywhere(lanes: int) -> None:
    """Has no range, or one on one side of zero: nothing is lost of it."""
    numbers = torch.tensor([0.0, 3.0, -2.0, 1e-30])
    pixels = numbers[:, None, None, None].expand(4, 32, 5, 6).contiguous()
    layer = drawn("plain", 32, 64)
    (found,) = convolve(layer, pixels)
    assert torch.equal(found[0], layer.bias[:, None, None].expand_as(found[0]))
    assert error(found, layer.reference(pixels, is_rounded=False)) < MOST


def test_large_pictures_are_done_so_too(lanes: int) -> None:
    """Where halves leave them to Winograd's filtering."""
    given = op.parameter([1, 64, 32, 32], np.float32)
    model = openvino.Model([convolved(given, torch.zeros(64, 64, 3, 3))], [given])
    assert use_convolutions(model, "fp16") == 1
    (node,) = (node for node in model.get_ops() if node.get_type_name() == "FusedConvolution")
    assert (node.get_attributes()["tile"], node.get_attributes()["in_halves"]) == (0, True)


def test_what_leaves_float16s_range_is_in_digits(lanes: int) -> None:
    for name in BEYOND_FP16:
        assert operations.network_precision(name, "fp16") == "fp16"
    assert operations.network_precision("text_encoder", "fp16") == "fp32"
    assert operations.network_precision("unet", "fp16") == "fp16"


def test_a_network(openvino_networks: Path, lanes: int) -> None:
    model, plain = (of_three_frames(openvino_networks, "unet") for _ in range(2))
    assert use_convolutions(model, "fp16") + use_linear(model, "fp16") > 0
    given = [draw(*tensor.shape, seed=seed) for seed, tensor in enumerate(plain.inputs)]
    for found, wanted in zip(run(model, *given), run(plain, *given), strict=True):
        assert error(found, wanted.double()) < MOST
