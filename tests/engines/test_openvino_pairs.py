"""Attention by products of pairs of 16-bit floats against PyTorch's in float64.

Tests of posecrafter_rt/engines/operations/pairs.h and what uses it, in fp16, on processors with AMX.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.openvino_attention import use_attention
from posecrafter_rt.export.verify import relative_error
from tests.engines.conftest import take_vectors
from tests.engines.openvino_models import run
from tests.engines.test_openvino_attention import (
    CASES,
    FRAMES,
    Build,
    Shape,
    drawn,
    model_of,
    of_a_picture,
    over_frames,
    reference,
)

MOST = 3e-5  # of the largest output; float32 is held to a tenth, digits of eight bits to ten times as much
OF_TOKENS = [case for case in CASES if case[0] is not over_frames]


@pytest.fixture
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Those of vectors that have tiles; skips where there are none."""
    return take_vectors(request, monkeypatch, 16, has_tiles=True)


def attended(build: Build, shape: Shape, given: list[Tensor] | None = None, precision: Precision = "fp16") -> Tensor:
    """(batch, rows, places, C); given: its inputs, instead of those that are drawn."""
    model, inputs = model_of(build, shape)
    assert use_attention(model, precision) == 1
    return run(model, *(given or inputs))[0].reshape(drawn(shape)[0].shape)


@pytest.mark.parametrize(("build", "shape"), OF_TOKENS)
def test_it_is_attention(build: Build, shape: Shape, lanes: int) -> None:
    found, in_floats = attended(build, shape), attended(build, shape, precision="fp32")
    assert relative_error(found, reference(drawn(shape), shape)) < MOST
    assert shape.keys == 1 or not torch.equal(found, in_floats)


def test_rows_keys_and_widths_of_any_number(lanes: int) -> None:
    """Whole tiles, and one more or less."""
    for number in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97):
        for shape in (Shape(1, number, 40, 1, 2, 8), Shape(1, 9, number, 1, 1, 40), Shape(1, 20, 35, 1, 2, number)):
            assert relative_error(attended(of_a_picture, shape), reference(drawn(shape), shape)) < MOST


def test_a_row_depends_on_no_others(lanes: int) -> None:
    shape = Shape(1, 450, 80, 1, 3, 40)
    query, key, value = (tensor[:, :, 0] for tensor in drawn(shape))
    found = attended(of_a_picture, shape)
    for begin, end in ((0, 1), (7, 40), (449, 450), (100, 433)):
        given = [query[:, begin:end], key, value]
        assert torch.equal(attended(of_a_picture, shape._replace(rows=end - begin), given), found[:, begin:end])


def test_numbers_of_any_size(lanes: int) -> None:
    """Keys and values in which 1e-6 stands beside 1e6 of another channel: each number keeps its own digits."""
    shape = Shape(1, 40, 70, 1, 1, 8)
    given = drawn(shape)
    sizes = torch.logspace(-6, 6, 8)
    given[0], given[1], given[2] = given[0] * sizes, given[1] / sizes, given[2] * sizes
    found, expected = attended(of_a_picture, shape, [tensor[:, :, 0] for tensor in given]), reference(given, shape)
    for channel in range(shape.width):
        assert relative_error(found[..., channel], expected[..., channel]) < MOST


@pytest.mark.parametrize("largest", [0, 600, 1299])
def test_keys_that_come_in_parts_of_which_one_weighs_most(largest: int, lanes: int) -> None:
    """Scores of up to some hundred rise towards one key and fall after it; a row's largest is where it may be."""
    shape = Shape(1, 140, 1300, 1, 2, 40)
    query, key, value = drawn(shape)
    nearness = 8 / (1 + (torch.arange(shape.keys) - largest).abs() / 50)
    given = [query, key * nearness[:, None, None], value]
    found = attended(of_a_picture, shape, [tensor[:, :, 0] for tensor in given])
    assert relative_error(found, reference(given, shape)) < 3 * MOST  # of scores so large as much is lost of a weight


def test_scores_of_any_size(lanes: int) -> None:
    """The largest weighs all, without an overflow."""
    shape = Shape(1, 4, 40, 1, 1, 8)
    query, key, value = drawn(shape)
    given = [query * 1e6, key * 1e6, value]
    found = attended(of_a_picture, shape, [tensor[:, :, 0] for tensor in given])
    assert relative_error(found, reference(given, shape)) < MOST


@pytest.mark.parametrize("shape", FRAMES)
def test_frames_stay_in_float32(shape: Shape, lanes: int) -> None:
    assert torch.equal(attended(over_frames, shape), attended(over_frames, shape, precision="fp32"))
