"""Winograd's convolutions against PyTorch's in float64, and what becomes of a network that has them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor, nn
from torch.nn import functional

from posecrafter_rt.engines import openvino_winograd as winograd
from posecrafter_rt.engines.openvino import OpenVinoEngine
from posecrafter_rt.export.blob_cache import BlobCache
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.folding import fold_doubled
from posecrafter_rt.spec import NetworkSpec, TensorSpec

EXACT = 3e-5  # of the largest output, at most 512 channels: float32, and transforms that multiply by up to 8


@pytest.fixture
def operation() -> None:
    """Skips where there is none; compiled when the first test asks, not while tests are collected."""
    reason = winograd.missing_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=winograd.VECTORS, ids=lambda vectors: f"{vectors.lanes}-lanes")
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The operation with vectors of so many floats; skips where there is none."""
    vectors: winograd.Vectors = request.param
    if not vectors.needed <= winograd.cpu_features():
        pytest.skip(f"this processor lacks {' or '.join(sorted(vectors.needed))}")
    monkeypatch.setattr(winograd, "cpu_features", lambda: vectors.needed)
    request.getfixturevalue("operation")
    return vectors.lanes


@pytest.fixture(params=[4, 2])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of this side, whatever the picture and its weights."""
    side: int = request.param
    monkeypatch.setattr(winograd, "LARGE_TILES", 1 if side == 4 else 1 << 40)
    monkeypatch.setattr(winograd, "MOST_BYTES", 0)
    return side


def tiles(model: openvino.Model) -> list[int]:
    """The sides of the tiles of a model's operations."""
    return [node.get_attributes()["tile"] for node in model.get_ordered_ops() if node.get_type_name() == "Winograd"]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about the operation is forgotten, before and after."""
    winograd._library.cache_clear()
    yield
    winograd._library.cache_clear()


def convolution(pixels: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> openvino.Model:
    """A model of one convolution, its bias as ONNX brings it."""
    parameter = op.parameter(list(pixels.shape), np.float32)
    padding = [weight.shape[-1] // 2] * 2
    result = op.convolution(parameter, op.constant(weight.numpy()), [stride] * 2, padding, padding, [1, 1])
    if bias is not None:
        shaped = op.reshape(op.constant(bias.numpy()), np.array([1, len(bias), 1, 1]), special_zero=False)
        result = op.add(result, shaped)
    return openvino.Model([result], [parameter])


def run(model: openvino.Model, pixels: Tensor, num_threads: int = 2) -> Tensor:
    core = openvino.Core()
    winograd.extend(core)
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": num_threads}
    return torch.from_numpy(core.compile_model(model, "CPU", properties)([pixels.numpy()])[0].copy())


def whole(channels: int, of: int) -> int:
    """So many channels, or as many more as whole vectors or panels have."""
    return -(-channels // of) * of


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    assert winograd.use_winograd(model) == 1
    assert tiles(model) == [tile]
    assert {"Convolution", "Add"}.isdisjoint(node.get_type_name() for node in model.get_ops())
    expected = functional.conv2d(pixels.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert relative_error(run(model, pixels), expected) < EXACT


def test_a_frame_depends_neither_on_its_neighbours_nor_on_threads(tile: int, lanes: int) -> None:
    pixels, weight = draw(9, 16, 21, 18), draw(32, 16, 3, 3, seed=1)
    together, alone = convolution(pixels, weight), convolution(pixels[4:5], weight)
    assert winograd.use_winograd(together) == winograd.use_winograd(alone) == 1
    frames = run(together, pixels)
    assert torch.equal(frames[4:5], run(alone, pixels[4:5]))
    assert torch.equal(frames, run(together, pixels, num_threads=1))


@pytest.mark.parametrize(("weight", "size", "stride"), [
    ((32, 32, 1, 1), (16, 16), 1),
    ((32, 32, 3, 3), (16, 16), 2),
    ((32, 4, 3, 3), (16, 16), 1),  # the first convolution of a network
    ((4, 32, 3, 3), (16, 16), 1),  # the last
    ((32, 32, 3, 3), (8, 12), 1),  # too few tiles
])  # fmt: skip
def test_what_does_not_fit_or_gain_stays(
    weight: tuple[int, ...], size: tuple[int, int], stride: int, lanes: int
) -> None:
    model = convolution(draw(1, weight[1], *size), draw(*weight, seed=1), draw(weight[0]), stride)
    assert winograd.use_winograd(model) == 0
    assert "Convolution" in {node.get_type_name() for node in model.get_ops()}


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
    monkeypatch.setattr(winograd, "MOST_BYTES", 4 * 36 * lanes * 2 * lanes - has_large_weights)
    model = convolution(draw(frames, lanes, *size), draw(2 * lanes, lanes, 3, 3))
    assert winograd.use_winograd(model) == len(expected)
    assert tiles(model) == expected


def test_an_addition_of_pictures_is_no_bias(lanes: int) -> None:
    """Nor is one of a number for each frame and channel, such as a timestep's; they stay beside the convolution."""
    pixels, weight, added = draw(2, 32, 16, 16), draw(32, 32, 3, 3, seed=1), draw(2, 32, 1, 1, seed=2)
    parameter = op.parameter(list(pixels.shape), np.float32)
    result = op.convolution(parameter, op.constant(weight.numpy()), [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([op.add(op.add(result, op.constant(added.numpy())), parameter)], [parameter])
    assert winograd.use_winograd(model) == 1
    expected = functional.conv2d(pixels.double(), weight.double(), padding=1) + added + pixels
    assert relative_error(run(model, pixels), expected) < EXACT


def norm_silu_convolution(pixels: Tensor, groups: int, norm: tuple[Tensor, Tensor], weight: Tensor) -> openvino.Model:
    """A model of convolution ∘ SiLU ∘ GroupNorm, spelled as ONNX brings it."""
    parameter = op.parameter(list(pixels.shape), np.float32)
    grouped = op.reshape(parameter, np.array([pixels.shape[0], groups, -1]), special_zero=False)
    normed = op.mvn(grouped, np.array([2]), True, 1e-5, "INSIDE_SQRT")
    normed = op.reshape(normed, np.array(pixels.shape), special_zero=False)
    factor, added = (op.unsqueeze(op.constant(values.numpy()), np.array([1, 2])) for values in norm)
    normed = op.add(op.multiply(normed, factor), added)
    active = op.multiply(normed, op.sigmoid(normed))
    result = op.convolution(active, op.constant(weight.numpy()), [1, 1], [1, 1], [1, 1], [1, 1])
    return openvino.Model([result], [parameter])


@pytest.mark.parametrize("size", [(16, 16), (9, 21)])
@pytest.mark.parametrize(("channels", "groups"), [(16, 16), (32, 8), (96, 4)])
@pytest.mark.parametrize("offset", [0.0, 100.0])  # what is far from zero loses digits in a variance of one pass
def test_norm_and_silu_before_it_are_its_own(
    size: tuple[int, int], channels: int, groups: int, offset: float, tile: int, lanes: int
) -> None:
    pixels, weight = draw(3, channels, *size) + offset, draw(32, channels, 3, 3, seed=1)
    norm = draw(channels, seed=2), draw(channels, seed=3)
    model = norm_silu_convolution(pixels, groups, norm, weight)
    assert winograd.use_winograd(model) == 1
    assert {node.get_type_name() for node in model.get_ops()} == {"Parameter", "Constant", "Winograd", "Result"}
    normed = functional.group_norm(pixels.double(), groups, *(values.double() for values in norm), eps=1e-5)
    expected = functional.conv2d(functional.silu(normed), weight.double(), padding=1)
    assert relative_error(run(model, pixels), expected) < EXACT * (1 + offset / 10)


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 32)])
def test_a_folded_doubling_is_unfolded(size: tuple[int, int], tile: int, lanes: int) -> None:
    torch.manual_seed(0)
    convolved, pixels = nn.Conv2d(48, 32, 3, padding=1), draw(3, 48, *size)
    with torch.no_grad():
        model = doubling(pixels, *fold_doubled(convolved).state_dict().values())
    assert winograd.use_winograd(model) == 1
    assert {node.get_type_name() for node in model.get_ops()} == {"Parameter", "Constant", "Winograd", "Result"}
    with torch.no_grad():
        expected = convolved.double()(functional.interpolate(pixels.double(), scale_factor=2))
    assert relative_error(run(model, pixels), expected) < EXACT


def test_another_transposed_convolution_stays(lanes: int) -> None:
    pixels = draw(3, 48, 8, 8)
    assert winograd.use_winograd(doubling(pixels, draw(48, 32, 4, 4), draw(32))) == 0


def doubling(pixels: Tensor, weight: Tensor, bias: Tensor) -> openvino.Model:
    """A model of a transposed convolution, its bias as ONNX brings it."""
    parameter = op.parameter(list(pixels.shape), np.float32)
    result = op.convolution_backprop_data(parameter, op.constant(weight.numpy()), [2, 2], None, [1, 1], [1, 1])
    shaped = op.reshape(op.constant(bias.numpy()), np.array([1, len(bias), 1, 1]), special_zero=False)
    return openvino.Model([op.add(result, shaped)], [parameter])


def test_silu_holds_at_its_ends(lanes: int) -> None:
    """Where exp would overflow or vanish: SiLU(x) is x, or 0."""
    pixels, weight = draw(1, 16, 16, 16), draw(32, 16, 3, 3, seed=1)
    norm = torch.full((16,), 200.0), torch.zeros(16)
    model = norm_silu_convolution(pixels, 16, norm, weight)
    assert winograd.use_winograd(model) == 1
    normed = functional.group_norm(pixels.double(), 16, *(values.double() for values in norm), eps=1e-5)
    assert float(normed.abs().max()) > 400
    expected = functional.conv2d(functional.silu(normed), weight.double(), padding=1)
    assert relative_error(run(model, pixels), expected) < EXACT


def test_another_activation_before_it_stays(lanes: int) -> None:
    """SiLU without a norm, and x · sigmoid of something else."""
    pixels, weight = draw(1, 16, 16, 16), draw(32, 16, 3, 3, seed=1)
    for gate in (lambda value: value, op.abs):
        parameter = op.parameter(list(pixels.shape), np.float32)
        active = op.multiply(parameter, op.sigmoid(gate(parameter)))
        result = op.convolution(active, op.constant(weight.numpy()), [1, 1], [1, 1], [1, 1], [1, 1])
        model = openvino.Model([result], [parameter])
        assert winograd.use_winograd(model) == 1
        assert "Sigmoid" in {node.get_type_name() for node in model.get_ops()}
        gated = pixels * torch.sigmoid(pixels if gate is not op.abs else pixels.abs())
        assert relative_error(run(model, pixels), functional.conv2d(gated.double(), weight.double(), padding=1)) < EXACT


def test_an_engine_finds_it_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    pixels, weight = draw(2, 16, 24, 20), draw(32, 16, 3, 3, seed=1)
    model = convolution(pixels, weight, draw(32, seed=2))
    model.input().set_names({"latents"})
    model.output().set_names({"pixels"})
    openvino.save_model(model, tmp_path / "network.xml", compress_to_fp16=False)
    dims = [("frames", channels, "height", "width") for channels in (16, 32)]
    spec = NetworkSpec("unet", (TensorSpec("latents", dims[0]),), (TensorSpec("pixels", dims[1]),))
    compiled = tmp_path / "compiled"

    def run_anew() -> Tensor:
        properties = {"INFERENCE_PRECISION_HINT": "f32"}
        engine = OpenVinoEngine(spec, openvino.Core(), tmp_path / "network.xml", properties, BlobCache(compiled), "0")
        return engine(latents=pixels)["pixels"].clone()

    expected = functional.conv2d(pixels.double(), weight.double(), draw(32, seed=2).double(), padding=1)
    first = run_anew()
    assert relative_error(first, expected) < EXACT
    assert len(list(compiled.iterdir())) == 1
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run_anew(), first)  # read back
    assert not caplog.records
    assert len(list(compiled.iterdir())) == 1

    with monkeypatch.context() as patch:  # of a large network, which would hold its weights, nothing is kept
        patch.setattr("posecrafter_rt.engines.openvino.LARGE_BYTES", 0)
        shutil.rmtree(compiled)
        assert torch.equal(run_anew(), first)
        assert not compiled.exists()

    assert torch.equal(run_anew(), first)
    monkeypatch.setattr(winograd, "cpu_features", set)
    plain = run_anew()
    assert not torch.equal(plain, first)
    assert relative_error(plain, expected) < EXACT
    assert len(list(compiled.iterdir())) == 2  # of its own: not confused with the other


@pytest.mark.parametrize(("compiler", "reason"), [
    ("false", "false refuses it: exit status 1"),
    ("no-such-compiler", "no-such-compiler cannot be run"),
])  # fmt: skip
@pytest.mark.skipif(winograd._vectors() is None, reason="this processor is not asked for a compiler")
def test_without_a_compiler_convolutions_are_openvinos(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert reason in str(winograd.missing_reason())
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    pixels, weight = draw(1, 32, 16, 16), draw(32, 32, 3, 3)
    model = convolution(pixels, weight)
    assert winograd.use_winograd(model) == 0
    assert relative_error(run(model, pixels), functional.conv2d(pixels, weight, padding=1)) < EXACT


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_compiles_it_as_well(
    lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    """clang reads attributes of types otherwise."""
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "clang++")
    assert winograd.missing_reason() is None  # it was tried


def test_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "cpu_features", lambda: {"avx2"})
    assert "AVX2 and FMA, or AVX-512" in str(winograd.missing_reason())


@pytest.mark.parametrize(("features", "lanes"), [
    ({"avx2", "fma"}, 8),
    ({"avx2", "fma", "avx512f", "avx512bw"}, 16),
])  # fmt: skip
def test_the_widest_vectors_are_taken(features: set[str], lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "cpu_features", lambda: features)
    vectors = winograd._vectors()
    assert vectors is not None
    assert vectors.lanes == lanes


@pytest.mark.parametrize(("right", "wrong"), [
    ("1. / 24, 1. / 12", "1. / 24, 1. / 11"),  # the convolution
    ("1. / 2, -1. / 2", "1. / 2, -1. / 3"),  # the same in tiles of 2×2
    ("5.0000001201e-1f", "6e-1f"),  # SiLU
    ("y / times", "y / 2"),  # the doubling, or what is not doubled
])  # fmt: skip
def test_what_compiles_but_is_wrong_is_not_kept(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: None, forgotten: None
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for file in winograd.SOURCES.iterdir():
        text = file.read_text(encoding="utf-8")
        (sources / file.name).write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(winograd, "SOURCES", sources)
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "cache"))
    assert "does not give" in str(winograd.missing_reason())
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_what_cannot_be_loaded_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: None, forgotten: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "env LC_ALL=C g++")  # a compiler may have arguments
    assert winograd.missing_reason() is None
    (library,) = tmp_path.rglob("*.so")
    whole = library.read_bytes()
    no_library = b"no library"
    for damaged, name in ((whole[: len(whole) // 2], library.name),
                          (no_library, f"{library.stem[:64]}-{sha256(no_library).hexdigest()}.so")):  # fmt: skip
        for file in library.parent.iterdir():
            file.unlink()  # it is mapped: what was written over it would change under us
        library.with_name(name).write_bytes(damaged)
        caplog.clear()
        winograd._library.cache_clear()
        assert winograd.missing_reason() is None
        assert "is compiled again" in caplog.text
        assert any(file.read_bytes() == whole for file in library.parent.iterdir())


def test_two_threads_at_once(lanes: int) -> None:
    """Two requests of one compiled network share the operation, and its transformed weights."""
    pixels, weight = draw(4, 32, 33, 35), draw(32, 32, 3, 3, seed=1)
    model = norm_silu_convolution(pixels, 8, (draw(32, seed=2), draw(32, seed=3)), weight)
    assert winograd.use_winograd(model) == 1
    core = openvino.Core()
    winograd.extend(core)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 2})
    given = [draw(4, 32, 33, 35, seed=seed) for seed in range(8)]
    alone = [run(model, each) for each in given]

    def infer(each: Tensor) -> Tensor:
        return torch.from_numpy(compiled.create_infer_request().infer([each.numpy()])[0].copy())

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(infer, given), alone, strict=True):
                assert torch.equal(found, expected)
