"""Precision in the graph's types: valid ONNX, near to float32, with islands where 16 bits overflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.onnx import export_network
from posecrafter_rt.export.strong_types import kept_names, lower_precision
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import NetworkSpec, TensorSpec, network_specs

# A normalisation written out, as that over a whole clip is exported, between two products; then a resize.
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
agraph (float[n, 4] x, int64[1] shape) => (float[n, 4] y, float[n, 8] z)
<int64[2] back = {-1, 4}, int64[1] last = {-1}, float[2] sizes = {1.0, 2.0}>
{
  a = MatMul (x, weight)
  mean = ReduceMean (a, last)
  centred = Sub (a, mean)
  squared = Mul (centred, centred)
  variance = ReduceMean (squared, last)
  root = Sqrt (variance)
  normalised = Div (centred, root)
  flat = Reshape (normalised, shape)
  joined = Reshape (flat, back)
  y = Mul (joined, scale)
  z = Resize <mode = "nearest"> (joined, , sizes)
}
"""


def graph(weight: float = 1.0) -> ir.Model:
    """The graph with types and `weight` times the identity."""
    proto = onnx.parser.parse_model(GRAPH)
    for name, array in (("weight", np.eye(4, dtype=np.float32) * weight), ("scale", np.full(4, 3, np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def dtypes(model: ir.Model) -> dict[str, str]:
    return {str(value.name): value.dtype.name for node in model.graph for value in node.outputs if value.dtype}


@pytest.mark.parametrize(("precision", "low"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_products_are_low_and_statistics_are_not(precision: str, low: str) -> None:
    model = graph()
    lower_precision(model, precision)
    types = dtypes(model)
    assert types["a"] == types["flat"] == types["joined"] == low
    assert {types[name] for name in ("mean", "centred", "squared", "variance", "root", "normalised")} == {"FLOAT"}
    assert [value.dtype for value in (*model.graph.outputs, model.graph.inputs[0])] == [ir.DataType.FLOAT] * 3
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert model.graph.initializers["weight"].dtype.name == low  # under its own name: refitted by it
    assert model.graph.initializers["sizes"].dtype == ir.DataType.FLOAT  # which Resize must have
    for node in model.graph:  # nothing mixes types
        floats = {value.dtype for value in node.inputs if value is not None and value.name != "sizes"}
        assert len(floats & {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}) <= 1, node


def test_what_is_only_handed_on_crosses_as_it_is_inside() -> None:
    spec = NetworkSpec(
        "net", (TensorSpec("x", ("n", 4), "kept"),), (TensorSpec("y", ("n", 4), "kept"), TensorSpec("z", ("n", 8)))
    )
    assert kept_names(spec) == {"x", "y"}
    model = graph()
    lower_precision(model, "fp16", kept_names(spec))
    types = [value.dtype.name for value in (model.graph.inputs[0], *model.graph.outputs)]
    assert types == ["FLOAT16", "FLOAT16", "FLOAT"] and [value.name for value in model.graph.outputs] == ["y", "z"]
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert not any(use.node in casts for use in model.graph.inputs[0].uses())
    assert model.graph.outputs[0].producer() not in casts


def test_what_is_handed_on_from_an_island_is_low_too() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> agraph (float[n, 4] x) => (float[n, 4] y) { y = Softmax (x) }"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True))
    lower_precision(model, "bf16", {"y"})
    output = model.graph.outputs[0]
    assert (output.name, output.dtype.name, model.graph.inputs[0].dtype.name) == ("y", "BFLOAT16", "FLOAT")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_large_values_survive_the_statistics(tmp_path: Path) -> None:
    model = graph(weight=2000.0)  # squared, beyond float16's 65504
    lower_precision(model, "fp16")
    ir.save(model, tmp_path / "low.onnx")
    onnx.checker.check_model(str(tmp_path / "low.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "low.onnx", providers=["CPUExecutionProvider"])
    x = np.array([[1, 2, 3, 5]], np.float32)
    y = session.run(["y"], {"x": x, "shape": np.array([-1])})[0]
    exact = 3 * (x - x.mean()) / x.std()
    assert y.dtype == np.float32 and np.abs(y - exact).max() < 0.01


def test_weights_beyond_the_range_are_refused() -> None:
    with pytest.raises(PoseCrafterError, match="weight does not fit FLOAT16"):
        lower_precision(graph(weight=1e5), "fp16")
    lower_precision(graph(weight=1e5), "bf16")


def test_float32_changes_nothing() -> None:
    model = graph()
    before = ir.to_proto(model).SerializeToString()
    lower_precision(model, "fp32")
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("name", ["controlnet", "unet"])
def test_a_network_in_float16_is_valid_and_near(tiny_model: PoseModel, tmp_path: Path, name: str) -> None:
    import torch

    from posecrafter_rt.export.shapes import random_inputs
    from posecrafter_rt.export.verify import relative_error

    tiny_model.fold()
    arch = replace(tiny_model.architecture(), size=(32, 32))  # whose graphs other tests have traced
    module = tiny_model.networks()[name]
    spec, path = network_specs(arch)[name], tmp_path / "low.onnx"
    model = export_network(module, spec, arch, graphs=BlobCache(cache_dir() / "graphs"))
    kept = kept_names(spec)
    lower_precision(model, "fp16", kept)
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = random_inputs(spec, {"frames": 4, "groups": 2})
    given = {key: (tensor.half() if key in kept else tensor).numpy() for key, tensor in inputs.items()}
    results = session.run(None, given)
    assert [result.dtype == np.float16 for result in results] == [tensor.name in kept for tensor in spec.outputs]
    with torch.no_grad():
        expected = module(*inputs.values())
    for result, tensor in zip(results, expected, strict=True):
        assert 1e-6 < relative_error(torch.from_numpy(result), tensor) < 5e-3  # of float16, and not of float32
