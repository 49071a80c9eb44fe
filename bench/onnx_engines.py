"""Engines that the package does not use, for comparison: ONNX Runtime, OpenVINO with free shapes or with 8-bit weights.

Bench: imported by engines.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from openvino import opset13
from torch import Tensor

from posecrafter_rt.engines.openvino import OpenVinoBackend
from posecrafter_rt.export.onnx import export_network, save_model
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import Architecture, NetworkSpec, network_specs

Network = Callable[..., dict[str, Tensor]]
DENOISERS = ("controlnet", "unet")
STATIC = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


class OnnxRuntime:
    """ONNX Runtime on the CPU. is_static: one session per shape; int8: products have 8-bit weights and activations."""

    def __init__(self, is_static: bool = False, int8: bool = False) -> None:
        self.is_static, self.int8 = is_static, int8

    def build(self, model: PoseModel, arch: Architecture, folder: Path) -> None:
        """Write the two denoisers as ONNX."""
        networks, specs = model.networks(), network_specs(arch)
        for name in DENOISERS:
            path = folder / f"{name}.onnx"
            exported = export_network(networks[name], specs[name], arch, inline=True)
            save_model(exported, path)
            if self.int8:
                has_data = path.with_name(f"{path.name}.data").exists()
                quantize_dynamic(path, path.with_name(f"{name}-int8.onnx"), weight_type=QuantType.QInt8,
                                 op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                                 use_external_data_format=has_data)  # fmt: skip

    def load(self, folder: Path, arch: Architecture) -> dict[str, Network]:
        """The denoisers, ready to be called."""
        specs = network_specs(arch)
        return {name: self._network(folder / f"{name}{'-int8' if self.int8 else ''}.onnx", specs[name])
                for name in DENOISERS}  # fmt: skip

    def _network(self, path: Path, spec: NetworkSpec) -> Network:
        sessions: dict[tuple[tuple[str, int], ...], Any] = {}

        def call(**inputs: Tensor) -> dict[str, Tensor]:
            sizes = free_sizes(spec, inputs) if self.is_static else {}
            key = tuple(sizes.items())
            if key not in sessions:
                sessions[key] = new_session(path, sizes)
            results = sessions[key].run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            return {out.name: torch.from_numpy(result) for out, result in zip(spec.outputs, results, strict=True)}

        return call


class FreeOpenVino:
    """OpenVINO with one compiled model for all shapes. `engines.openvino` avoids that: results can be garbage."""

    def build(self, model: PoseModel, arch: Architecture, folder: Path) -> None:
        """Write the networks as the backend does."""
        OpenVinoBackend().build(model, arch, folder, "fp32", lambda stage: None)

    def load(self, folder: Path, arch: Architecture) -> dict[str, Network]:
        """The denoisers, ready to be called."""
        core, specs = openvino.Core(), network_specs(arch)

        def network(name: str) -> Network:
            compiled_for = self._compiler(core, folder / f"{name}.xml")

            def call(**inputs: Tensor) -> dict[str, Tensor]:
                results = compiled_for(inputs)({key: tensor.numpy() for key, tensor in inputs.items()})
                return {out.name: torch.from_numpy(np.array(results[out.name])) for out in specs[name].outputs}

            return call

        return {name: network(name) for name in DENOISERS}

    def _compiler(self, core: openvino.Core, path: Path) -> Callable[[Mapping[str, Tensor]], Any]:
        compiled = core.compile_model(core.read_model(path), "CPU", {**STATIC, "CPU_RUNTIME_CACHE_CAPACITY": 0})
        return lambda inputs: compiled


class EightBitOpenVino(FreeOpenVino):
    """OpenVINO in float32, with 8-bit weights of products, one scale per row; activations are not quantised.

    It is compiled for each shape at its first call.
    """

    def _compiler(self, core: openvino.Core, path: Path) -> Callable[[Mapping[str, Tensor]], Any]:
        compiled: dict[tuple[torch.Size, ...], Any] = {}

        def compiled_for(inputs: Mapping[str, Tensor]) -> Any:
            key = tuple(tensor.shape for tensor in inputs.values())
            if key not in compiled:
                model = core.read_model(path)
                model.reshape({name: list(tensor.shape) for name, tensor in inputs.items()})
                quantise_products(model)
                compiled[key] = core.compile_model(model, "CPU", STATIC)
            return compiled[key]

        return compiled_for


def quantise_products(model: openvino.Model) -> int:
    """Replace the constant matrices of a model's products by 8-bit values times a scale per row. Returns: how many."""
    matrices = [node.input_value(1).get_node() for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    constants = [node for node in matrices if node.get_type_name() == "Constant" and len(node.shape) == 2]
    for node in constants:
        weight = np.asarray(node.data, np.float32)
        scale = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-12) / 127
        whole = opset13.convert(opset13.constant(np.rint(weight / scale).astype(np.int8)), "f32")
        node.output(0).replace(opset13.multiply(whole, opset13.constant(scale)).output(0))
    return len(constants)


ENGINES: Mapping[str, OnnxRuntime | FreeOpenVino] = {
    "openvino fp32, int8 weights": EightBitOpenVino(),
    "openvino fp32, free shapes": FreeOpenVino(),
    "onnxruntime fp32": OnnxRuntime(is_static=True),
    "onnxruntime fp32, free shapes": OnnxRuntime(),
    "onnxruntime int8": OnnxRuntime(int8=True),
}


def free_sizes(spec: NetworkSpec, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sizes of the free dimensions in these inputs."""
    return {dim: size for tensor in spec.inputs for dim, size in zip(tensor.dims, inputs[tensor.name].shape, strict=True)
            if isinstance(dim, str)}  # fmt: skip


def new_session(path: Path, sizes: Mapping[str, int]) -> Any:
    """Create a session with as many threads as torch has, its free dimensions fixed to `sizes`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
