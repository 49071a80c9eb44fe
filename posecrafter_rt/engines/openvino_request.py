"""A compiled network as it is called: its inputs read where they lie, its outputs in memory of its own.

Layer 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.engines.openvino_operations import packing_from
from posecrafter_rt.export.blob_cache import MappedBlob
from posecrafter_rt.spec import NetworkSpec, TensorSpec


class Request:
    """What one compiled model computes for tensors of its shapes."""

    def __init__(self, compiled: Any, spec: NetworkSpec, blob: MappedBlob | None) -> None:
        """spec: names inputs and outputs, in any order of the model's. blob: where its weights lie, if they lie in a file."""
        self._request, self._blob, self._is_new = compiled.create_infer_request(), blob, True
        self._inputs = _places(compiled.inputs, spec.inputs)
        self._bound: list[tuple[int, torch.dtype] | None] = [None] * len(self._inputs)
        self._outputs = {
            out.name: torch.from_numpy(self._request.get_output_tensor(place).data)
            for out, place in zip(spec.outputs, _places(compiled.outputs, spec.outputs), strict=True)
        }

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """tensors: contiguous, in the spec's order. Returns views, which live on but are overwritten by the next call."""
        import openvino

        for index, tensor in enumerate(tensors):
            lies_at = tensor.data_ptr(), tensor.dtype
            if self._bound[index] != lies_at:  # most of a stream's lie where they lay
                given = openvino.Tensor(tensor.detach().numpy(), shared_memory=True)
                self._bound[index] = None  # or an interrupt between the two would leave what is not so
                self._request.set_input_tensor(self._inputs[index], given)
                self._bound[index] = lies_at
        # At the first time operations of ours pack their weights, which are not read again.
        with nullcontext() if self._blob is None or not self._is_new else packing_from(self._blob):
            self._request.infer(share_outputs=True)  # else it returns copies of them, which nobody asks for
        self._is_new = False
        return dict(self._outputs)


def _places(ports: Sequence[Any], specs: Sequence[TensorSpec]) -> list[int]:
    """Where among a compiled network's ports those are that the specs name; by name each would be searched for in each call."""
    return [next(index for index, port in enumerate(ports) if spec.name in port.get_names()) for spec in specs]
