"""The plain modules as an engine: rebuilt without the base, in any precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posecrafter_rt.engines.base import TORCH_DTYPES, Precision
from posecrafter_rt.engines.torch import TorchBackend
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import NETWORK_NAMES, network_specs

SIZES = {"frames": 3, "groups": 1, "steps": 2, "window": 3, "height": 32, "width": 48}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_it_loads_without_the_base_in_its_precision(
    plain_model: PoseModel, tmp_path: Path, precision: Precision, tolerance: float
) -> None:
    backend, arch = TorchBackend(), plain_model.architecture()
    backend.build(plain_model, arch, tmp_path, precision, lambda stage: None)
    assert load_file(tmp_path / "unet.safetensors")["conv_in.weight"].dtype == TORCH_DTYPES[precision]
    engines, modules = backend.load(tmp_path, arch, precision, tmp_path / "unused"), plain_model.networks()
    assert set(engines) == set(NETWORK_NAMES) and not (tmp_path / "unused").exists()
    for name, spec in network_specs(arch).items():
        inputs = random_inputs(spec, SIZES)
        outputs = engines[name](**inputs)
        with torch.no_grad():
            expected = modules[name](*inputs.values())
        assert list(outputs) == [tensor.name for tensor in spec.outputs]
        for out, result, tensor in zip(spec.outputs, outputs.values(), expected, strict=True):
            kept = TORCH_DTYPES[precision] if out.dtype == "kept" else torch.float32
            assert result.dtype == kept and relative_error(result.cpu(), tensor) < tolerance


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
