"""Write precision into a graph: 16-bit tensors, with float32 islands where 16 bits are not enough.

Layer 4: for runtimes that take every type from the graph, such as TensorRT 11. Inputs and outputs stay float32, except
those that are only handed on.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.spec import NetworkSpec

FLOAT = ir.DataType.FLOAT
DATA_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# Sums over many elements: in float16 a variance overflows from |x| = 256 on, in bfloat16 it keeps two digits.
STATISTICS = frozenset({"ReduceMean", "ReduceSum"})
ISLANDS = STATISTICS | {"InstanceNormalization", "GroupNormalization", "LayerNormalization", "Softmax"}
# TensorRT has no transposed convolution in bfloat16, at least up to 11.2 (its issue 4829), so a build would fail.
ISLANDS_IN = {DATA_TYPES["bf16"]: frozenset({"ConvTranspose"})}
# What is computed from statistics, element by element, is computed in their precision.
FOLLOWERS = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Pow", "Expand", "Unsqueeze", "Cast", "Where"})
FLOAT_INPUTS = {"Resize": (1, 2)}  # roi and scales: ONNX requires float32, whatever is resized


def kept_names(spec: NetworkSpec) -> set[str]:
    """Return the inputs and outputs of a network that keep the type in which it computes."""
    return {tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.dtype == "kept"}


def lower_precision(model: ir.Model, precision: str, kept: Collection[str] = ()) -> None:
    """Convert a float32 model of one graph to a precision, in place; "fp32" changes nothing.

    Weights become 16-bit initialisers of the same name, so that they can still be replaced by name, unless a float32
    operator reads them. kept: inputs and outputs that become 16-bit too, see `kept_names`.
    Raises: PoseCrafterError if a weight is beyond the type's range.
    """
    if precision == "fp32":
        return
    low, graph = DATA_TYPES[precision], model.graph
    islands = _islands(graph, low)
    casts = _Casts(graph)
    _lower_weights(graph, islands, low)
    for handed in graph.inputs:
        if handed.name in kept:
            handed.dtype = low
    for node in list(graph):
        wanted = FLOAT if node in islands else low
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, low):
                continue
            is_fixed = index in FLOAT_INPUTS.get(node.op_type, ())
            node.replace_input_with(index, casts.to(value, FLOAT if is_fixed else wanted))
        _type_outputs(node, wanted)
    for index, output in enumerate(graph.outputs):
        wanted = low if output.name in kept else FLOAT
        if output.dtype in (FLOAT, low) and output.dtype != wanted:
            graph.outputs[index] = casts.output(output, wanted)


def _islands(graph: ir.Graph, low: ir.DataType) -> set[ir.Node]:
    """Return the nodes that compute in float32."""
    kinds = ISLANDS | ISLANDS_IN.get(low, frozenset())
    islands: set[ir.Node] = set()
    statistics: set[ir.Node] = set()
    for node in graph:  # in topological order
        producers = {value.producer() for value in node.inputs if value is not None}
        if (
            node.op_type in STATISTICS
            or _asks_for_float(node)
            or (node.op_type in FOLLOWERS and producers & statistics)
        ):
            statistics.add(node)
        if node.op_type in kinds or node in statistics or node.op_type == "Constant":
            islands.add(node)
    return islands


def lift_constants(graph: ir.Graph) -> None:
    """Turn constant floats into initialisers: a runtime may join one to a weight, and a refit must then name it."""
    for node in list(graph):
        tensor = ir.convenience.get_const_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is None or tensor.dtype not in (FLOAT, *DATA_TYPES.values()) or node.outputs[0].is_graph_output():
            continue
        given = node.outputs[0]
        lifted = ir.Value(name=given.name, shape=given.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        given.replace_all_uses_with(lifted)
        graph.remove(node, safe=True)
        graph.register_initializer(lifted)


def _asks_for_float(node: ir.Node) -> bool:
    """Return whether a node casts float32 to float32, by which attention's bodies mark what must stay float32."""
    is_cast = node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT
    return is_cast and node.inputs[0] is not None and node.inputs[0].dtype == FLOAT


def _lower_weights(graph: ir.Graph, islands: set[ir.Node], low: ir.DataType) -> None:
    for value in graph.initializers.values():
        uses = [(use.node, use.idx) for use in value.uses()]
        in_float = any(node in islands or index in FLOAT_INPUTS.get(node.op_type, ()) for node, index in uses)
        if value.dtype != FLOAT or in_float or value.const_value is None:
            continue
        with np.errstate(over="ignore"):
            lowered = value.const_value.numpy().astype(low.numpy())
        if not np.isfinite(lowered.astype(np.float32)).all():
            raise PoseCrafterError(f"{value.name} does not fit {low.name}", "build the engine with --precision bf16")
        value.const_value = ir.Tensor(lowered, dtype=low, name=value.name)
        value.dtype = low


def _type_outputs(node: ir.Node, wanted: ir.DataType) -> None:
    for value in node.outputs:
        if value.dtype == FLOAT:
            value.dtype = wanted
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))


class _Casts:
    """Inserts Cast nodes behind a value's producer, one for each value and type."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def to(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in a type."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.made:
            cast = self._cast(value, dtype)
            cast.name = f"{value.name}.{dtype.name.lower()}"
            self.made[value, dtype] = cast
        return self.made[value, dtype]

    def output(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a graph's output in a type, under the value's name."""
        cast = self._cast(value, dtype)
        cast.name, value.name = value.name, f"{value.name}.inner"
        return cast

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.Node("", "Cast", [value], {"to": ir.AttrInt64("to", int(dtype))}, num_outputs=1)
        cast = node.outputs[0]
        cast.dtype, cast.shape = dtype, value.shape
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return cast
