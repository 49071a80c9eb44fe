"""Attention nodes that TensorRT's importer takes for plugins; where there is no plugin, the body stays.

Layer 4: the importer goes by a node's name and attributes and ignores its domain; a node without `plugin_namespace` is
imported through its model-local function.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.functions import DOMAIN

PASSED_THROUGH = ("Reshape", "Cast")  # between a projection and its attention: they keep the last dimension

HasPlugin = Callable[[str, int, int], bool]  # (operator's name, channels, heads)


def mark_plugins(model: ir.Model, has_plugin: HasPlugin) -> int:
    """Give attention nodes what makes them plugins, and drop function bodies that are no longer called; in place.

    Returns: how many were marked.
    """
    marked = 0
    for node in model.graph:
        if node.domain == DOMAIN and has_plugin(node.op_type, query_channels(node), node.attributes["heads"].as_int()):
            for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", "1"), ("aot", 1)):
                node.attributes[name] = ir.convenience.convert_attribute(name, value)
            marked += 1
    called = {node.op_identifier() for node in model.graph if "plugin_namespace" not in node.attributes}
    for identifier in [identifier for identifier in model.functions if identifier not in called]:
        del model.functions[identifier]
    ir_passes.RemoveUnusedOpsetsPass()(model)
    return marked


def query_channels(node: ir.Node) -> int:
    """The channels of an attention's query, from the weight of its projection."""
    value = node.inputs[0]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in PASSED_THROUGH:
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if producer is not None and producer.op_type == "MatMul":
        weight = producer.inputs[1]
        transpose = weight.producer() if weight is not None else None
        if transpose is not None and transpose.op_type == "Transpose":
            weight = transpose.inputs[0]
        channels = weight.shape[0 if transpose is not None else -1] if weight is not None and weight.shape else None
        if isinstance(channels, int):
            return channels
    raise PoseCrafterError(f"{node.op_type} {node.name} has a query that is no projection", "report it")
