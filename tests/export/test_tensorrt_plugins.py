"""Attention nodes as TensorRT's importer finds its plugins, bodies only where there is none."""

from __future__ import annotations

import onnx
import onnx.helper
import onnx_ir as ir
import pytest

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.functions import DOMAIN, OPSET, function_protos
from posecrafter_rt.export.tensorrt_plugins import mark_plugins, query_channels

FLOAT = onnx.TensorProto.FLOAT


def two_attentions(projected: bool = True) -> ir.Model:
    """A key-frame attention of 32 channels and a temporal one whose query is reshaped."""
    make = onnx.helper.make_node
    nodes = [
        make("Transpose", ["to_q"], ["weight"], perm=[1, 0]),
        make("MatMul" if projected else "Add", ["x", "weight"], ["q"]),
        make("KeyframeAttention", ["q", "q", "q"], ["a"], domain=DOMAIN, heads=4),
        make("MatMul", ["a", "weight"], ["p"]),
        make("Reshape", ["p", "clip"], ["r"]),
        make("TemporalAttention", ["r", "r", "r"], ["y"], domain=DOMAIN, heads=2),
    ]
    tensors = [onnx.helper.make_tensor("to_q", FLOAT, [32, 32], [0.0] * 1024),
               onnx.helper.make_tensor("clip", onnx.TensorProto.INT64, [4], [1, -1, 8, 32])]  # fmt: skip
    x = onnx.helper.make_tensor_value_info("x", FLOAT, ["frames", 8, 32])
    y = onnx.helper.make_tensor_value_info("y", FLOAT, [1, "frames", 8, 32])
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    graph = onnx.helper.make_graph(nodes, "two", [x], [y], tensors)
    proto = onnx.helper.make_model(graph, opset_imports=opsets, functions=list(function_protos()), ir_version=10)
    return ir.from_proto(proto)


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN]


def test_all_are_marked_and_no_body_is_left() -> None:
    model, asked = two_attentions(), []

    def has_plugin(name: str, channels: int, heads: int) -> bool:
        asked.append((name, channels, heads))
        return True

    assert mark_plugins(model, has_plugin) == 2 and not model.functions
    assert asked == [("KeyframeAttention", 32, 4), ("TemporalAttention", 32, 2)]
    for node in attentions(model):
        assert node.attributes["plugin_namespace"].as_string() == DOMAIN  # the importer looks at nothing else
        assert node.attributes["plugin_version"].as_string() == "1" and node.attributes["aot"].as_int() == 1
        assert node.attributes["heads"].as_int() in (2, 4)


def test_what_has_no_plugin_keeps_its_body() -> None:
    model = two_attentions()
    assert mark_plugins(model, lambda name, channels, heads: name == "KeyframeAttention") == 1
    assert [identifier[1] for identifier in model.functions] == ["TemporalAttention"]
    assert ["plugin_namespace" in node.attributes for node in attentions(model)] == [True, False]
    onnx.checker.check_model(ir.to_proto(model))  # with the attributes and the body


def test_a_query_that_is_no_projection_is_told() -> None:
    with pytest.raises(PoseCrafterError, match="no projection"):
        query_channels(attentions(two_attentions(projected=False))[0])
