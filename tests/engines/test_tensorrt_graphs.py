"""Every network's graph as TensorRT would be given it: valid in each precision, and still the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.engines.base import Precision
from posecrafter_rt.engines.tensorrt import prepare_graph
from posecrafter_rt.engines.tensorrt_build import profile_sizes
from posecrafter_rt.engines.tensorrt_plugins import typical_frames
from posecrafter_rt.export.functions import DOMAIN, add_functions
from posecrafter_rt.export.onnx import export_network
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.kernels import plugins as kernel_plugins
from posecrafter_rt.kernels.plugins import plugin_kernel
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import SHALLOW_STREAM, STREAM_NETWORKS, Architecture, network_specs
from tests.tiny import NETWORKS

pytest.importorskip("triton", reason="triton is not installed")  # which knows what it has kernels for

CAPABILITY = (8, 6)
MARKS = ("plugin_namespace", "plugin_version", "aot")
FLOATS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
UPSAMPLING = ("unet", "unet_stream", "vae_decoder")
SIZES = {"frames": 2, "groups": 1, "steps": 3, "window": 3}


def architecture(model: PoseModel) -> Architecture:
    return replace(model.architecture(), size=(32, 32))  # whose graphs other tests have traced


def export(model: PoseModel, name: str) -> ir.Model:
    spec, arch = network_specs(architecture(model))[name], architecture(model)
    return export_network(model.networks()[name], spec, arch, graphs=BlobCache(cache_dir() / "graphs"))


def run_without_plugins(model: ir.Model, path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes once the plugins' nodes have their bodies back."""
    for node in model.graph:
        if node.domain == DOMAIN:
            for name in MARKS:
                node.attributes.pop(name)
    add_functions(model)
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, inputs)
    return results


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_prepared_graph_is_valid_and_typed(
    plain_model: PoseModel, tmp_path: Path, name: str, precision: Precision
) -> None:
    spec, model = network_specs(architecture(plain_model))[name], export(plain_model, name)
    plugins, attentions = prepare_graph(model, spec, architecture(plain_model), precision, CAPABILITY)
    assert not model.functions
    marked = [node for node in model.graph if node.domain == DOMAIN]
    assert len(marked) == plugins <= attentions and all(set(MARKS) < set(node.attributes) for node in marked)
    assert (attentions > 0) == name.startswith(("unet", "controlnet")) and (plugins > 0) == (attentions > 0)
    # Those that read a stream's window have no kernel.
    assert (plugins < attentions) == (name in ("unet_stream", SHALLOW_STREAM))
    others = {"int64": "INT64", "bool": "BOOL", "float": "FLOAT", "kept": FLOATS[precision]}
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        found = [(value.name, value.dtype and value.dtype.name) for value in values]
        assert found == [(tensor.name, others[tensor.dtype]) for tensor in tensors]
    ir.save(model, tmp_path / "network.onnx")
    transposed = {
        value.dtype for node in model.graph if node.op_type == "ConvTranspose" for value in node.inputs if value
    }
    assert transposed <= {ir.DataType.FLOAT if precision == "bf16" else ir.DataType[FLOATS[precision]]}
    assert bool(transposed) == (name in UPSAMPLING)
    constants = [node.outputs[0].dtype for node in model.graph if node.op_type == "Constant"]
    assert not {ir.DataType[name] for name in FLOATS.values()} & {*constants}  # a refit could not name them
    # At this opset ONNX has no convolution in bfloat16, which TensorRT's importer takes all the same.
    onnx.checker.check_model(str(tmp_path / "network.onnx"), full_check=precision != "bf16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_streams_scores_are_in_float32(plain_model: PoseModel, precision: Precision) -> None:
    model = export(plain_model, "unet_stream")
    arch = architecture(plain_model)
    prepare_graph(model, network_specs(arch)["unet_stream"], arch, precision, CAPABILITY)
    scores = [node.inputs[0] for node in model.graph if node.op_type == "Softmax" and node.inputs[0] is not None]
    masks = [producer for value in scores if (producer := value.producer()) and producer.op_type == "Where"]
    assert len(masks) == len(plain_model.architecture().temporal_layers)
    for mask in masks:
        chain, value = [], mask.outputs[0]
        while (producer := value.producer()) is not None and producer.op_type in ("Where", "Div", "ReduceSum", "Mul"):
            chain.append(producer.op_type)
            value = producer.inputs[1 if producer.op_type == "Where" else 0]
            assert producer.outputs[0].dtype == ir.DataType.FLOAT
        assert chain == ["Where", "Div", "ReduceSum", "Mul"]


def test_attention_without_a_kernel_that_fits_is_written_out(
    plain_model: PoseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_plugins, "SHARED_BYTES", 0)
    monkeypatch.setattr(kernel_plugins, "smaller_tiles", lambda tile: [tile])
    plugin_kernel.cache_clear()  # what other tests have compiled did fit
    model = export(plain_model, "controlnet")
    arch = architecture(plain_model)
    plugins, attentions = prepare_graph(model, network_specs(arch)["controlnet"], arch, "fp16", (8, 6))
    assert plugins == 0 < attentions and not any(node.domain == DOMAIN for node in model.graph)
    assert "KeyframeAttention is written out in standard operators" in caplog.text
    told = [message for message in caplog.messages if "is written out" in message]
    assert len(told) == len({*told}) < attentions  # each width is tried once


def test_kernels_are_tried_for_as_many_frames_as_the_plan_compiles_them_for(
    plain_model: PoseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the importer asks for a kernel of fewer frames that nobody tried, and what fails then ends the build."""

    def fits_sixteen(op: str, capability: tuple[int, int], dtype: torch.dtype, head_size: int, frames: int) -> None:
        asked.add((op, frames))
        if op == "temporal_attention" and frames < 16:
            raise ValueError("no tile fits")

    asked: set[tuple[str, int]] = set()
    monkeypatch.setattr(kernel_plugins, "plugin_kernel", fits_sixteen)
    for max_frames, frames in ((None, 16), (8, 8), (64, 16)):
        asked.clear()
        model, arch = export(plain_model, "unet"), replace(architecture(plain_model), max_frames=max_frames)
        prepare_graph(model, network_specs(arch)["unet"], arch, "fp16", CAPABILITY)
        assert asked == {("keyframe_attention", 1), ("temporal_attention", frames)}
        shape = profile_sizes(network_specs(arch)["unet"], arch)[1]["frames"]
        assert typical_frames("temporal_attention", (1, shape, 16, 80)) == frames
        assert any(node.op_type == "TemporalAttention" for node in model.graph) == (frames == 16)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 5e-3)])
@pytest.mark.parametrize("name", ["controlnet", "unet", *STREAM_NETWORKS, SHALLOW_STREAM])
def test_a_prepared_graph_computes_what_its_network_computes(
    plain_model: PoseModel, tmp_path: Path, name: str, precision: Precision, tolerance: float
) -> None:
    spec, model = network_specs(architecture(plain_model))[name], export(plain_model, name)
    prepare_graph(model, spec, architecture(plain_model), precision, CAPABILITY)
    types = {value.name: value.dtype.numpy() for value in model.graph.inputs if value.dtype is not None}
    inputs = random_inputs(spec, SIZES)
    given = {key: tensor.numpy().astype(types[key]) for key, tensor in inputs.items()}
    with torch.no_grad():
        expected = plain_model.networks()[name](*inputs.values())
    for result, tensor in zip(run_without_plugins(model, tmp_path / "network.onnx", given), expected, strict=True):
        assert relative_error(torch.from_numpy(result), tensor) < tolerance
