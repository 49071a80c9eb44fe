"""The OpenVINO operations as a library: compiled, tried, kept, and what runs where they cannot be had."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor
from torch.nn import functional

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.engines import openvino_trials
from posecrafter_rt.engines.base import CACHE_HINT
from posecrafter_rt.engines.openvino import NetworkFile, OpenVinoBackend, OpenVinoEngine
from posecrafter_rt.engines.openvino_convolutions import use_convolutions
from posecrafter_rt.engines.openvino_linear import use_linear
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.machine import cpu_features
from posecrafter_rt.spec import NetworkSpec, TensorSpec
from posecrafter_rt.tensor_file import MappedTensors, save_tensors
from tests.engines.openvino_models import constant, draw, kinds, parameter, run

EXACT = 3e-5  # of the largest output: see test_openvino_convolutions.py
PLAIN_FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in operations.FLAGS)  # compiled in half the time
PIXELS, WEIGHTS = (2, 16, 24, 20), (draw(32, 16, 3, 3, seed=1), draw(32, 32, 1, 1, seed=2))


def network() -> openvino.Model:
    """A convolution of 3×3, then one of 1×1."""
    given = parameter(draw(*PIXELS))
    given.output(0).set_names({"latents"})
    result = op.convolution(given, constant(WEIGHTS[0]), [1, 1], [1, 1], [1, 1], [1, 1])
    result = op.convolution(result, constant(WEIGHTS[1]), [1, 1], [0, 0], [0, 0], [1, 1])
    result.output(0).set_names({"pixels"})
    return openvino.Model([result], [given])


def reference(pixels: Tensor) -> Tensor:
    first, second = (weight.double() for weight in WEIGHTS)
    return functional.conv2d(functional.conv2d(pixels.double(), first, padding=1), second)


def test_an_engine_finds_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    openvino.save_model(network(), tmp_path / "network.xml", compress_to_fp16=False)
    dims = [("frames", channels, "height", "width") for channels in (16, 32)]
    spec = NetworkSpec("unet", (TensorSpec("latents", dims[0]),), (TensorSpec("pixels", dims[1]),))
    kept, pixels, used = tmp_path / "compiled", draw(*PIXELS), {"FusedConvolution": 1, "Linear": 1, "Convolution": 0}

    def engine() -> OpenVinoEngine:
        file, properties = NetworkFile(tmp_path / "network.xml", ["0"], 1), {"INFERENCE_PRECISION_HINT": "f32"}
        save_tensors({}, tmp_path / "tuned")
        tuned = MappedTensors(tmp_path / "tuned")
        return OpenVinoEngine(spec, openvino.Core(), file, tuned, properties, BlobCache(kept), "fp32")

    def run_anew() -> Tensor:
        return engine()(latents=pixels)["pixels"].clone()

    found = kinds(engine()._read(spec, (PIXELS,)))
    assert {kind: found[kind] for kind in used} == used
    first = run_anew()
    assert relative_error(first, reference(pixels)) < EXACT
    assert len(list(kept.iterdir())) == 1
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run_anew(), first)  # read back
    assert not caplog.records
    assert len(list(kept.iterdir())) == 1

    with monkeypatch.context() as patch:  # of a large network, which would hold its weights, nothing is kept
        patch.setattr("posecrafter_rt.engines.openvino.LARGE_BYTES", 0)
        shutil.rmtree(kept)
        assert torch.equal(run_anew(), first)
        assert not kept.exists()

    assert torch.equal(run_anew(), first)
    monkeypatch.setattr(operations, "cpu_features", set)
    plain = run_anew()
    assert not torch.equal(plain, first)
    assert relative_error(plain, reference(pixels)) < EXACT
    assert len(list(kept.iterdir())) == 2  # of its own: not confused with the other


def test_operations_that_hold_their_weights_give_the_same_and_keep_nothing_they_were_made_of(lanes: int) -> None:
    available = operations.operations()
    assert available is not None
    given = op.parameter([2, lanes, 9, 13], np.float32)
    trials = [
        *openvino_trials.convolutions(available.factory, given),
        *openvino_trials.linear_maps(available.factory, given),
    ]
    trials = [trial for trial in trials if trial.suits(available.vectors)]
    keys_and_values = [
        op.abs(available.factory.create("Linear", [given.output(0), *layer], {})) for layer in layers(lanes)
    ]
    model = openvino.Model([*(trial.ours() for trial in trials), *keys_and_values], [given])
    pixels, releases = draw(2, lanes, 9, 13), list[int]()
    first = run(model, pixels)
    assert not torch.equal(first[-1], first[-2])

    operations.hold_weights(model, lambda: releases.append(1))
    held = [node for node in model.get_ordered_ops() if node.get_type_name() in operations.WITH_WEIGHTS]
    assert len(held) == len(releases) == len(first)
    weights = [value for node in held for value in held_by(node)]
    assert {tuple(weight.get_shape()) for weight in weights} == {(1,)}
    again = run(model.clone(), pixels)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def held_by(node: Any) -> list[Any]:
    """Which of a node's inputs were weights: a map's come after a norm's numbers, and there may be two."""
    if node.get_type_name() != "Linear":
        return [node.input_value(1)]
    first = 3 if node.get_attributes()["eps"] else 1
    return [node.input_value(index) for index in (first, first + 2)[: 2 if node.get_input_size() >= first + 4 else 1]]


def layers(lanes: int) -> list[list[Any]]:
    """Weight and bias of two layers alike but for their numbers, as keys' and values' are.

    OpenVINO takes equal nodes for one, unless they are outputs themselves.
    """
    return [[constant(draw(2 * lanes, lanes, seed=seed)).output(0), constant(torch.zeros(2 * lanes)).output(0)]
            for seed in (3, 4)]  # fmt: skip


@pytest.mark.parametrize(("compiler", "reason"), [
    ("false", "false refuses them: exit status 1"),
    ("no-such-compiler", "no-such-compiler cannot be run"),
    ('g++ "', 'the command in CXX, g++ ", cannot be run: No closing quotation'),
])  # fmt: skip
@pytest.mark.skipif(not operations._fitting(), reason="this processor is not asked for a compiler")
def test_without_a_compiler_all_is_openvinos(
    compiler: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO):
        assert reason in str(operations.missing_reason())
        assert operations.operations() is None and operations.extend(openvino.Core()) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]  # once
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    model, pixels = network(), draw(*PIXELS)
    assert use_convolutions(model) == use_linear(model) == 0
    assert relative_error(run(model, pixels)[0], reference(pixels)) < EXACT


@pytest.mark.skipif(not operations._fitting() or shutil.which("g++") is None, reason="they cannot be compiled here")
def test_where_the_cache_cannot_be_searched_all_is_openvinos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The system refuses a name of this length to root, too, to whom it permits any folder."""
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / ("x" * 300)))
    assert str(operations.missing_reason()).startswith("they cannot be kept: ")
    for reason in (operations.missing_halves_reason(), operations.missing_bytes_reason()):
        assert reason is not None
    assert str(operations.missing_halves_reason()).endswith(f"; {CACHE_HINT}")
    (record,) = caplog.records  # once: an engine in float32 runs without a word of it else
    assert record.levelname == "WARNING" and CACHE_HINT in record.getMessage()
    assert OpenVinoBackend().unsupported_reason("fp32") is None
    assert operations.operations() is None and operations.extend(openvino.Core()) is None


def test_without_a_place_for_a_cache_all_is_openvinos(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    def homeless() -> Path:
        raise PoseCrafterError("this user has no home folder", "set POSECRAFTER_CACHE")

    monkeypatch.setattr("posecrafter_rt.config.cache_dir", homeless)
    monkeypatch.setattr(operations, "_fitting", lambda: operations.VECTORS[:1])
    assert operations.missing_reason() == f"they cannot be kept: this user has no home folder; {CACHE_HINT}"
    assert operations.operations() is None


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that are loaded, of which none is compiled: each is five bytes."""
    loaded: list[Path] = []
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(operations, "_ask", lambda vectors: None)
    monkeypatch.setattr(operations, "_try", lambda library, vectors: None)
    monkeypatch.setattr(operations, "_compile", lambda sources, vectors, home, library: library.write_bytes(b"built"))
    monkeypatch.setattr(operations, "_factory", loaded.append)
    return loaded


@pytest.mark.parametrize(
    "whose", ["any user's file", "any user's folder", "another user's file", "another user's folder"]
)
def test_what_other_users_may_have_written_is_not_loaded(
    whose: str, tmp_path: Path, loaded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    own = operations._compiled(operations.VECTORS[0])
    assert operations._compiled(operations.VECTORS[0]) == own and loaded == [own]
    folder = own.parent.rename(tmp_path / "openvino_operations-of-another-system")
    assert operations._compiled(operations.VECTORS[0]) == folder / own.name == loaded.pop()
    place = folder / own.name if whose.endswith("file") else folder
    if whose.startswith("any"):
        place.chmod(0o777)
    elif os.getuid():
        pytest.skip("only root can give a file to another user")
    else:
        os.chown(place, 12345, -1)
    loaded.clear()
    assert operations._compiled(operations.VECTORS[0]) == own and loaded == []  # compiled again
    told = f"{folder / own.name} is compiled again if possible: other users may write"
    assert (told in caplog.text) == whose.startswith("any")  # another user's is for that user
    shutil.rmtree(own.parent)
    own.parent.symlink_to(folder)
    caplog.clear()
    with pytest.raises(
        operations.OperationsError, match=f"they cannot be kept: other users may write to {own.parent};"
    ):
        operations._compiled(operations.VECTORS[0])
    assert loaded == []


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o2770])
def test_a_folder_of_this_users_that_was_opened_to_others_is_closed_to_them(
    mode: int, loaded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """As volumes are when they are mounted for a group."""
    own = operations._compiled(operations.VECTORS[0])
    own.parent.chmod(mode)
    assert operations._compiled(operations.VECTORS[0]) == own and loaded == []
    assert not own.parent.stat().st_mode & 0o022
    assert operations._compiled(operations.VECTORS[0]) == own and loaded == [own]


def test_they_are_found_again_whatever_permissions_files_usually_get(loaded: list[Path]) -> None:
    before = os.umask(0)
    try:
        library = operations._compiled(operations.VECTORS[0])
    finally:
        os.umask(before)
    assert not (library.stat().st_mode | library.parent.stat().st_mode) & 0o022
    assert operations._compiled(operations.VECTORS[0]) == library and loaded == [library]


def test_they_are_kept_where_a_file_in_use_keeps_its_name(monkeypatch: pytest.MonkeyPatch, loaded: list[Path]) -> None:
    """On NFS a folder with what was loaded from it cannot be removed."""

    def refuse(path: str, **place: Any) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        library = operations._compiled(operations.VECTORS[0])
    assert library.read_bytes() == b"built"


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_compiles_them_as_well(
    lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    """clang reads attributes of types otherwise."""
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "clang++")
    assert operations.missing_reason() is None  # they were tried


@pytest.mark.skipif(not operations._fitting() or shutil.which("g++") is None, reason="they cannot be compiled here")
def test_they_compile_here() -> None:
    """Else the tests of them would be skipped, and all would look right."""
    assert "refuses them" not in str(operations.missing_reason())


@pytest.mark.parametrize("vectors", operations.VECTORS, ids=lambda vectors: " ".join(sorted(vectors.needed)))
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_they_compile_for_every_processor(vectors: operations.Vectors) -> None:
    """Those that this one is not, too. For vectors that it has, they are compiled and tried as other tests use them."""
    if vectors.needed <= cpu_features():
        assert operations._built((vectors,)).reason is None
        return
    headers = Path(openvino.__file__).with_name("include")
    command: list[Any] = ["g++", *operations.FLAGS, *vectors.flags, "-fsyntax-only", "-I", headers]
    result = subprocess.run([*command, *operations.SOURCES.glob("*.cpp")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "cpu_features", lambda: {"avx2", "fma"})
    assert "AVX2, FMA and F16C, or AVX-512" in str(operations.missing_reason())


AVX512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(("features", "lanes", "has_vnni", "has_tiles"), [
    ({"avx2", "fma", "f16c"}, 8, False, False),
    ({"avx2", "fma", "f16c", "avx_vnni"}, 8, True, False),
    ({"avx2", "fma", "f16c", "avx512_vnni"}, 8, False, False),  # without the registers, as a virtual machine may tell it
    (AVX512, 16, False, False),
    (AVX512 | {"avx512_vnni", "avx_vnni"}, 16, True, False),
    (AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"}, 16, True, False),
    (AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"}, 16, True, True),
])  # fmt: skip
def test_the_widest_vectors_are_taken_with_what_the_processor_has(
    features: set[str], lanes: int, has_vnni: bool, has_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "cpu_features", lambda: features)
    vectors = operations._fitting()[0]
    assert (vectors.lanes, vectors.has_vnni, vectors.has_tiles) == (lanes, has_vnni, has_tiles)
    # What this processor lacks would end the process.
    monkeypatch.setattr(operations, "_built", lambda fitting: operations.Built(fitting[0], Path()))
    assert operations.missing_bytes_reason() == (None if has_vnni else "this processor has no VNNI; use fp32")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_compiler_that_does_not_know_the_widest_is_asked_for_others(
    operation: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None, caplog: pytest.LogCaptureFixture
) -> None:
    """As g++ 10 knows neither AMX nor AVX-VNNI, which processors have had since 2021."""
    narrow, unknown = operations._fitting()[-1], ("-mno-such-instructions",)
    widest = [operations._fitting()[0]._replace(flags=unknown, has_vnni=has_vnni) for has_vnni in (False, True)]
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(operations, "FLAGS", PLAIN_FLAGS)
    for vectors, reason in zip(widest, ("this processor has no VNNI", "needs a compiler that knows VNNI"), strict=True):
        monkeypatch.setattr(operations, "VECTORS", (vectors, narrow._replace(has_vnni=False)))
        with caplog.at_level(logging.INFO):
            available = operations.operations()
        assert available is not None and available.vectors.flags == narrow.flags
        assert reason in str(operations.missing_bytes_reason()) and operations.missing_halves_reason() is None
        assert "no-such-instructions" in str(operations.left_out())
    assert caplog.records == []
    monkeypatch.setattr(operations, "VECTORS", tuple(widest))
    with caplog.at_level(logging.INFO):
        assert "refuses them" in str(operations.missing_reason())
    assert "no-such-instructions" in caplog.text


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every source as it is, compiled once, by its name."""
    available = operations.operations()
    if available is None or shutil.which("g++") is None:
        pytest.skip("the operations cannot be compiled by g++ here")
    vectors = available.vectors
    folder, headers = tmp_path_factory.mktemp("objects"), Path(openvino.__file__).with_name("include")
    made = {source.name: folder / f"{source.stem}.o" for source in operations.SOURCES.glob("*.cpp")}
    flags = [flag for flag in (*PLAIN_FLAGS, *vectors.flags) if flag != "-shared"]
    for name, path in made.items():
        command: list[Any] = ["g++", *flags, "-I", headers, "-c", operations.SOURCES / name, "-o", path]
        subprocess.run(command, check=True)
    return made


def compile_only(
    compiled: str, sources: Path, objects: dict[str, Path], monkeypatch: pytest.MonkeyPatch, compiler: str = "g++"
) -> None:
    """Compile the operations from a folder that has one source and all headers; the others are linked as they are."""
    others = [str(path) for name, path in objects.items() if name != compiled]
    monkeypatch.setattr(operations, "SOURCES", sources)
    monkeypatch.setattr(operations, "FLAGS", PLAIN_FLAGS)
    monkeypatch.setattr(operations, "_ask", lambda vectors: None)  # the compiler has just compiled the others
    monkeypatch.setenv("CXX", " ".join([compiler, *others]))


WRONG_IN_BYTES = [
    ("bytes.cpp", "row[i * taps + tap]", "row[i + tap * in]"),  # the order of weights
    ("bytes.cpp", "static_cast<float>(sum) * scale.step", "static_cast<float>(sum)"),  # what zero counts
    ("pictures.cpp", "(3 - tap / 2 * 2 - odd_row) * 4", "(2 - tap / 2 * 2 + odd_row) * 4"),  # its weights
    ("pictures.cpp", "if (p.groups == 0) mean = 0, deviation = 1;", ""),  # SiLU alone
    ("pictures.cpp", "count, static_cast<Number>(zeros_[frame])", "count, 0"),  # the border
    ("pictures.cpp", "p.weight[first + c]", "p.weight[c]"),  # the norm
    ("convolution.cpp", "nullptr : call.residual + at", "nullptr : nullptr"),  # what is added
    ("linear.cpp", "count, first_.out_channels)", "count, first_.in_channels)"),  # what is between two layers
    ("attention.cpp", "total(__builtin_convertvector(sum, Vector)) * scales[0]", "0"),  # what zero counts
    ("attention.cpp", "<< 16", "<< 15"),  # values
]


WRONG_IN_VECTORS = [
    ("pictures.cpp", "y / 2 - 1 + y % 2", "y / 2 - 1"),  # the rows that one of a doubled picture is of
]
WRONG_IN_LINEAR_HALVES = ("linear.cpp", "cvtps_ph(v,", "cvtps_ph(v * 1.01f,")  # weights in 16 bits
WRONG_IN_TILES = [
    ("pictures.cpp", "at / 2 - 1 + at % 2", "at / 2 - 1"),  # the same
    ("pictures.cpp", "(own_rows - 1) * pitch + width_", "(own_rows - 1) * pitch"),  # how many windows there are
    ("digits.cpp", "(whole + kDigit / 2) >> 8", "whole >> 8"),  # the high digits of weights
    ("digits.cpp", "to[kWhole * kLanes]", "to[1]"),  # where low ones are
    ("digits.cpp", "static_cast<float>(sum) * scale.step", "static_cast<float>(sum)"),  # what zero counts
    ("linear.cpp", "own.first + row", "own.first"),  # where a block's windows begin
    ("attention.cpp", "x - float_of(high)", "x"),  # the second ones of pairs
    ("attention.cpp", "row % kPanel / kLanes * kTileFloats", "0"),  # where half of the keys are
    ("attention.cpp", "packed + row / kPairStep * kPairTiles", "packed"),  # where values are
]
WRONG_IN_WORDS = [
    ("words.cpp", "(k / kTwo * kPanel + column) * kTwo + k % kTwo", "k * kPanel + column"),  # the order of weights
    ("words.cpp", "lows[r] += scales[r] * kMostNumber", "lows[r] += scales[r]"),  # what zero stands for
    ("pictures.cpp", "+ static_cast<float>(least)", ""),  # the same in a picture
    ("pictures.cpp", "own.scale, own.low, to", "own.scale, own.scale, to"),  # the same of its windows
    ("pictures.cpp", "own.first + i * own.stride", "own.first + i"),  # where they are
]


@pytest.mark.parametrize(("compiled", "right", "wrong"), [
    ("winograd.cpp", "1. / 24, 1. / 12", "1. / 24, 1. / 11"),  # the convolution
    ("winograd.cpp", "1. / 2, -1. / 2", "1. / 2, -1. / 3"),  # the same in tiles of 2×2
    ("winograd.cpp", "2.402264791e-1f", "2.5e-1f"),  # SiLU
    ("winograd.cpp", "y / times", "y / 2"),  # the doubling, or what is not doubled
    ("winograd.cpp", "residual + at + x", "residual + x"),  # what is added
    ("linear.cpp", "load(last_.bias + channel)", "load(last_.bias)"),
    ("linear.cpp", "+ of_gate)", "+ of_value)"),  # the gate's bias
    ("linear.cpp", "0.254829592f", "0.26f"),  # GELU
    ("linear.cpp", "call_.residual + at;", "call_.residual;"),  # what is added to pixels
    ("linear.cpp", "call_.residual + at)", "call_.residual)"),  # the same of tokens
    ("linear.cpp", "to + panel * kPanel, stride", "to, stride"),  # what is between two layers
    ("linear.cpp", "(x - mean) * (x - mean)", "x * x"),  # the norm of tokens
    ("linear.cpp", "v[i] * scale + shift : v[i]", "v[i] : v[i]"),  # that of pixels
    ("linear.cpp", "part.out + channel", "part.out"),  # where a part of the output goes
    ("linear.cpp", "(first + done) % size", "(first + done) % (size - 1)"),  # where a chunk begins
    WRONG_IN_LINEAR_HALVES,
    ("winograd.cpp", "cvtps_ph(v,", "cvtps_ph(v * 1.01f,"),
    ("attention.cpp", "std::sqrt(static_cast<float>(call.width))", "1"),  # the scale
    ("attention.cpp", "-INFINITY", "0"),  # what is beyond the keys
    ("attention.cpp", "mask[key] == 0", "mask[key] != 0"),
    ("attention.cpp", "head_of(own, call_, 1, index)", "head_of(tokens, call_, 1, index)"),  # the frame's own key
    ("attention.cpp", "tokens.stride * call.places", "tokens.stride"),  # the same token in other frames
    ("attention.cpp", "static_cast<size_t>(head) * call.width", "0"),
    *WRONG_IN_BYTES,
    *WRONG_IN_VECTORS,
    *WRONG_IN_TILES,
    *WRONG_IN_WORDS,
])  # fmt: skip
def test_what_compiles_but_is_wrong_is_not_kept(
    compiled: str,
    right: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objects: dict[str, Path],
    forgotten: None,
) -> None:
    """Only that source is compiled anew, with what it includes."""
    available = operations.operations()
    assert available is not None
    operations._built.cache_clear()
    vectors = available.vectors
    mistake = compiled, right, wrong
    if mistake in (*WRONG_IN_BYTES, *WRONG_IN_VECTORS, *WRONG_IN_WORDS) and not vectors.has_vnni:
        pytest.skip("this processor has no VNNI")
    if mistake in WRONG_IN_TILES and not vectors.has_tiles:
        pytest.skip("this processor has no AMX")
    if mistake in (*WRONG_IN_VECTORS, *WRONG_IN_WORDS) and vectors.has_tiles:
        pytest.skip("tiles do it here")
    if mistake == WRONG_IN_LINEAR_HALVES and vectors.has_vnni:
        pytest.skip("products of whole numbers do it here")
    sources, num_found = tmp_path / "sources", 0
    sources.mkdir()
    for file in (*operations.SOURCES.glob("*.h"), operations.SOURCES / compiled):
        text = file.read_text(encoding="utf-8")
        num_found += text.count(right)
        (sources / file.name).write_text(text.replace(right, wrong), encoding="utf-8")
    assert num_found > 0
    compile_only(compiled, sources, objects, monkeypatch)
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "cache"))
    assert "do not give" in str(operations.missing_reason())
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_what_cannot_be_loaded_is_compiled_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objects: dict[str, Path],
    forgotten: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for file in (*operations.SOURCES.glob("*.h"), operations.SOURCES / "memory.cpp"):
        shutil.copy(file, sources)
    compile_only("memory.cpp", sources, objects, monkeypatch, "env LC_ALL=C g++")  # a compiler may have arguments
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "cache"))
    operations._built.cache_clear()
    assert operations.missing_reason() is None
    (library,) = tmp_path.rglob("*.so")
    whole = library.read_bytes()
    no_library = b"no library"
    for damaged, name in ((whole[: len(whole) // 2], library.name),
                          (no_library, f"{library.stem[:64]}-{sha256(no_library).hexdigest()}.so")):  # fmt: skip
        for file in library.parent.iterdir():
            file.unlink()  # it is mapped: what was written over it would change under us
        library.with_name(name).write_bytes(damaged)
        caplog.clear()
        operations._built.cache_clear()
        assert operations.missing_reason() is None
        assert "is compiled again" in caplog.text
        assert any(file.read_bytes() == whole for file in library.parent.iterdir())
    for number in range(8):  # which of all comes first is the system's choice
        file = library.with_name(f"{library.stem[:64]}-{number:064}.so")
        file.write_bytes(no_library)
    caplog.clear()
    operations._built.cache_clear()
    assert operations.missing_reason() is None and not caplog.records  # a sound one is beside them
