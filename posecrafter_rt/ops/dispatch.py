"""How operators become `torch.library` ops: seen through by compilers, kept whole by exporters.

Layer 2: shared by the attentions; registered by `ops.traced`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.ops.registry import needs_grad

COMPILER_OPS: dict[str, Callable[..., Any]] = {}  # by their names, what `compiler_op` was given


def compiler_op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Name what `posecrafter::<name>` does: a node in an exported program, traced through by AOTDispatcher.

    torch.export keeps the call (so that an ONNX export can translate it); Inductor and AOTInductor replace it by what
    the function does on that device, reference arithmetic or a Triton launch, and need no Python afterwards.
    """

    def remember(function: Callable[..., Any]) -> Callable[..., Any]:
        COMPILER_OPS[name] = function
        return function

    return remember


def is_traced_as_op(backend: str | None, *tensors: Tensor) -> bool:
    """Whether a call is to appear as one node: under export always, under torch.compile where no gradient is needed."""
    if backend is not None or not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_exporting() or not needs_grad(*tensors)
