"""Every network as ONNX against PyTorch in ONNX Runtime, at sizes that were not traced; weights keep their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export import onnx as export_onnx
from posecrafter_rt.export import verify
from posecrafter_rt.export.functions import DOMAIN
from posecrafter_rt.export.graphs import graph_key
from posecrafter_rt.export.onnx import export_network, save_model
from posecrafter_rt.export.verify import default_cases, verify_network
from posecrafter_rt.models.blocks import ClipContext, group_norm
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import STREAM_NETWORKS, Architecture, NetworkSpec, TensorSpec, network_specs
from tests.tiny import NETWORKS

MakeModel = Callable[..., PoseModel]


@pytest.fixture
def model(make_tiny_model: MakeModel) -> PoseModel:
    model = make_tiny_model()
    model.fold()
    return model


def engine_architecture(model: PoseModel) -> Architecture:
    """For the one size that engines of the tiny base have in other tests too: their graphs are traced already."""
    return replace(model.architecture(), size=(32, 32))


def export(model: PoseModel, name: str, path: Path, arch: Architecture, inline: bool = False) -> nn.Module:
    """Write one network; graphs are shared with every other test of the run."""
    module, graphs = model.networks()[name], BlobCache(cache_dir() / "graphs")
    save_model(export_network(module, network_specs(arch)[name], arch, inline=inline, graphs=graphs), path)
    return module


def assert_contract(path: Path, spec: NetworkSpec) -> None:
    """A valid file with the spec's names and dimensions, and with nothing of the exporting machine."""
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    for values, tensors in ((proto.graph.input, spec.inputs), (proto.graph.output, spec.outputs)):
        named = {value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
                 for value in values}  # fmt: skip
        assert named == {tensor.name: tensor.dims for tensor in tensors}
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


# No engine is built without a size, and large networks take long to trace without: for one they are proved below, as
# streams' networks are.
ANY_SIZE = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith(("unet", "controlnet", "vae_encoder")) else name
    for name in NETWORKS
    if name not in STREAM_NETWORKS
]


@pytest.mark.parametrize("name", ANY_SIZE)
def test_every_network_is_proved(model: PoseModel, tmp_path: Path, name: str) -> None:
    path, arch = tmp_path / "network.onnx", model.architecture()
    module, spec = export(model, name, path, arch), network_specs(arch)[name]
    assert_contract(path, spec)
    assert verify_network(path, module, spec, default_cases(arch)) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_for_one_size_is_proved_over_frames_and_groups(
    model: PoseModel, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, arch = tmp_path / "network.onnx", engine_architecture(model)
    if name == "controlnet_stream":  # and one that is not square
        arch = replace(arch, size=(2 * arch.size_multiple, 3 * arch.size_multiple))
    with caplog.at_level("INFO"):
        module, spec = export(model, name, path, arch, inline=True), network_specs(arch)[name]
    assert "is traced twice" not in caplog.text  # where it was not in the cache
    assert_contract(path, spec)
    assert verify_network(path, module, spec, default_cases(arch)) < 1e-5
    dims = {dim.dim_param for value in onnx.load(path).graph.input for dim in value.type.tensor_type.shape.dim}
    assert dims <= {"", "frames", "groups", "steps", "window"}


def test_attention_is_a_node_with_a_body_or_written_out(model: PoseModel, tmp_path: Path) -> None:
    with_nodes, written_out, arch = tmp_path / "nodes.onnx", tmp_path / "out.onnx", engine_architecture(model)
    export(model, "unet", with_nodes, arch)
    module = export(model, "unet", written_out, arch, inline=True)
    proto = onnx.load(with_nodes)
    assert {node.op_type for node in proto.graph.node if node.domain == DOMAIN} == {
        "KeyframeAttention", "TemporalAttention"}  # fmt: skip
    assert {function.name for function in proto.functions} == {"KeyframeAttention", "TemporalAttention"}
    proto = onnx.load(written_out)
    assert not proto.functions and {node.domain for node in proto.graph.node} == {""}
    assert verify_network(written_out, module, network_specs(arch)["unet"], default_cases(arch)[:2]) < 1e-5


def test_every_tuned_weight_is_an_initialiser_of_its_own_even_where_values_are_equal(
    model: PoseModel, tmp_path: Path
) -> None:
    path = tmp_path / "unet.onnx"
    export(model, "unet", path, engine_architecture(model))  # attn_temp of the tiny base still equals attn1
    names = {initialiser.name for initialiser in onnx.load(path).graph.initializer}
    tuned = {name for name, _ in model.networks()["unet"].named_parameters()
             if any(part in name for part in (".attn1.", ".attn_temp.", ".temporal_out."))}  # fmt: skip
    assert tuned and tuned <= names
    assert not any(".attn2.to_k." in name for name in names)  # computed once a prompt, by prompt_kv


def test_a_second_checkpoint_reuses_the_graph_with_its_own_weights(
    model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = model.architecture()
    export(model, "prompt_kv", tmp_path / "first.onnx", arch)

    def traced_again(*args: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(export_onnx, "_trace", traced_again)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.mul_(1.5)
    module = export(model, "prompt_kv", tmp_path / "second.onnx", arch)
    verify_network(tmp_path / "second.onnx", module, network_specs(arch)["prompt_kv"], default_cases(arch))
    with pytest.raises(PoseCrafterError, match="unet_text_kv"):
        verify_network(tmp_path / "first.onnx", module, network_specs(arch)["prompt_kv"], default_cases(arch))


def test_graphs_of_another_structure_are_not_reused(make_tiny_model: MakeModel) -> None:
    frame, clip = make_tiny_model("frame"), make_tiny_model("clip")
    arch, folded = frame.architecture(), make_tiny_model("frame")
    folded.fold()

    def key(model: PoseModel, name: str = "unet") -> dict:
        return graph_key(model.networks()[name], network_specs(arch)[name], arch)

    assert key(frame) == key(make_tiny_model("frame"))
    assert key(frame) != key(clip) and key(frame) != key(folded)
    rescaled = make_tiny_model("frame")
    rescaled.vae.register_to_config(scaling_factor=1.0)
    assert key(frame, "vae_decoder") != key(rescaled, "vae_decoder")


class ClipNorm(nn.Module):
    """A GroupNorm over all frames of each group, as every residual block of a `clip` model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, latents: Tensor, text_kv: Tensor) -> tuple[Tensor]:
        return (group_norm(self.norm, latents, ClipContext(text_kv.shape[0], latents, text_kv, "clip")),)


def test_statistics_over_the_clip_are_exported_too(model: PoseModel, tmp_path: Path) -> None:
    latents, arch = ("frames", 8, "height/2", "width/2"), model.architecture()
    spec = NetworkSpec("norm", (TensorSpec("latents", latents), TensorSpec("text_kv", ("groups", 1, 1))),
                       (TensorSpec("out", latents),))  # fmt: skip
    module, path = ClipNorm().eval(), tmp_path / "norm.onnx"
    save_model(export_network(module, spec, arch), path)
    assert verify_network(path, module, spec, default_cases(arch)) < 1e-5


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "unet_shallow"])
def test_nothing_is_traced_once_more_to_be_decomposed(
    model: PoseModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decomposed(*args: object) -> None:
        raise AssertionError("traced once more")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", decomposed)
    arch = engine_architecture(model)
    assert len(export_network(model.networks()[name], network_specs(arch)[name], arch).graph) > 0


class InPlace(nn.Module):
    """What torch.onnx.export translates only once it is decomposed, and an alias that decomposing has to see."""

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        doubled = latents.mul(2)
        doubled.to(torch.float32).add_(1)
        return (doubled,)


def test_what_has_no_translation_of_its_own_is_decomposed(
    model: PoseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latents, arch = ("frames", 8, "height/2", "width/2"), model.architecture()
    spec = NetworkSpec("in_place", (TensorSpec("latents", latents),), (TensorSpec("out", latents),))
    module, path = InPlace().eval(), tmp_path / "in_place.onnx"
    module.register_parameter("unused", nn.Parameter(torch.zeros(1)))  # whose type and device every network has
    with caplog.at_level("INFO"):
        save_model(export_network(module, spec, arch), path)
    assert "in_place is traced twice" in caplog.text
    assert verify_network(path, module, spec, default_cases(arch)) < 1e-5


def test_large_weights_go_to_a_file_beside_it(
    model: PoseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx, "EXTERNAL_BYTES", 1000)
    path, arch = tmp_path / "network.onnx", model.architecture()
    module = export(model, "pose_embedding", path, arch)
    assert (tmp_path / "network.onnx.data").stat().st_size > path.stat().st_size
    assert verify_network(path, module, network_specs(arch)["pose_embedding"], default_cases(arch)) < 1e-5


def test_a_difference_is_named(model: PoseModel, tmp_path: Path) -> None:
    arch = model.architecture()
    module = export(model, "vae_decoder", tmp_path / "v.onnx", arch)
    model.vae.decoder.conv_out.bias.add_(0.1)
    with pytest.raises(PoseCrafterError, match="vae_decoder differs from PyTorch: pixels by .* at .*'frames': 1"):
        verify_network(tmp_path / "v.onnx", module, network_specs(arch)["vae_decoder"], default_cases(arch))


def test_relative_error() -> None:
    expected = torch.tensor([1.0, -4.0])
    assert verify.relative_error(expected + torch.tensor([0.0, 0.4]), expected) == pytest.approx(0.1)
    assert verify.relative_error(torch.zeros(3), expected) == float("inf")
    assert verify.relative_error(torch.tensor([1.0, float("nan")]), expected) == float("inf")
    assert verify.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    for value in (float("nan"), float("inf")):  # on both sides, too: such an output proves nothing
        broken = torch.tensor([value, -4.0])
        assert verify.relative_error(expected, broken) == float("inf")
        assert verify.relative_error(broken, broken) == float("inf")
