"""The `openvino` backend: the exported ONNX, compiled for each concrete shape; the default on a CPU.

Layer 4.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posecrafter_rt.engines.base import Engine, Precision, Progress, checked_inputs, fitting_weights
from posecrafter_rt.machine import cpu_has_bf16
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import Architecture, NetworkSpec, network_specs

if TYPE_CHECKING:
    import openvino

HINTS = {"fp32": "f32", "bf16": "bf16"}
KEPT_SHAPES = 4


class OpenVinoEngine:
    """One network; each new input shape is compiled once, statically, and kept.

    Never one model for changing shapes: with dynamic shapes OpenVINO 2026.4 returns garbage for temporal attention when
    one frame is followed by sixteen or more.
    """

    def __init__(self, core: openvino.Core, path: Path, spec: NetworkSpec, properties: dict[str, str]) -> None:
        self.spec = spec
        self._core, self._path, self._properties = core, path, properties
        self._requests: OrderedDict[tuple[torch.Size, ...], Any] = OrderedDict()
        self._swapped: dict[str, np.ndarray] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        tensors = checked_inputs(self.spec, inputs)
        request = self._request(tuple(tensor.shape for tensor in tensors))
        import openvino

        for expected, tensor in zip(self.spec.inputs, tensors, strict=True):
            request.set_tensor(expected.name, openvino.Tensor(tensor.detach().numpy(), shared_memory=True))
        request.infer()
        return {out.name: torch.from_numpy(request.get_tensor(out.name).data) for out in self.spec.outputs}

    def _request(self, shapes: tuple[torch.Size, ...]) -> Any:
        if shapes not in self._requests:
            model = self._read()
            model.reshape({spec.name: list(shape) for spec, shape in zip(self.spec.inputs, shapes, strict=True)})
            compiled = self._core.compile_model(model, "CPU", self._properties)
            self._requests[shapes] = compiled.create_infer_request()
            if len(self._requests) > KEPT_SHAPES:
                self._requests.popitem(last=False)
        self._requests.move_to_end(shapes)
        return self._requests[shapes]

    def _read(self) -> Any:
        model = self._core.read_model(self._path)
        if self._swapped:
            from openvino import opset13

            for name, node in _constants(model).items():
                if name in self._swapped:
                    constant = opset13.constant(self._swapped[name])
                    constant.set_friendly_name(name)
                    node.output(0).replace(constant.output(0))
        return model

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """See `Engine.swap_weights`; what was compiled is compiled anew at the next call."""
        shapes = {name: tuple(node.shape) for name, node in _constants(self._core.read_model(self._path)).items()}
        fitting = fitting_weights(shapes, tensors)
        self._swapped |= {name: tensor.detach().float().numpy().copy() for name, tensor in fitting.items()}
        self._requests.clear()
        return set(fitting)


def _constants(model: Any) -> dict[str, Any]:
    """The network's weights by their parameter names."""
    return {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}


class OpenVinoBackend:
    """OpenVINO on the CPU, through ONNX."""

    name = "openvino"

    def unsupported_reason(self, precision: Precision) -> str | None:
        """Why OpenVINO cannot run here."""
        for package in ("openvino", "onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install {package}"
        if precision not in HINTS:
            return f"it has no {precision} on a CPU; use fp32 or bf16"
        if precision == "bf16" and not cpu_has_bf16():
            return "this processor has no bf16; use fp32"
        return None

    def build(
        self, model: PoseModel, arch: Architecture, folder: Path, precision: Precision, progress: Progress
    ) -> None:
        """Write every network as ONNX in float32; the precision is chosen when it is compiled."""
        from posecrafter_rt.export.onnx import export_network, save_model

        specs = network_specs(arch)
        for name, network in model.to(torch.float32).networks().items():
            progress(f"exporting {name}")
            save_model(export_network(network, specs[name], arch, inline=True), folder / f"{name}.onnx")

    def load(self, networks_folder: Path, arch: Architecture, precision: Precision, cache: Path) -> dict[str, Engine]:
        """Nothing is compiled before a network is first called."""
        import openvino

        properties = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "CPU_RUNTIME_CACHE_CAPACITY": "0",  # the second guard against the fault that the class describes
            "CACHE_DIR": str(cache),
        }
        core = openvino.Core()
        return {
            name: OpenVinoEngine(core, networks_folder / f"{name}.onnx", spec, properties)
            for name, spec in network_specs(arch).items()
        }
