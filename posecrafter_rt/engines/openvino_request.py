"""A compiled network, ready to be called: it reads inputs in place and has outputs in memory of its own.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.blob_cache import MappedBlob
from posecrafter_rt.engines.openvino_operations import packing_from
from posecrafter_rt.spec import NetworkSpec, TensorSpec


class Request:
    """Runs one compiled model for tensors of its shapes."""

    def __init__(self, compiled: Any, spec: NetworkSpec, blob: MappedBlob | None) -> None:
        """spec: names inputs and outputs; the model may have another order. blob: the file of its weights, if any."""
        self._request, self._blob, self._is_new = compiled.create_infer_request(), blob, True
        self._inputs = _places(compiled.inputs, spec.inputs)
        self._bound: list[tuple[int, torch.dtype] | None] = [None] * len(self._inputs)
        self._outputs = {
            out.name: torch.from_numpy(self._request.get_output_tensor(place).data)
            for out, place in zip(spec.outputs, _places(compiled.outputs, spec.outputs), strict=True)
        }

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run. tensors: contiguous, in the spec's order. Returns views that live on; the next call overwrites them."""
        import openvino

        for index, tensor in enumerate(tensors):
            lies_at = tensor.data_ptr(), tensor.dtype
            if self._bound[index] != lies_at:  # most of a stream's tensors stay where they are
                given = openvino.Tensor(tensor.detach().numpy(), shared_memory=True)
                self._bound[index] = None  # so that an interrupt in between leaves no wrong entry
                self._request.set_input_tensor(self._inputs[index], given)
                self._bound[index] = lies_at
        # In the first run our operations pack their weights, which are not read again.
        with nullcontext() if self._blob is None or not self._is_new else packing_from(self._blob):
            self._request.infer(share_outputs=True)  # else it returns copies of the outputs, which nobody needs
        self._is_new = False
        return dict(self._outputs)


def _places(ports: Sequence[Any], specs: Sequence[TensorSpec]) -> list[int]:
    """Return the specs' places among a compiled network's ports, so that calls need not search for names."""
    return [next(index for index, port in enumerate(ports) if spec.name in port.get_names()) for spec in specs]
