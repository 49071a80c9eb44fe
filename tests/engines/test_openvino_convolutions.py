"""Winograd's convolutions against PyTorch's in float64, and what becomes of a network that has them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor, nn
from torch.nn import functional

from posecrafter_rt.engines import openvino_convolutions as convolutions
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.folding import fold_doubled
from tests.engines.openvino_models import (
    compiled,
    constant,
    convolved,
    doubled,
    draw,
    infer,
    kinds,
    parameter,
    reshaped,
    run,
    silu_of_norm,
    silu_of_norm_reference,
    whole,
)

EXACT = 3e-5  # of the largest output, at most 512 channels: float32, and transforms that multiply by up to 8
REPLACED = {"Parameter", "Constant", "FusedConvolution", "Result"}  # all that is left


@pytest.fixture(params=[4, 2])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of this side, whatever the picture and its weights."""
    side: int = request.param
    monkeypatch.setattr(convolutions, "LARGE_TILES", 1 if side == 4 else 1 << 40)
    monkeypatch.setattr(convolutions, "MOST_BYTES", 0)
    return side


def tiles(model: openvino.Model) -> list[int]:
    """The sides of the tiles of a model's operations."""
    return [
        node.get_attributes()["tile"] for node in model.get_ordered_ops() if node.get_type_name() == "FusedConvolution"
    ]


def convolution(pixels: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> openvino.Model:
    """A model of one convolution."""
    given = parameter(pixels)
    return openvino.Model([convolved(given, weight, bias, stride=stride)], [given])


def reference(pixels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.conv2d(pixels.double(), weight.double(), None if bias is None else bias.double(), padding=1)


@pytest.mark.parametrize(("frames", "channels", "size"), [
    (1, (8, 16), (16, 16)),  # the least of everything
    (16, (8, 16), (1, 1)),  # pictures smaller than a tile
    (6, (16, 32), (5, 7)),  # neither whole tiles nor whole vectors
    (3, (24, 48), (13, 31)),
    (2, (64, 64), (32, 40)),
    (5, (160, 160), (8, 10)),
    (1, (320, 64), (16, 20)),
    (8, (512, 512), (16, 16)),  # more than a chunk
    (1, (32, 16), (131, 257)),
    (1, (256, 256), (9, 400)),  # a chunk for each row
    (2, (128, 32), (403, 6)),  # a chunk of many rows that ends within a frame
    (16, (64, 32), (4, 4)),
])  # fmt: skip
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_a_convolution(
    frames: int, channels: tuple[int, int], size: tuple[int, int], has_bias: bool, tile: int, lanes: int
) -> None:
    read, written = whole(channels[0], lanes), whole(channels[1], 2 * lanes)
    pixels, weight = draw(frames, read, *size), draw(written, read, 3, 3, seed=1)
    bias = draw(written, seed=2) if has_bias else None
    model = convolution(pixels, weight, bias)
    assert convolutions.use_convolutions(model) == 1
    assert tiles(model) == [tile]
    assert set(kinds(model)) == REPLACED
    assert relative_error(run(model, pixels)[0], reference(pixels, weight, bias)) < EXACT


def test_a_frame_depends_neither_on_its_neighbours_nor_on_threads(tile: int, lanes: int) -> None:
    pixels, weight = draw(9, 16, 21, 18), draw(32, 16, 3, 3, seed=1)
    together, alone = convolution(pixels, weight), convolution(pixels[4:5], weight)
    assert convolutions.use_convolutions(together) == convolutions.use_convolutions(alone) == 1
    (frames,) = run(together, pixels)
    assert torch.equal(frames[4:5], run(alone, pixels[4:5])[0])
    assert torch.equal(frames, run(together, pixels, num_threads=1)[0])


@pytest.mark.parametrize("channels", [16, 256])
def test_rows_depend_on_nothing_above_them(channels: int, tile: int, lanes: int) -> None:
    """The first row of a strip gathers all its lines; in the picture it shares some with the row above, or a chunk begins."""
    pixels, weight = draw(1, channels, 120, 12), draw(32, channels, 3, 3, seed=1)
    picture = convolution(pixels, weight)
    assert convolutions.use_convolutions(picture) == 1
    (rows,) = run(picture, pixels)
    for top in range(0, 120, 24):
        strip = pixels[:, :, top : top + 24]
        alone = convolution(strip, weight)
        assert convolutions.use_convolutions(alone) == 1
        assert torch.equal(run(alone, strip)[0][:, :, tile:-tile], rows[:, :, top + tile : top + 24 - tile])


def test_nothing_of_one_call_is_left_in_the_next(tile: int, lanes: int) -> None:
    """Not even where a thread goes on with the row of tiles that follows its last; which it gets differs from call to call."""
    weight = draw(2 * lanes, lanes, 3, 3)
    given = [draw(1, lanes, 40 * tile, tile, seed=seed) for seed in (1, 2)]
    model = convolution(given[0], weight)
    assert convolutions.use_convolutions(model) == 1
    alone, again = [run(model, pixels, num_threads=1)[0] for pixels in given], compiled(model, INFERENCE_NUM_THREADS=2)
    for _ in range(300):
        assert all(map(torch.equal, [infer(again, pixels)[0] for pixels in given], alone))


@pytest.mark.parametrize(("weight", "size", "stride"), [
    ((32, 32, 1, 1), (16, 16), 1),
    ((32, 32, 3, 3), (16, 16), 2),
    ((32, 20, 3, 3), (16, 16), 1),  # no whole vectors
    ((20, 32, 3, 3), (16, 16), 1),  # no whole panels
    ((32, 4, 3, 3), (16, 16), 2),
    ((32, 32, 3, 3), (8, 12), 1),  # too few tiles
    ((32, 4, 3, 3), (8, 12), 1),
])  # fmt: skip
def test_what_does_not_fit_or_gain_stays(
    weight: tuple[int, ...], size: tuple[int, int], stride: int, lanes: int
) -> None:
    model = convolution(draw(1, weight[1], *size), draw(*weight, seed=1), draw(weight[0]), stride)
    assert convolutions.use_convolutions(model) == 0
    assert "Convolution" in kinds(model)


@pytest.mark.parametrize(("read", "written"), [(4, 32), (3, 64), (7, 5), (32, 4), (32, 3), (48, 8), (4, 4)])
@pytest.mark.parametrize("is_added", [True, False])
def test_to_and_from_few_channels_it_is_one(read: int, written: int, is_added: bool, lanes: int) -> None:
    """Pictures' and latents', which need not come in whole vectors and panels."""
    pixels, other = draw(3, read, 17, 19), draw(3, written, 17, 19, seed=3)
    weight, bias = draw(written, read, 3, 3, seed=1), draw(written, seed=2)
    given, added = parameter(pixels), parameter(other)
    result = convolved(given, weight, bias)
    model = openvino.Model([op.add(result, added) if is_added else op.add(op.relu(result), added)], [given, added])
    assert convolutions.use_convolutions(model) == 1
    assert additions_of_pictures(model) == (not is_added)
    found, expected = run(model, pixels, other)[0], reference(pixels, weight, bias)
    assert relative_error(found, expected + other if is_added else expected.relu() + other) < EXACT


@pytest.mark.parametrize(("has_large_weights", "frames", "size", "expected"), [
    (False, 4, (8, 8), [4]),
    (False, 3, (8, 8), []),  # too few
    (True, 1, (16, 16), [4]),  # of large pictures
    (True, 64, (8, 8), [2]),
    (True, 1, (8, 8), [2]),
    (True, 4, (4, 4), [2]),
    (True, 3, (4, 4), []),
])  # fmt: skip
def test_small_pictures_with_large_weights_have_small_tiles(
    has_large_weights: bool,
    frames: int,
    size: tuple[int, int],
    expected: list[int],
    lanes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolutions, "MOST_BYTES", 4 * 36 * lanes * 2 * lanes - has_large_weights)
    model = convolution(draw(frames, lanes, *size), draw(2 * lanes, lanes, 3, 3))
    assert convolutions.use_convolutions(model) == len(expected)
    assert tiles(model) == expected


def norm_silu_convolution(pixels: Tensor, groups: int, norm: tuple[Tensor, Tensor], weight: Tensor) -> openvino.Model:
    """A model of convolution ∘ SiLU ∘ GroupNorm."""
    given = parameter(pixels)
    return openvino.Model([convolved(silu_of_norm(given, groups, norm), weight)], [given])


@pytest.mark.parametrize("size", [(16, 16), (9, 21)])
@pytest.mark.parametrize(("channels", "groups"), [(16, 16), (32, 8), (96, 4)])
@pytest.mark.parametrize("offset", [0.0, 100.0])  # what is far from zero loses digits in a variance of one pass
def test_norm_and_silu_before_it_are_its_own(
    size: tuple[int, int], channels: int, groups: int, offset: float, tile: int, lanes: int
) -> None:
    pixels, weight = draw(3, channels, *size) + offset, draw(32, channels, 3, 3, seed=1)
    norm = draw(channels, seed=2), draw(channels, seed=3)
    model = norm_silu_convolution(pixels, groups, norm, weight)
    assert convolutions.use_convolutions(model) == 1
    assert set(kinds(model)) == REPLACED
    expected = reference(silu_of_norm_reference(pixels, groups, norm), weight)
    assert relative_error(run(model, pixels)[0], expected) < EXACT * (1 + offset / 10)


@pytest.mark.parametrize(("frames", "channels", "size"), [
    (1, (16, 32), (16, 16)),
    (16, (16, 32), (1, 1)),
    (6, (32, 32), (5, 7)),
    (3, (16, 96), (13, 31)),
    (8, (256, 256), (16, 16)),  # more than a chunk
    (1, (16, 32), (3, 130)),
])  # fmt: skip
@pytest.mark.parametrize("has_norm", [True, False])
def test_what_is_as_large_and_added_is_its_own(
    frames: int, channels: tuple[int, int], size: tuple[int, int], has_norm: bool, tile: int, lanes: int
) -> None:
    """As the input of a residual block is, with its norm, and what a ControlNet gives, without one."""
    read, written = channels
    pixels, other = draw(frames, read, *size), draw(frames, written, *size, seed=4)
    weight, bias, norm = draw(written, read, 3, 3, seed=1), draw(written, seed=5), (draw(read, seed=2), draw(read))
    given, added = parameter(pixels), parameter(other)
    result = convolved(silu_of_norm(given, 8, norm) if has_norm else given, weight, bias)
    model = openvino.Model([op.add(added, result) if has_norm else op.add(result, added)], [given, added])
    assert convolutions.use_convolutions(model) == 1
    assert set(kinds(model)) == REPLACED
    expected = reference(silu_of_norm_reference(pixels, 8, norm) if has_norm else pixels, weight, bias) + other
    assert relative_error(run(model, pixels, other)[0], expected) < EXACT


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_added", [True, False])
def test_a_computed_number_for_each_channel_joins_the_bias(
    frames: int, has_bias: bool, is_added: bool, lanes: int
) -> None:
    """A timestep's, say; what is added after it is the operation's, too."""
    pixels, numbers, weight = draw(frames, 32, 16, 16), draw(1, 32, seed=1), draw(32, 32, 3, 3, seed=2)
    given, timestep, bias = parameter(pixels), parameter(numbers), draw(32, seed=3) if has_bias else None
    result = op.add(convolved(given, weight, bias), op.unsqueeze(op.relu(timestep), np.array([2, 3])))
    model = openvino.Model([op.add(result, given) if is_added else result], [given, timestep])
    assert convolutions.use_convolutions(model) == 1
    assert additions_of_pictures(model) == 0
    expected = reference(pixels, weight, bias) + numbers.relu()[:, :, None, None] + (pixels if is_added else 0)
    assert relative_error(run(model, pixels, numbers)[0], expected) < EXACT


@pytest.mark.parametrize("first", [0, 5])
def test_those_numbers_may_be_part_of_more(first: int, lanes: int) -> None:
    """As one step's of all layers are: they are read where they lie."""
    pixels, numbers, weight = draw(2, 32, 16, 16), draw(1, 70, seed=1), draw(32, 32, 3, 3, seed=2)
    given, timestep = parameter(pixels), parameter(numbers)
    ends = (constant(torch.tensor([number])) for number in (first, first + 32, 1, 1))
    own = op.unsqueeze(op.slice(timestep, *ends), np.array([2, 3]))
    model = openvino.Model([op.add(convolved(given, weight), own)], [given, timestep])
    assert convolutions.use_convolutions(model) == 1
    assert set(kinds(model)) == REPLACED
    expected = reference(pixels, weight) + numbers[:, first : first + 32, None, None]
    assert relative_error(run(model, pixels, numbers)[0], expected) < EXACT


def test_parts_of_rows_are_not_read_as_one(lanes: int) -> None:
    pixels, numbers, weight = draw(2, 32, 16, 16), draw(4, 16, seed=1), draw(32, 32, 3, 3, seed=2)
    given, timestep = parameter(pixels), parameter(numbers)
    ends = (constant(torch.tensor([number])) for number in (3, 11, 1, 1))
    own = reshaped(op.slice(timestep, *ends), 1, 32, 1, 1)
    model = openvino.Model([op.add(convolved(given, weight), own)], [given, timestep])
    assert convolutions.use_convolutions(model) == 1
    expected = reference(pixels, weight) + numbers[:, 3:11].reshape(1, 32, 1, 1)
    assert relative_error(run(model, pixels, numbers)[0], expected) < EXACT


def additions_of_pictures(model: openvino.Model) -> int:
    return sum(node.get_type_name() == "Add" and len(node.get_output_shape(0)) == 4 for node in model.get_ordered_ops())


def computed(*shape: int) -> Any:
    """A value of this shape that is no constant to whoever looks at its node."""
    return op.relu(constant(draw(*shape, seed=5)))


STAYING: dict[str, Callable[[Any, Callable[[Any], Any]], list[Any]]] = {
    "a number for each frame and channel": lambda x, of: [op.add(of(x), computed(2, 32, 1, 1))],
    "a number for each frame": lambda x, of: [op.add(of(x), computed(2, 1, 1, 1))],
    "one number": lambda x, of: [op.add(of(x), computed(1, 1, 1, 1))],
    "a picture for all frames": lambda x, of: [op.add(of(x), computed(1, 32, 16, 16))],
    "a row": lambda x, of: [op.add(of(x), computed(2, 32, 1, 16))],
    "itself": lambda x, of: [op.add(y := of(x), y)],
    "to what is read, too": lambda x, of: [op.add(y := of(x), x), op.relu(y)],
    "a number for each channel to what is read, too": lambda x, of: [op.add(y := of(x), computed(1, 32, 1, 1)), y],
    "more frames": lambda x, of: [op.add(of(op.gather(x, np.array([1]), np.int64(0))), x)],
}  # fmt: skip


@pytest.mark.parametrize("name", STAYING)
def test_another_addition_stays(name: str, lanes: int) -> None:
    """Beside the convolution, whose result is as before."""
    pixels, weight = draw(2, 32, 16, 16), draw(32, 32, 3, 3, seed=1)

    def build() -> openvino.Model:
        given = parameter(pixels)
        return openvino.Model(STAYING[name](given, lambda of: convolved(of, weight)), [given])

    model = build()
    assert convolutions.use_convolutions(model) == additions_of_pictures(model) == 1
    for found, expected in zip(run(model, pixels), run(build(), pixels), strict=True):
        assert relative_error(found, expected) < EXACT


def test_of_two_convolutions_that_are_added_one_takes_the_other(lanes: int) -> None:
    pixels, first, second = draw(2, 32, 16, 16), draw(32, 32, 3, 3, seed=1), draw(32, 32, 3, 3, seed=2)
    given = parameter(pixels)
    model = openvino.Model([op.add(convolved(given, first), convolved(given, second))], [given])
    assert convolutions.use_convolutions(model) == 2
    assert set(kinds(model)) == REPLACED
    assert relative_error(run(model, pixels)[0], reference(pixels, first) + reference(pixels, second)) < EXACT


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 32)])
@pytest.mark.parametrize("is_added", [True, False])
def test_a_folded_doubling_is_unfolded(size: tuple[int, int], is_added: bool, tile: int, lanes: int) -> None:
    torch.manual_seed(0)
    convolution, pixels = nn.Conv2d(48, 32, 3, padding=1), draw(3, 48, *size)
    other = draw(3, 32, *(2 * side for side in size), seed=1)
    with torch.no_grad():
        weight, bias = fold_doubled(convolution).state_dict().values()
        model = doubling(pixels, weight, bias, other if is_added else None)
    assert convolutions.use_convolutions(model) == 1
    assert set(kinds(model)) == REPLACED
    with torch.no_grad():
        expected = convolution.double()(functional.interpolate(pixels.double(), scale_factor=2))
    assert relative_error(run(model, pixels)[0], expected + (other if is_added else 0)) < EXACT


def test_another_transposed_convolution_stays(lanes: int) -> None:
    """In float32: Winograd's filtering is of a doubled picture's alone."""
    pixels = draw(3, 48, 8, 8)
    assert convolutions.use_convolutions(doubling(pixels, draw(48, 32, 4, 4), draw(32))) == 0


def doubling(pixels: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None = None) -> openvino.Model:
    """A model of a transposed convolution, its bias as ONNX brings it."""
    given = parameter(pixels)
    result = doubled(given, weight, bias)
    return openvino.Model([result if added is None else op.add(result, constant(added))], [given])


def test_silu_holds_at_its_ends(lanes: int) -> None:
    """Where exp would overflow or vanish: SiLU(x) is x, or 0."""
    pixels, weight = draw(1, 16, 16, 16), draw(32, 16, 3, 3, seed=1)
    norm = torch.full((16,), 200.0), torch.zeros(16)
    model = norm_silu_convolution(pixels, 16, norm, weight)
    assert convolutions.use_convolutions(model) == 1
    active = silu_of_norm_reference(pixels, 16, norm)
    assert float(active.max()) > 400
    assert relative_error(run(model, pixels)[0], reference(active, weight)) < EXACT


@pytest.mark.parametrize("frames", [1, 3])
def test_silu_alone_before_it_is_its_own(frames: int, tile: int, lanes: int) -> None:
    pixels, weight = draw(frames, 48, 17, 16), draw(32, 48, 3, 3, seed=1)
    given = parameter(pixels)
    model = openvino.Model([convolved(op.multiply(given, op.sigmoid(given)), weight)], [given])
    assert convolutions.use_convolutions(model) == 1
    assert set(kinds(model)) == REPLACED
    assert relative_error(run(model, pixels)[0], reference(functional.silu(pixels.double()), weight)) < EXACT


def test_another_activation_before_it_stays(lanes: int) -> None:
    """SiLU that is read, too, and x · sigmoid of something else."""
    pixels, weight = draw(1, 16, 16, 16), draw(32, 16, 3, 3, seed=1)
    for gate in (lambda value: value, op.abs):
        given = parameter(pixels)
        active = op.multiply(given, op.sigmoid(gate(given)))
        model = openvino.Model([convolved(active, weight), *([] if gate is op.abs else [active])], [given])
        assert convolutions.use_convolutions(model) == 1
        assert "Sigmoid" in kinds(model)
        gated = pixels * torch.sigmoid(pixels if gate is not op.abs else pixels.abs())
        assert relative_error(run(model, pixels)[0], reference(gated, weight)) < EXACT


def test_two_threads_at_once(lanes: int) -> None:
    """Two requests of one compiled network share the operation, and its transformed weights."""
    given = [draw(4, 32, 33, 35, seed=seed) for seed in range(8)]
    model = norm_silu_convolution(given[0], 8, (draw(32, seed=2), draw(32, seed=3)), draw(32, 32, 3, 3, seed=1))
    assert convolutions.use_convolutions(model) == 1
    alone, shared = [run(model, pixels)[0] for pixels in given], compiled(model, NUM_STREAMS=2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda pixels: infer(shared.create_infer_request(), pixels)[0], given)
            assert all(map(torch.equal, found, alone))
