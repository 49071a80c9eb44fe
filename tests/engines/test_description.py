"""What is told of an engine's networks, against the networks themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines.base import TORCH_DTYPES
from posecrafter_rt.engines.description import COMPONENTS, count_weights, describe_networks, write_description
from posecrafter_rt.engines.folder import EngineFolder
from posecrafter_rt.engines.openvino_weights import HOLDERS, weights_path
from posecrafter_rt.engines.torch import TorchBackend, TorchEngine
from posecrafter_rt.engines.tuned_file import TUNED_FILE, read_tuned
from posecrafter_rt.models import narrow
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import ALL_NETWORKS, Architecture, network_specs
from tests.tiny import NETWORKS


@pytest.fixture(scope="module")
def half(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineFolder:
    """An engine of the torch backend with components in two precisions, and with all networks."""
    path = tmp_path_factory.mktemp("described") / "half.engine"
    return build_engine(tiny_checkpoint, path, BuildOptions("torch", "fp16", feature_reuse=True)).folder


def test_an_engine_of_torch_is_what_it_loads(half: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "LEAST", 300)  # or all of the tiny base would be widened on a processor
    arch = Architecture.from_json(half.manifest["architecture"])
    engines = TorchBackend().load(half.networks, arch, "fp16", half.compiled)
    described, specs = describe_networks(half), network_specs(arch)
    tuned = read_tuned(half.networks)
    assert tuned and list(described) == list(engines) and set(NETWORKS) == set(described)
    assert {network["precision"] for network in described.values()} == {"fp16", "fp32"}
    for name, network in described.items():
        engine = engines[name]
        assert isinstance(engine, TorchEngine), name
        largest = max(engine.module.parameters(), key=torch.Tensor.numel)
        assert largest.dtype == TORCH_DTYPES[network["precision"]], name
        assert network["weights"] == sum(parameter.numel() for parameter in engine.module.parameters()), name
        children = [f"{child}.safetensors" for child, _ in engine.module.named_children()]
        assert [file for file in network["files"] if file != TUNED_FILE] == children, name
        assert (TUNED_FILE in network["files"]) == bool(tuned.keys() & dict(engine.module.named_parameters()).keys()), (
            name
        )
        for kind, tensors in (("inputs", specs[name].inputs), ("outputs", specs[name].outputs)):
            shapes = {key: tuple(tensor["shape"]) for key, tensor in network[kind].items()}
            assert list(shapes) == [tensor.name for tensor in tensors]
            assert shapes == {tensor.name: tensor.dims for tensor in tensors}
    apart = sum(tensor.nbytes for name, tensor in tuned.items() if name.startswith("unet."))
    assert described["unet"]["bytes"] == (half.networks / "unet.safetensors").stat().st_size + apart
    assert described["unet"]["inputs"]["latents"] == {"shape": ["frames", 4, 16, 16], "dtype": "float"}
    assert set(COMPONENTS) == set(ALL_NETWORKS)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_engine_of_openvino_is_what_openvino_reads(
    openvino_networks: Path, plain_model: PoseModel, half: EngineFolder, precision: str
) -> None:
    openvino = pytest.importorskip("openvino")
    arch = replace(plain_model.architecture(), size=(32, 32))
    manifest = {**half.manifest, "backend": "openvino", "precision": precision, "architecture": arch.to_json()}
    described, core = describe_networks(EngineFolder(openvino_networks.parent, manifest)), openvino.Core()
    assert list(described) == list(NETWORKS)
    for name, network in plain_model.networks().items():
        parameters, graph = {key for key, _ in network.named_parameters()}, openvino_networks / f"{name}.xml"
        ops = core.read_model(graph, weights_path(graph)).get_ops()
        held = [op for op in ops if op.get_type_name() == "Constant" and op.get_friendly_name() in parameters]
        assert held and described[name]["weights"] == sum(op.data.size for op in held), name
        tuned = [TUNED_FILE] if any(op.get_friendly_name() in plain_model.tuned for op in held) else []
        assert described[name]["files"] == [f"{name}.xml", f"{HOLDERS.get(name, name)}.bin", *tuned]
        rest = described[name]["bytes"] - 4 * described[name]["weights"] - graph.stat().st_size
        zeros = 4 * sum(op.data.size for op in held if op.get_friendly_name() in plain_model.tuned)
        # Equal constants are held once; there are other constants, and zeros in the tuned weights' place.
        assert -5_000 < rest < 10_000 + zeros, name
    in_full = {name for name, network in described.items() if network["precision"] == "fp32"}
    assert in_full == {"text_encoder", "prompt_kv", "time_tables"}
    assert {network["precision"] for network in described.values()} == {"fp32", precision}


def test_only_floating_point_weights_count(tmp_path: Path) -> None:
    tensors = {
        "unet.a.weight": torch.zeros(3, 5, dtype=torch.bfloat16),
        "unet.scale.bias": torch.tensor(1.0),
        "text_encoder.position.ids": torch.zeros(7, dtype=torch.int64),
        "val_3": torch.zeros(11),  # a constant of the graph
    }
    save_file(tensors, tmp_path / "unet.safetensors")
    (tmp_path / "unet.plan").write_bytes(b"plan")
    assert count_weights(tmp_path / "unet.safetensors") == 16
    assert count_weights(tmp_path / "unet.plan") == 0


def test_what_building_kept_is_told(half: EngineFolder, tmp_path: Path) -> None:
    networks = tmp_path / "networks"
    networks.mkdir()
    write_description(networks, {"unet": {"plugins": 3, "attentions": 5, "limits": {"frames": [1, 64]}}})
    described = describe_networks(EngineFolder(tmp_path, {**half.manifest, "backend": "tensorrt"}))
    unet = described["unet"]
    assert (unet["plugins"], unet["attentions"], unet["files"]) == (3, 5, [])
    assert unet["limits"] == {"frames": [1, 64]}
    assert "plugins" not in described["controlnet"]
    json.dumps(described)
