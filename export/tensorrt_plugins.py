"""Mark attention nodes as plugins for TensorRT's importer, and write out those that have no plugin.

Layer 4: the importer recognises a plugin by a node's name and its `plugin_…` attributes. Its versions differ in whether
a function's body or a plugin of the same name comes first. So a prepared model has no functions: an attention is either
a plugin or standard operators.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.export.functions import DOMAIN

PASSED_THROUGH = ("Reshape", "Cast")  # between a projection and its attention: they keep the last dimension
AS_PLUGIN = "plugin"  # no function has this overload, so these nodes are not inlined

HasPlugin = Callable[[str, int, int], bool]  # (operator's name, channels, heads)


def mark_plugins(model: ir.Model, has_plugin: HasPlugin) -> tuple[int, int]:
    """Mark attention nodes that have a plugin, and write out the others by their functions' bodies; in place.

    Afterwards every value has an element type.
    Returns: how many attentions are plugins now, and how many there were.
    """
    attentions = [node for node in model.graph if node.domain == DOMAIN]
    marked = [node for node in attentions
              if has_plugin(node.op_type, query_channels(node), node.attributes["heads"].as_int())]  # fmt: skip
    for node in marked:
        for name, value in (("plugin_namespace", DOMAIN), ("plugin_version", "1"), ("aot", 1)):
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        node.overload = AS_PLUGIN
    ir_passes.InlinePass()(model)
    for node in marked:
        node.overload = ""
    model.functions.clear()
    ir_passes.RemoveUnusedOpsetsPass()(model)
    _add_types(model)
    return len(marked), len(attentions)


def _add_types(model: ir.Model) -> None:
    """Infer missing element types, in place. Values of functions' bodies have none."""
    if not _untyped(model):
        return
    # Not strict, because nothing can be inferred for a plugin.
    ir_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    if untyped := _untyped(model):
        raise PoseCrafterError(f"{untyped[0]} has no known type once attention is written out", "report it")


def _untyped(model: ir.Model) -> list[str]:
    return [str(value.name) for node in model.graph for value in node.outputs if value.name and value.dtype is None]


def query_channels(node: ir.Node) -> int:
    """Return the channels of an attention's query, read from the weight of its projection."""
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
