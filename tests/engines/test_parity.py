"""Engines against the plain modules: every network, changing frame counts, and swapped weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from posecrafter_rt.engines import choose_backend, choose_precision, get_backend, names, openvino_operations
from posecrafter_rt.engines.base import Engine
from posecrafter_rt.engines.tensorrt_build import profile_sizes
from posecrafter_rt.errors import BackendUnavailable, CheckpointError, ShapeError
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import NetworkSpec, network_specs
from tests.tiny import NETWORKS


def inputs_for(spec: NetworkSpec, frames: int, groups: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs at 32 × 32 pixels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"frames": frames, "groups": groups, "steps": 3, "window": 3, "height": 32, "width": 32}

    def size(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        name, _, divisor = dim.partition("/")
        return sizes[name] // int(divisor or 1)

    def tensor(dims: tuple[int | str, ...], dtype: str) -> Tensor:
        shape = [size(dim) for dim in dims]
        if dtype == "int64":
            return torch.randint(0, 700, shape, generator=generator)
        if dtype == "bool":
            return torch.rand(shape, generator=generator) < 0.5
        return torch.randn(shape, generator=generator)

    return {item.name: tensor(item.dims, item.dtype) for item in spec.inputs}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PoseModel, str], Path]:
    def build(model: PoseModel, name: str) -> Path:
        folder, arch = tmp_path_factory.mktemp(name), replace(model.architecture(), size=(32, 32))
        get_backend(name).build(model, arch, folder, "fp32", lambda stage: None)
        return folder

    return build


def load(folder: Path, model: PoseModel, name: str) -> dict[str, Engine]:
    arch = replace(model.architecture(), size=(32, 32))
    return get_backend(name).load(folder, arch, "fp32", folder / "compiled")


@pytest.fixture
def model(make_tiny_model: Callable[..., PoseModel]) -> PoseModel:
    model = make_tiny_model("frame")
    model.fold()
    return model


@pytest.fixture(scope="module")
def built(
    build: Callable[[PoseModel, str], Path], make_tiny_model: Callable[..., PoseModel], backend_name: str
) -> Path:
    """What the backend writes of `model`, once for all tests; what is compiled lies there too."""
    model = make_tiny_model("frame")
    model.fold()
    return build(model, backend_name)


def in_channels_last(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values, pictures and latents in another order in memory."""
    return {name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
            for name, tensor in inputs.items()}  # fmt: skip


def outputs(module: torch.nn.Module, spec: NetworkSpec, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        tensors = module(*(inputs[item.name] for item in spec.inputs))
    return {item.name: tensor for item, tensor in zip(spec.outputs, tensors, strict=True)}


def test_every_network_equals_its_module_over_changing_frame_counts(
    model: PoseModel, built: Path, backend_name: str
) -> None:
    engines, modules = load(built, model, backend_name), model.networks()
    specs = network_specs(model.architecture())
    assert set(engines) == set(NETWORKS)
    for network, spec in specs.items():
        varies = any("frames" in item.dims for item in spec.inputs)
        most = profile_sizes(spec, model.architecture())[2]["frames"] if backend_name == "tensorrt" else 16
        for wanted, groups in ((1, 1), (16, 1), (1, 1), (7, 1), (6, 2)) if varies else ((1, 1), (1, 2)):
            frames = min(wanted, most)
            inputs = inputs_for(spec, frames, groups)
            expected = outputs(modules[network], spec, inputs)
            given = in_channels_last(inputs) if wanted == 7 else inputs
            for key, tensor in engines[network](**given).items():
                torch.testing.assert_close(
                    tensor.cpu(), expected[key], rtol=1e-3, atol=2e-4 * float(expected[key].abs().max())
                )


def test_swapping_weights_gives_what_building_with_them_gives(
    model: PoseModel, built: Path, build: Callable[[PoseModel, str], Path], backend_name: str
) -> None:
    engines, specs = load(built, model, backend_name), network_specs(model.architecture())
    inputs = {network: inputs_for(specs[network], 3) for network in ("unet", "controlnet")}
    before = {network: {k: v.clone() for k, v in engines[network](**inputs[network]).items()} for network in inputs}
    generator = torch.Generator().manual_seed(9)
    tensors = {}
    for prefix in ("unet", "controlnet"):
        for key, parameter in getattr(model, prefix).named_parameters():
            if ".attn1.to_out." in key or ".attn_temp." in key or ".temporal_out." in key:
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                tensors[f"{prefix}.{key}"] = parameter.detach().clone()
    held = set().union(*(engine.swap_weights(tensors) for engine in engines.values()))
    assert held == set(tensors)
    rebuilt = load(build(model, backend_name), model, backend_name)
    for network in inputs:
        swapped = engines[network](**inputs[network])
        expected = rebuilt[network](**inputs[network])
        if backend_name == "tensorrt":  # built twice, it may choose other kernels
            assert all(relative_error(swapped[key], tensor) < 1e-4 for key, tensor in expected.items())
        else:
            assert all(torch.equal(swapped[key], tensor) for key, tensor in expected.items())
        assert not all(torch.equal(before[network][key], tensor) for key, tensor in expected.items())
    with pytest.raises(CheckpointError, match="shape"):
        engines["unet"].swap_weights({next(k for k in tensors if k.startswith("unet")): torch.zeros(1, 2, 3)})


def test_wrong_inputs_are_refused(model: PoseModel, built: Path, backend_name: str) -> None:
    decoder = load(built, model, backend_name)["vae_decoder"]
    with pytest.raises(ShapeError, match="latents"):
        decoder(pixels=torch.zeros(1, 4, 16, 16))
    with pytest.raises(ShapeError, match="latents"):
        decoder(latents=torch.zeros(1, 3, 16, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and is taken")
def test_auto_takes_the_first_that_can_run_and_says_why() -> None:
    backend, why = choose_backend("auto", "fp32")
    assert backend.name == "openvino" and "tensorrt: " in why
    assert choose_backend("torch", "fp32")[1] == "as asked"
    assert choose_precision("auto") in ("fp32", "fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and is taken")
def test_on_a_processor_fp16_is_of_openvino_where_its_operations_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_operations, "missing_reason", lambda: None)
    assert choose_backend("auto", "fp16")[0].name == "openvino"
    monkeypatch.setattr(openvino_operations, "missing_reason", lambda: "no C++ compiler was found")
    reason = "openvino: fp16 needs operations that cannot be had here: no C++ compiler was found"
    backend, why = choose_backend("auto", "fp16")
    assert backend.name == "torch" and reason in why
    with pytest.raises(BackendUnavailable, match="backend openvino: fp16 needs operations"):
        choose_backend("openvino", "fp16")


@pytest.mark.parametrize(("features", "vectors", "reason", "expected"), [
    (openvino_operations.AVX512 | openvino_operations.TILES, 0, None, "fp16"),
    (openvino_operations.AVX512 | openvino_operations.TILES, 1, None, "fp32"),  # an older compiler
    (openvino_operations.AVX512 | openvino_operations.TILES, None, "no C++ compiler was found", "fp32"),
    (openvino_operations.AVX512, 1, None, "fp32"),
    ({"asimd", "bf16"}, None, "which this processor lacks", "fp32"),
])  # fmt: skip
def test_on_a_processor_auto_is_fp16_where_openvino_gains_by_it_and_can_do_it(
    monkeypatch: pytest.MonkeyPatch, features: set[str], vectors: int | None, reason: str | None, expected: str
) -> None:
    built = openvino_operations.Built(None if vectors is None else openvino_operations.VECTORS[vectors], reason=reason)
    monkeypatch.setattr("posecrafter_rt.engines.torch_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(openvino_operations, "cpu_features", lambda: features)
    monkeypatch.setattr(openvino_operations, "_built", lambda fitting: built)  # this processor may not run it
    assert choose_precision("auto") == choose_precision("auto", "openvino") == expected
    assert choose_precision("auto", "torch") == choose_precision("auto", "inductor") == "fp32"
    assert choose_backend("auto", choose_precision("auto"))[0].name == "openvino"
    monkeypatch.setattr("posecrafter_rt.engines.torch_device", lambda: torch.device("cuda"))
    assert choose_precision("auto") == "fp16" and choose_precision("auto", "openvino") == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("has_vnni", "missing", "refusal"), [
    (True, None, None),
    (False, None, "this processor has no VNNI; use fp32"),
    (True, "no C++ compiler was found", "int8 needs operations that cannot be had here: no C++ compiler was found"),
])  # fmt: skip
def test_int8_is_of_openvino_alone_also_where_a_gpu_is_and_only_by_name(
    monkeypatch: pytest.MonkeyPatch, device: str, has_vnni: bool, missing: str | None, refusal: str | None
) -> None:
    features = {"avx2", "fma", "f16c", *(["avx_vnni"] if has_vnni else [])}
    monkeypatch.setattr("posecrafter_rt.engines.torch_device", lambda: torch.device(device))
    monkeypatch.setattr(openvino_operations, "cpu_features", lambda: features)
    # Not compiled: this processor may have no such instructions.
    monkeypatch.setattr(
        openvino_operations, "_built", lambda fitting: openvino_operations.Built(fitting[0], reason=missing)
    )
    assert choose_precision("int8") == "int8" and choose_precision("auto") != "int8"
    for name in ("auto", "openvino"):
        if refusal is None:
            backend, why = choose_backend(name, "int8")
            assert backend.name == "openvino"
            assert why == ("the only one that has int8" if name == "auto" else "as asked")
        else:
            with pytest.raises(BackendUnavailable) as caught:
                choose_backend(name, "int8")
            assert str(caught.value) == f"backend openvino: {refusal}"
    for name in set(names()) - {"openvino"}:
        with pytest.raises(BackendUnavailable, match=f"^backend {name}: it has no int8.*; use fp32"):
            choose_backend(name, "int8")
