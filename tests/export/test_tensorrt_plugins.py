"""Attention nodes as TensorRT's importer finds its plugins; those without one are written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import onnxruntime
import pytest

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.functions import DOMAIN, OPSET, add_functions, function_protos
from posecrafter_rt.export.tensorrt_plugins import mark_plugins, query_channels

FLOAT = onnx.TensorProto.FLOAT
MARKS = ("plugin_namespace", "plugin_version", "aot")


def three_attentions(projected: bool = True) -> ir.Model:
    """Two key-frame attentions of 32 channels, of 4 and of 2 heads, and a temporal one whose query is reshaped."""
    make = onnx.helper.make_node
    nodes = [
        make("Transpose", ["to_q"], ["weight"], perm=[1, 0]),
        make("MatMul" if projected else "Add", ["x", "weight"], ["q"]),
        make("KeyframeAttention", ["q", "q", "q"], ["a"], domain=DOMAIN, heads=4),
        make("MatMul", ["a", "weight"], ["b"]),
        make("KeyframeAttention", ["b", "b", "b"], ["c"], domain=DOMAIN, heads=2),
        make("MatMul", ["c", "weight"], ["p"]),
        make("Reshape", ["p", "clip"], ["r"]),
        make("TemporalAttention", ["r", "r", "r"], ["y"], domain=DOMAIN, heads=2),
    ]
    to_q = np.random.default_rng(0).normal(0, 0.2, (32, 32)).astype(np.float32)
    tensors = [onnx.helper.make_tensor("to_q", FLOAT, [32, 32], to_q.ravel()),
               onnx.helper.make_tensor("clip", onnx.TensorProto.INT64, [4], [1, -1, 8, 32])]  # fmt: skip
    x = onnx.helper.make_tensor_value_info("x", FLOAT, ["frames", 8, 32])
    y = onnx.helper.make_tensor_value_info("y", FLOAT, [1, "frames", 8, 32])
    typed = [onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in "qabcpr"]
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph(nodes, "three", [x], [y], tensors, value_info=typed)
    functions = [proto for proto in function_protos() if proto.name != "MaskedTemporalAttention"]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    return ir.from_proto(proto)


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN]


def run(model: ir.Model, path: Path) -> np.ndarray:
    ir.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(0, 1, (3, 8, 32)).astype(np.float32)
    result: np.ndarray = session.run(["y"], {"x": x})[0]
    return result


def test_all_are_marked_and_no_body_is_left() -> None:
    model, asked = three_attentions(), []

    def has_plugin(name: str, channels: int, heads: int) -> bool:
        asked.append((name, channels, heads))
        return True

    assert mark_plugins(model, has_plugin) == (3, 3) and not model.functions
    assert asked == [("KeyframeAttention", 32, 4), ("KeyframeAttention", 32, 2), ("TemporalAttention", 32, 2)]
    for node in attentions(model):
        assert node.attributes["plugin_namespace"].as_string() == DOMAIN  # the importer looks at nothing else
        assert node.attributes["plugin_version"].as_string() == "1" and node.attributes["aot"].as_int() == 1
        assert node.attributes["heads"].as_int() in (2, 4)


def test_of_one_operator_some_may_be_plugins_and_others_not(tmp_path: Path) -> None:
    """No body is left that would be taken in a plugin's place, and what is written out computes what it did."""
    model = three_attentions()
    expected = run(three_attentions(), tmp_path / "whole.onnx")
    assert mark_plugins(model, lambda name, channels, heads: heads == 4) == (1, 3)
    (node,) = attentions(model)
    assert node.attributes["heads"].as_int() == 4 and set(MARKS) < set(node.attributes) and not node.overload
    assert not model.functions and DOMAIN in model.opset_imports
    assert all(value.dtype is not None for node in model.graph for value in node.outputs)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for name in MARKS:
        node.attributes.pop(name)
    add_functions(model)  # for a runtime that has no plugin
    assert np.abs(run(model, tmp_path / "mixed.onnx") - expected).max() < 1e-5


def test_without_plugins_nothing_of_ours_is_left(tmp_path: Path) -> None:
    model = three_attentions()
    assert mark_plugins(model, lambda name, channels, heads: False) == (0, 3)
    assert not attentions(model) and not model.functions and DOMAIN not in model.opset_imports
    expected = run(three_attentions(), tmp_path / "whole.onnx")
    assert np.abs(run(model, tmp_path / "written_out.onnx") - expected).max() < 1e-5


def test_what_cannot_be_typed_is_told() -> None:
    model = three_attentions()
    attentions(model)[0].outputs[0].type = None  # of a plugin nothing can be inferred
    with pytest.raises(PoseCrafterError, match="^a has no known type"):
        mark_plugins(model, lambda name, channels, heads: heads == 4)


def test_a_query_that_is_no_projection_is_told() -> None:
    with pytest.raises(PoseCrafterError, match="no projection"):
        query_channels(attentions(three_attentions(projected=False))[0])
