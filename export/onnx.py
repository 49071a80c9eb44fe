"""Export every network as an ONNX model, with the free dimensions of its spec and weights under their own names.

Layer 4: torch.onnx.export(dynamo=True), then constant folding that spares the weights, so that each can be replaced.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from onnxscript import optimizer
from torch import nn
from torch.export import ExportedProgram

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.errors import first_line
from posecrafter_rt.export.functions import OPSET, add_functions, translation_table
from posecrafter_rt.export.graphs import attach_weights, detach_weights, from_bytes, graph_key, to_bytes
from posecrafter_rt.export.trace import quiet, trace
from posecrafter_rt.spec import Architecture, NetworkSpec

# The arguments of aten.conv_transpose2d and their defaults.
CONV_TRANSPOSE: dict[str, Any] = {"input": None, "weight": None, "bias": None, "stride": (1, 1), "padding": (0, 0),
                                  "output_padding": (0, 0), "groups": 1, "dilation": (1, 1)}  # fmt: skip
EXTERNAL_BYTES = 1_500_000_000  # a protobuf message must stay below 2 GiB; larger weights go to a file beside it

log = logging.getLogger(__name__)


def export_network(
    module: nn.Module, spec: NetworkSpec, arch: Architecture, *, inline: bool = False, graphs: BlobCache | None = None
) -> ir.Model:
    """Export one network of `models.networks` as ONNX.

    Args: module: float32, in evaluation mode, folded; its forward takes `spec.inputs` in order. An architecture with a
        size is traced faster: fewer dimensions stay symbols.
        inline: whether attention is written out in standard operators instead of `posecrafter::` nodes with bodies.
        graphs: keeps traced graphs, so that another checkpoint of the same architecture is not traced again.
    Returns: the model, which shares the weights of `module`. Every parameter that it uses is an initialiser of that
        parameter's name. Inputs, outputs and their free dimensions have the names of `spec`.
    """
    model = export_graph(module, spec, arch, graphs)
    if inline:
        ir_passes.InlinePass()(model)
        ir_passes.RemoveUnusedOpsetsPass()(model)
    attach_weights(model, module)
    return model


def export_graph(module: nn.Module, spec: NetworkSpec, arch: Architecture, graphs: BlobCache | None) -> ir.Model:
    """Return the model of `export_network` before weights are attached: from `graphs`, or traced and kept there."""
    key = graph_key(module, spec, arch)
    blob = graphs.load(key) if graphs is not None else None
    if blob is not None:
        return from_bytes(blob)
    model = _trace(module, spec, arch)
    _name_dimensions(model, spec)
    ir_passes.ClearMetadataAndDocStringPass()(model)  # removes stack traces of the exporting machine
    detach_weights(model, [name for name, _ in module.named_parameters()])
    if graphs is not None:
        graphs.save(key, to_bytes(model))
    return model


def _trace(module: nn.Module, spec: NetworkSpec, arch: Architecture) -> ir.Model:
    try:
        model = _translate_as_it_is(trace(module, spec, arch), spec)
    except torch.onnx.OnnxExporterError as error:  # other diffusers or transformers may use untranslated operators
        log.info("%s is traced twice: %s", spec.name, first_line(error.__cause__ or error))
        model = _run_exporter(trace(module, spec, arch), spec)  # again, because the first try has changed its program
    _simplify(model, {name for name, _ in module.named_parameters()})
    add_functions(model)
    return model


def _translate_as_it_is(program: ExportedProgram, spec: NetworkSpec) -> ir.Model:
    """Run torch.onnx.export without decompositions, for which it would trace everything again: half of its time.

    Raises: torch.onnx.OnnxExporterError if an operator has no translation of its own, such as any that writes in place.
    """
    _replace_untranslated(program)
    program.run_decompositions = lambda *_: program
    return _run_exporter(program, spec)


def _run_exporter(program: ExportedProgram, spec: NetworkSpec) -> ir.Model:
    with torch.no_grad(), quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            custom_translation_table=translation_table(),
            optimize=False,  # it would fold transposed weights into constants without a name
            verbose=False,
        )
    assert exported is not None
    return exported.model


def _replace_untranslated(program: ExportedProgram) -> None:
    """Replace, in place, operators that torch.onnx.export only knows in decomposed form by that form."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target is aten.conv_transpose2d.input:
            given = dict(zip(CONV_TRANSPOSE, node.args, strict=False)) | node.kwargs
            x, weight, bias, stride, padding, output_padding, groups, dilation = (CONV_TRANSPOSE | given).values()
            node.args = (x, weight, bias, stride, padding, dilation, True, output_padding, groups)
            node.target, node.kwargs = aten.convolution.default, {}
        elif node.target in (aten.to.dtype, aten.to.device):
            dtype = node.args[1 if node.target is aten.to.dtype else 2]
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": dtype}
    program.graph_module.recompile()


def save_model(model: ir.Model, path: Path) -> None:
    """Write `path`, and beside it `path`.data if the weights are too large for one message."""
    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    ir.save(model, path, external_data=f"{path.name}.data" if num_bytes > EXTERNAL_BYTES else None)


def _simplify(model: ir.Model, parameters: set[str]) -> None:
    """Fold constants in place, but leave every parameter in use unchanged and under its name.

    The optimiser's ready-made pipeline does not: it merges parameters of equal value, such as attn_temp and the attn1
    that it was copied from. A later replacement by name would then miss one or change both.
    """

    def in_use() -> set[str]:
        return {name for name, value in model.graph.initializers.items() if name in parameters and value.uses()}

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in parameters for value in node.inputs) else None

    before = in_use()
    optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    for simplify in (ir_passes.CommonSubexpressionEliminationPass(), ir_passes.RemoveUnusedNodesPass()):
        simplify(model)
    assert in_use() == before, f"lost in the export: {sorted(before - in_use())}"


def _name_dimensions(model: ir.Model, spec: NetworkSpec) -> None:
    """Write the spec's dimensions on inputs and outputs, and drop the tracer's own symbols everywhere else."""
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape(tensor.dims)
