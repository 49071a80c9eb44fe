"""What only the AOTInductor backend has: code apart from weights, a compiler that may be missing, kept code.

One network stands for all but in the slow tests, here and in `test_parity` and `test_refit`, which compile every one.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posecrafter_rt.engines import inductor as backend_module
from posecrafter_rt.engines.base import FULL_PRECISION, Engine, Precision
from posecrafter_rt.engines.inductor import InductorBackend, read_weights, write_weights
from posecrafter_rt.engines.manifest import REBUILD
from posecrafter_rt.engines.own_settings import own_settings
from posecrafter_rt.engines.refit import write_graphs
from posecrafter_rt.errors import BackendUnavailable, CheckpointError, EngineFolderError
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.machine import cpu_features
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import Architecture, network_specs
from tests.tiny import link_the_rest

DECODER, WEIGHTS = "vae_decoder", "vae.safetensors"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")  # the decoder's code and weights are the same in both
OPTIONS = dict(backend_module.OPTIONS)  # as another process finds them
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and is taken")


def sized(model: PoseModel) -> Architecture:
    return replace(model.architecture(), size=(32, 32))


def build_decoder(model: PoseModel, folder: Path) -> None:
    arch = sized(model)
    network, spec = model.networks()[DECODER], network_specs(arch)[DECODER]
    write_weights(folder, InductorBackend().build_network(network, spec, arch, folder, "fp32")[1])


def load_decoder(model: PoseModel, folder: Path) -> Engine:
    spec = network_specs(sized(model))[DECODER]
    return InductorBackend().load_network(spec, folder, "fp32", read_weights(folder))


def draw(model: PoseModel, name: str, frames: int) -> dict[str, Tensor]:
    sizes = {"frames": frames, "groups": 1, "steps": frames, "window": 3}
    return random_inputs(network_specs(sized(model))[name], sizes, seed=frames)


def expected(model: PoseModel, name: str, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.networks()[name](*inputs.values())[0]


def decoding_error(engine: Engine, model: PoseModel, frames: int) -> float:
    inputs = draw(model, DECODER, frames)
    return relative_error(engine(**inputs)["pixels"].cpu(), expected(model, DECODER, inputs))


def refuse_to_compile(*arguments: object) -> bytes:
    raise AssertionError("compiled")


def test_one_code_serves_any_number_of_frames(plain_model: PoseModel, inductor_decoder: Path) -> None:
    """Between 63 and 64 diffusers would take another path."""
    engine = load_decoder(plain_model, inductor_decoder)
    assert all(decoding_error(engine, plain_model, frames) < 1e-4 for frames in (1, 16, 1, 7, 65))


@on_cpu
def test_code_that_was_compiled_in_one_thread_runs_in_as_many_as_there_are(
    plain_model: PoseModel, inductor_decoder: Path
) -> None:
    """Else the first build in a container of one core would make every later checkpoint slow."""
    with zipfile.ZipFile(inductor_decoder / f"{DECODER}.pt2") as package:
        code = "".join(package.read(name).decode() for name in package.namelist() if name.endswith(".cpp"))
    assert "#pragma omp parallel" in code and "num_threads(" not in code
    assert "collapse(" in code  # over more than the frames, which may be one
    engine, threads = load_decoder(plain_model, inductor_decoder), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert decoding_error(engine, plain_model, 3) < 1e-4
    finally:
        torch.set_num_threads(threads)


@on_cpu
def test_only_in_float32_throughout_are_a_gpus_convolutions_exact(
    plain_model: PoseModel, inductor_decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoencoder is in float32 in an engine in fp16, too, as `torch` engines have it."""
    spec, asked = network_specs(sized(plain_model))[DECODER], list[bool]()

    def noted(device: torch.device, is_exact: bool) -> AbstractContextManager[None]:
        asked.append(is_exact)
        return own_settings(device, is_exact)

    monkeypatch.setattr(backend_module, "own_settings", noted)
    for precision in PRECISIONS:
        engine = InductorBackend().load_network(spec, inductor_decoder, precision, read_weights(inductor_decoder))
        assert decoding_error(engine, plain_model, 1) < 1e-4
    assert asked == [True, False]


def test_what_is_compiled_already_is_not_counted(
    plain_model: PoseModel, inductor_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, backend = sized(plain_model), InductorBackend()
    assert backend.num_missing(plain_model, arch, "fp32") < len(plain_model.networks())  # the decoder's is there
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path))
    assert backend.num_missing(plain_model, arch, "fp32") == len(plain_model.networks())


def test_every_weight_stays_apart_from_the_code(plain_model: PoseModel, inductor_decoder: Path) -> None:
    """Small ones too, which AOTInductor would otherwise make constants of the code."""
    parameters = dict(plain_model.networks()[DECODER].named_parameters())
    wanted = {key for key in parameters if key.startswith(("vae.decoder.", "vae.post_quant_conv."))}
    assert len(wanted) > 10 and set(load_file(inductor_decoder / WEIGHTS)) == wanted


def test_swapped_weights_are_used_at_once(
    plain_model: PoseModel, make_tiny_model: Callable[..., PoseModel], inductor_decoder: Path
) -> None:
    """A convolution's, whose layout in memory is not that of a file, and a small one's."""
    engine, model = load_decoder(plain_model, inductor_decoder), make_tiny_model()
    assert decoding_error(engine, model, 3) < 1e-4
    tensors = {}
    for name in ("decoder.conv_out.bias", "decoder.mid_block.resnets.0.conv1.weight"):
        parameter = model.vae.get_parameter(name)
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        tensors[f"vae.{name}"] = parameter.detach()
    assert decoding_error(engine, model, 3) > 1e-2
    assert engine.swap_weights({**tensors, "unet.another": torch.zeros(1)}) == set(tensors)
    assert decoding_error(engine, model, 3) < 1e-4
    with pytest.raises(CheckpointError, match="shape"):  # which AOTInductor would take
        engine.swap_weights({"vae.decoder.conv_out.bias": torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"bias does not fit torch\.float32$"):
        engine.swap_weights({"vae.decoder.conv_out.bias": torch.full((3,), 1e39, dtype=torch.float64)})
    assert decoding_error(engine, model, 3) < 1e-4


def test_weights_beyond_the_type_that_they_are_kept_in_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, package = torch.nn.Linear(1, 1), tmp_path / "network.pt2"
    monkeypatch.setattr(backend_module, "_open", lambda package: network)
    monkeypatch.setattr(network, "get_constant_fqns", lambda: ["weight", "bias"], raising=False)
    network.weight.data.fill_(2.0)
    network.bias.data.fill_(1e5)
    with pytest.raises(EngineFolderError, match=r"^bias does not fit torch\.float16$") as caught:
        backend_module._weights_of(package, network, torch.float16)
    assert caught.value.hint == "build the engine with --precision bf16"
    assert backend_module._weights_of(package, network, torch.bfloat16)["weight"].item() == 2


@pytest.mark.parametrize("change", ["missing weight", "no weights", "no code"])
def test_code_never_runs_without_its_weights(
    plain_model: PoseModel, inductor_decoder: Path, tmp_path: Path, change: str
) -> None:
    """It would end the process."""
    folder = shutil.copytree(inductor_decoder, tmp_path / "networks")
    file = folder / WEIGHTS
    weights = load_file(file)
    if change == "missing weight":
        del weights["vae.decoder.conv_out.bias"]
        save_file(weights, file)
    else:
        (file if change == "no weights" else folder / f"{DECODER}.pt2").unlink()
    with pytest.raises(EngineFolderError, match=r"do not fit together|holds no vae_decoder") as caught:
        load_decoder(plain_model, folder)
    assert caught.value.hint == REBUILD  # there is no manifest that would say more


def test_code_is_kept_for_other_checkpoints(
    make_tiny_model: Callable[..., PoseModel], inductor_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InductorBackend, "_compile", refuse_to_compile)
    assert backend_module.OPTIONS == OPTIONS  # they are part of the name that code is kept under
    model = make_tiny_model()
    model.vae.decoder.conv_in.bias.data.add_(1)
    model.fold()
    build_decoder(model, tmp_path)
    assert (tmp_path / f"{DECODER}.pt2").read_bytes() == (inductor_decoder / f"{DECODER}.pt2").read_bytes()
    assert decoding_error(load_decoder(model, tmp_path), model, 2) < 1e-4


def test_another_version_of_the_onnx_exporter_changes_nothing(
    plain_model: PoseModel, inductor_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for code that is kept nor for an engine that is refitted: no ONNX is exported for this backend."""
    monkeypatch.setattr(InductorBackend, "_compile", refuse_to_compile)
    monkeypatch.setattr(plain_model, "networks", lambda: {DECODER: PoseModel.networks(plain_model)[DECODER]})
    arch, backend = sized(plain_model), InductorBackend()
    spec = network_specs(arch)[DECODER]
    network = plain_model.networks()[DECODER]
    source, refitted = tmp_path / "source", tmp_path / "refitted"
    source.mkdir()
    refitted.mkdir()
    graph, weights = backend.build_network(network, spec, arch, source, "fp32")
    write_graphs(source, {DECODER: graph})
    write_weights(
        source, {key: weight + (key in plain_model.tuned) for key, weight in weights.items()}, plain_model.tuned
    )
    others = ("onnx", "onnx-ir", "onnxscript")
    monkeypatch.setattr("posecrafter_rt.machine.version", lambda name: "99" if name in others else version(name))
    assert backend.num_missing(plain_model, arch, "fp32") == 0
    backend.refit(source, refitted, plain_model, arch, "fp32", lambda stage: None)
    link_the_rest(source, refitted)
    assert decoding_error(load_decoder(plain_model, source), plain_model, 2) > 1e-2
    assert decoding_error(load_decoder(plain_model, refitted), plain_model, 2) < 1e-4
    monkeypatch.setattr("posecrafter_rt.machine.version", lambda name: "99" if name == "diffusers" else version(name))
    with pytest.raises(EngineFolderError, match="exported from another configuration or by other code"):
        backend.refit(source, refitted, plain_model, arch, "fp32", lambda stage: None)


@on_cpu
def test_code_of_another_processor_is_not_taken(
    plain_model: PoseModel, inductor_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InductorBackend, "_compile", refuse_to_compile)
    build_decoder(plain_model, tmp_path)
    found, name = cpu_features(), InductorBackend().device()["name"]
    monkeypatch.setattr(backend_module, "cpu_features", lambda: found ^ {"gfni"})  # a virtual machine may hide it
    other = InductorBackend().device()["name"]
    assert name != other and re.sub("flags [0-9a-f]{8} ", "", name) == re.sub("flags [0-9a-f]{8} ", "", other)
    with pytest.raises(AssertionError, match="compiled"):
        build_decoder(plain_model, tmp_path)
    monkeypatch.setattr(backend_module, "cpu_features", lambda: found ^ {"bhi_ctrl"})  # an update of Linux may add it
    build_decoder(plain_model, tmp_path)
    monkeypatch.setattr(backend_module, "cpu_features", lambda: {"avx2", "fma", "avx9"})
    assert InductorBackend().device()["name"].endswith("(avx2)")
    monkeypatch.setattr(backend_module, "cpu_features", set)
    assert InductorBackend().device()["name"].endswith("(baseline)")
    with pytest.raises(AssertionError, match="compiled"):
        build_decoder(plain_model, tmp_path)


def test_a_missing_compiler_is_one_line_with_a_hint(
    plain_model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "empty"))
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler") as caught,
    ):
        build_decoder(plain_model, tmp_path)
    assert "\n" not in str(caught.value) and caught.value.hint and "g++" in caught.value.hint


@on_cpu
def test_a_compiler_that_brings_a_cxx_library_of_its_own_is_refused(
    plain_model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it links would end the process when it is loaded."""
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "empty"))
    compiler = tmp_path / "static-g++"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}),
        pytest.raises(BackendUnavailable, match=r"static-g\+\+ puts a C\+\+ library of its own") as caught,
    ):
        build_decoder(plain_model, tmp_path)
    assert caught.value.hint and "CXX=g++" in caught.value.hint


@on_cpu
def test_half_precision_is_for_gpus() -> None:
    for precision in ("fp16", "int8"):
        reason = f"it has no {precision} on a CPU; use fp32 or bf16"
        assert InductorBackend().unsupported_reason(precision) == reason
    assert InductorBackend().unsupported_reason("bf16") is None


@pytest.mark.slow
def test_bf16_stays_near_float32(make_tiny_model: Callable[..., PoseModel], tmp_path: Path) -> None:
    """By at most twice torch's own error in bf16; text, prompt keys and time tables are in float32."""
    model = make_tiny_model()
    model.fold()
    InductorBackend().build(model, sized(model), tmp_path, "bf16", lambda stage: None)
    engines = InductorBackend().load(tmp_path, sized(model), "bf16", tmp_path)
    right = {name: expected(model, name, draw(model, name, 4)) for name in engines}
    model.to(torch.bfloat16)
    for name, engine in engines.items():
        inputs = draw(model, name, 4)
        error = relative_error(next(iter(engine(**inputs).values())).cpu(), right[name])
        if name in FULL_PRECISION:
            assert error < 1e-5
        else:
            lowered = {
                key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in inputs.items()
            }
            assert error <= 2 * relative_error(expected(model, name, lowered).float(), right[name]) + 1e-3
