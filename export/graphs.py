"""Exported graphs without weights, which later checkpoints of the same architecture reuse.

Layer 4: tracing takes most of a build's time, and it depends on no weight, because none is folded into anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir
from posecrafter_rt.machine import library_versions, source_digest
from posecrafter_rt.spec import Architecture, NetworkSpec

TRACED_BY = ("torch", "diffusers", "transformers")
LIBRARIES = (*TRACED_BY, "onnx", "onnx-ir", "onnxscript")
SOURCES = ("models", "ops", "export")  # their code determines the graphs


def graph_cache() -> BlobCache:
    """Return the cache of the networks that this user has traced, for any engine."""
    return BlobCache(cache_dir() / "graphs")


def graph_key(
    module: nn.Module, spec: NetworkSpec, arch: Architecture, libraries: Sequence[str] = LIBRARIES
) -> dict[str, Any]:
    """Return all that a network's graph depends on: structure, configurations, code and versions, but no weight.

    libraries: what it is made by; TRACED_BY for one that is not exported to ONNX.
    """
    return {
        "network": asdict(spec),
        "size_multiple": arch.size_multiple,
        "modules": str(module),
        "parameters": {name: list(parameter.shape) for name, parameter in module.named_parameters()},
        "configurations": {name: _configuration(child) for name, child in module.named_children()},
        "libraries": library_versions(libraries),
        "sources": source_digest(*SOURCES),
    }


def _configuration(module: nn.Module) -> dict[str, str]:
    config: Any = getattr(module, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    named = {key: repr(value) for key, value in values.items() if not key.startswith("_")}  # without paths
    return {**named, "norm_scope": str(getattr(module, "norm_scope", None))}


def detach_weights(model: ir.Model, parameters: Iterable[str]) -> None:
    """Turn those of a graph's initialisers that are parameters into inputs without a value, in place."""
    graph = model.graph
    for name in parameters:
        if name in graph.initializers:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)


def attach_weights(model: ir.Model, module: nn.Module) -> None:
    """Undo `detach_weights`, in place, with a module's float32 parameters; their memory is shared."""
    graph, parameters = model.graph, dict(module.named_parameters())
    for value in [value for value in graph.inputs if value.name in parameters]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(parameters[str(value.name)].detach().numpy(), name=value.name)
        graph.register_initializer(value)


def to_bytes(model: ir.Model) -> bytes:
    """Serialise a model without weights as one ONNX message."""
    return ir.to_proto(model).SerializeToString()


def from_bytes(blob: bytes) -> ir.Model:
    """The inverse of `to_bytes`."""
    return ir.from_proto(onnx.ModelProto.FromString(blob))
