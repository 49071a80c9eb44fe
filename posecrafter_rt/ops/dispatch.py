"""Make operators `torch.library` ops, which compilers trace through and exporters keep whole.

Layer 2: shared by the attentions; registered by `ops.traced`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.ops.registry import needs_grad

COMPILER_OPS: dict[str, Callable[..., Any]] = {}  # the functions given to `compiler_op`, by name


def compiler_op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the function of `posecrafter::<name>`: a node in an exported program, traced through by AOTDispatcher.

    torch.export keeps the call, so that an ONNX export can translate it. Inductor and AOTInductor replace it by what
    the function does on that device (reference arithmetic or a Triton launch) and need no Python afterwards.
    """

    def remember(function: Callable[..., Any]) -> Callable[..., Any]:
        COMPILER_OPS[name] = function
        return function

    return remember


def is_traced_as_op(backend: str | None, *tensors: Tensor) -> bool:
    """Return whether a call becomes one node: always under export; under torch.compile if no gradient is needed."""
    if backend is not None or not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_exporting() or not needs_grad(*tensors)
