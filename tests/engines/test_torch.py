"""The plain modules as an engine: rebuilt without the base, in any precision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posecrafter_rt.engines import own_settings
from posecrafter_rt.engines import torch as engines_torch
from posecrafter_rt.engines.base import TORCH_DTYPES, Precision, inner_precision
from posecrafter_rt.engines.description import COMPONENTS
from posecrafter_rt.engines.device import multiplies, torch_device
from posecrafter_rt.engines.torch import TorchBackend, TorchEngine
from posecrafter_rt.engines.tuned_file import read_tuned
from posecrafter_rt.errors import CheckpointError, EngineFolderError
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models import narrow
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import network_specs
from tests.tiny import NETWORKS

SIZES = {"frames": 3, "groups": 1, "steps": 2, "window": 3, "height": 32, "width": 48}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_it_loads_without_the_base_in_its_precision(
    plain_model: PoseModel, tmp_path: Path, precision: Precision, tolerance: float
) -> None:
    backend, arch = TorchBackend(), plain_model.architecture()
    backend.build(plain_model, arch, tmp_path, precision, lambda stage: None)
    assert load_file(tmp_path / "unet.safetensors")["conv_in.weight"].dtype == TORCH_DTYPES[precision]
    engines, modules = backend.load(tmp_path, arch, precision, tmp_path / "unused"), plain_model.networks()
    assert set(engines) == set(NETWORKS) and not (tmp_path / "unused").exists()
    for name, spec in network_specs(arch).items():
        inputs = random_inputs(spec, SIZES)
        outputs = engines[name](**inputs)
        with torch.no_grad():
            expected = modules[name](*inputs.values())
        assert list(outputs) == [tensor.name for tensor in spec.outputs]
        for out, result, tensor in zip(spec.outputs, outputs.values(), expected, strict=True):
            is_narrow = out.dtype == "kept" and multiplies(precision, torch_device())
            kept = TORCH_DTYPES[precision] if is_narrow else torch.float32
            assert result.dtype == kept and relative_error(result.cpu(), tensor) < tolerance


@pytest.fixture
def pose_embedding(make_tiny_model: Callable[..., PoseModel]) -> TorchEngine:
    """The network of that name, in float32, on the processor."""
    model = make_tiny_model()
    spec = network_specs(model.architecture())["pose_embedding"]
    return TorchEngine(model.networks()["pose_embedding"], spec, is_exact=True)


@pytest.fixture
def change() -> Iterator[Callable[[Any, str, Any], None]]:
    """change(holder, name, value): torch's settings are no attributes that `monkeypatch` could put back."""
    before: list[tuple[Any, str, Any]] = []

    def change(holder: Any, name: str, value: Any) -> None:
        before.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    yield change
    for changed in reversed(before):
        setattr(*changed)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has no such setting")
@pytest.mark.parametrize("value", ["ieee", "tf32"])
@pytest.mark.parametrize("names", [[], ["cudnn"], ["cudnn", "conv"]])
def test_a_programs_setting_of_precision_stays_and_disturbs_nothing(
    pose_embedding: TorchEngine, change: Callable[[Any, str, Any], None], names: list[str], value: str
) -> None:
    inputs = random_inputs(pose_embedding.spec, SIZES)
    expected = pose_embedding(**inputs)["pose_embeddings"].clone()
    holders = [torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv]
    change(holders[len(names)], "fp32_precision", value)
    before = [holder.fp32_precision for holder in holders]
    assert torch.equal(pose_embedding(**inputs)["pose_embeddings"], expected)
    assert [holder.fp32_precision for holder in holders] == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has no such setting")
def test_float32_is_float32_whatever_a_program_asks_of_products(
    make_tiny_model: Callable[..., PoseModel], change: Callable[[Any, str, Any], None]
) -> None:
    model = make_tiny_model()
    spec, matmul = network_specs(model.architecture())["vae_decoder"], torch.backends.mkldnn.matmul
    engine, inputs = TorchEngine(model.networks()["vae_decoder"], spec, is_exact=True), random_inputs(spec, SIZES)
    expected = engine(**inputs)["pixels"].clone()
    change(matmul, "fp32_precision", "bf16")
    assert torch.equal(engine(**inputs)["pixels"], expected) and matmul.fp32_precision == "bf16"
    with torch.no_grad():
        if torch.equal(engine.module(*inputs.values())[0], expected):
            pytest.skip("this processor computes in float32 even then")


@pytest.fixture(params=["read as torch has it", "read as before torch 2.9"])
def ask_for_bf16(
    request: pytest.FixtureRequest, change: Callable[[Any, str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], None]]:
    """A program asks for the fastest products of float32, by the setting that every torch has."""
    if hasattr(torch.backends.cudnn, "conv"):
        for holder in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            change(holder, "fp32_precision", "none")  # it changes them, too
    if request.param == "read as before torch 2.9":
        monkeypatch.delattr(type(torch.backends.cudnn), "conv", raising=False)
    before = torch.get_float32_matmul_precision()
    yield partial(torch.set_float32_matmul_precision, "medium")
    torch.set_float32_matmul_precision(before)


def test_float32_is_float32_whatever_a_program_has_set_for_products_of_any_kind(
    make_tiny_model: Callable[..., PoseModel], ask_for_bf16: Callable[[], None]
) -> None:
    model = make_tiny_model()
    spec = network_specs(model.architecture())["vae_decoder"]
    engine, inputs = TorchEngine(model.networks()["vae_decoder"], spec, is_exact=True), random_inputs(spec, SIZES)
    expected = engine(**inputs)["pixels"].clone()
    ask_for_bf16()
    assert torch.equal(engine(**inputs)["pixels"], expected)
    assert torch.get_float32_matmul_precision() == "medium"
    with torch.no_grad():
        if torch.equal(engine.module(*inputs.values())[0], expected):
            pytest.skip("this processor computes in float32 even then")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_of_float32_are_exact_and_a_programs_setting_of_them_comes_back(
    ask_for_bf16: Callable[[], None], device: str
) -> None:
    ask_for_bf16()
    settings = own_settings.own_values(device, is_exact=True)
    with own_settings.changed(settings):
        assert all(getattr(holder, name) in values for holder, name, values in settings)
        assert torch.get_float32_matmul_precision() == "highest" or hasattr(torch.backends.cudnn, "conv")
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_on_a_gpu_an_engine_sets_how_exact_its_convolutions_are_for_a_while_and_nothing_else(
    change: Callable[[Any, str, Any], None], value: str, is_exact: bool
) -> None:
    cudnn = torch.backends.cudnn
    holder, name = (cudnn.conv, "fp32_precision") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32")
    values = {"ieee": "ieee", "tf32": "tf32"} if hasattr(cudnn, "conv") else {"ieee": False, "tf32": True}
    change(holder, name, values[value])
    change(cudnn, "enabled", False)
    change(cudnn, "benchmark", True)
    change(cudnn, "deterministic", True)
    settings = own_settings.own_values("cuda", is_exact)
    with pytest.raises(KeyboardInterrupt), own_settings.changed(settings):
        assert getattr(holder, name) == values["ieee" if is_exact else "tf32"]
        assert cudnn.enabled and cudnn.deterministic and not cudnn.benchmark
        raise KeyboardInterrupt
    assert getattr(holder, name) == values[value] and cudnn.benchmark and cudnn.deterministic and not cudnn.enabled


def test_under_autocast_it_computes_in_its_own_precision(pose_embedding: TorchEngine) -> None:
    inputs = random_inputs(pose_embedding.spec, SIZES)
    expected = pose_embedding(**inputs)["pose_embeddings"].clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pose_embedding(**inputs)["pose_embeddings"], expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_a_processor_does_not_multiply_it_widens(
    plain_model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """The large weights stay as they are in the file, and results are those of float32 arithmetic on them, bit for bit."""
    monkeypatch.setattr(narrow, "LEAST", 300)
    monkeypatch.setattr(engines_torch, "torch_device", lambda: torch.device("cpu"))
    backend, arch = TorchBackend(), plain_model.architecture()
    backend.build(plain_model, arch, tmp_path, precision, lambda stage: None)
    wide = backend.load(tmp_path, arch, "fp32", tmp_path)
    monkeypatch.setattr(engines_torch, "multiplies", lambda precision, device: precision == "fp32")
    engines = backend.load(tmp_path, arch, precision, tmp_path)
    kinds = {type(module) for module in engines["unet"].module.modules()}
    assert {narrow.NarrowLinear, narrow.NarrowConv2d, narrow.NarrowConvTranspose2d} <= kinds
    for name, spec in network_specs(arch).items():
        inner = TORCH_DTYPES[inner_precision(COMPONENTS[name][0], precision)]
        assert engines[name].dtype == torch.float32
        assert {parameter.dtype for parameter in engines[name].module.parameters()} == {torch.float32, inner}, name
        inputs = random_inputs(spec, SIZES)
        for result, expected in zip(engines[name](**inputs).values(), wide[name](**inputs).values(), strict=True):
            assert torch.equal(result, expected), name
    held = dict(engines["unet"].module.named_parameters())
    name = next(name for name, parameter in held.items() if parameter.dtype == TORCH_DTYPES[precision])
    swapped = torch.randn(held[name].shape)
    assert engines["unet"].swap_weights({name: swapped}) == {name}
    assert torch.equal(held[name], swapped.to(TORCH_DTYPES[precision]))


def test_a_swap_beyond_what_16_bits_hold_is_refused_and_changes_nothing(
    make_tiny_model: Callable[..., PoseModel],
) -> None:
    model = make_tiny_model()
    network = model.networks()["pose_embedding"].half()
    engine = TorchEngine(network, network_specs(model.architecture())["pose_embedding"], is_exact=False)
    held = dict(network.named_parameters())
    before = {name: parameter.clone() for name, parameter in held.items()}
    tensors = {name: torch.zeros(parameter.shape) for name, parameter in held.items()}
    *_, last = tensors
    tensors[last].fill_(1e5)
    with pytest.raises(CheckpointError, match=f"^{re.escape(last)} does not fit torch.float16$") as caught:
        engine.swap_weights(tensors)
    assert caught.value.hint == "build the engine with --precision bf16"
    assert all(torch.equal(held[name], parameter) for name, parameter in before.items())
    tensors[last].fill_(2.0**15)
    assert engine.swap_weights(tensors) == set(tensors) and (held[last] == 2.0**15).all()


def test_builds_and_refits_refuse_a_weight_beyond_what_16_bits_hold(
    make_tiny_model: Callable[..., PoseModel], tmp_path: Path
) -> None:
    model, other, backend = make_tiny_model(), make_tiny_model(), TorchBackend()
    arch, (source, built, refitted, wide) = model.architecture(), (tmp_path / name for name in "sbrw")
    for folder in (source, built, refitted, wide):
        folder.mkdir()
    model.tuned = other.tuned = frozenset({"unet.conv_in.weight"})
    backend.build(model, arch, source, "fp16", lambda stage: None)
    other.unet.conv_in.weight.data[0, 0, 0, 0] = 1e5
    with pytest.raises(EngineFolderError, match=r"^unet\.conv_in\.weight does not fit torch\.float16$") as caught:
        backend.build(other, arch, built, "fp16", lambda stage: None)
    assert caught.value.hint == "build the engine with --precision bf16" and not (built / "unet.safetensors").exists()
    with pytest.raises(EngineFolderError, match=r"^unet\.conv_in\.weight does not fit torch\.float16$") as caught:
        backend.refit(source, refitted, other, arch, "fp16", lambda stage: None)
    assert caught.value.hint == "build without --refit, with --precision bf16" and not list(refitted.iterdir())
    backend.build(other, arch, wide, "bf16", lambda stage: None)
    assert read_tuned(wide)["unet.conv_in.weight"].isfinite().all()


def test_convolutions_lie_in_the_file_as_they_run(plain_model: PoseModel, tmp_path: Path) -> None:
    backend, arch = TorchBackend(), plain_model.architecture()
    backend.build(plain_model, arch, tmp_path, "fp32", lambda stage: None)
    stored = load_file(tmp_path / "unet.safetensors")["conv_in.weight"]
    module = backend.load(tmp_path, arch, "fp32", tmp_path)["unet"].module
    (weight,) = (tensor for name, tensor in module.named_parameters() if name == "unet.conv_in.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight.permute(0, 2, 3, 1).cpu(), stored)


def test_nothing_of_the_machine_is_written(plain_model: PoseModel, tmp_path: Path) -> None:
    TorchBackend().build(plain_model, plain_model.architecture(), tmp_path, "fp32", lambda stage: None)
    assert plain_model.base_id.encode() not in (tmp_path / "components.json").read_bytes()  # a path in these tests
