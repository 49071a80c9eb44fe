"""How operators become `torch.library` ops: seen through by compilers, kept whole by exporters.

Layer 2: shared by the attentions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.ops.registry import needs_grad


def compiler_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register `posecrafter::<name>`: a node in an exported program, traced through by AOTDispatcher.

    torch.export keeps the call (so that an ONNX export can translate it); Inductor and AOTInductor replace it by what
    the function does on that device, reference arithmetic or a Triton launch, and need no Python afterwards.
    """

    def register(function: Callable[..., Any]) -> Any:
        log = logging.getLogger("torch._library.triton")
        level = log.level
        log.setLevel(logging.ERROR)  # torch warns at registration where Triton is absent; here that is no fault
        try:
            op = torch.library.triton_op(f"posecrafter::{name}", mutates_args=())(function)
        finally:
            log.setLevel(level)
        op.register_fake(_like_queries)
        return op

    return register


def _like_queries(q: Tensor, *others: Any) -> Tensor:
    """What an attention gives as far as a tracer asks. Its own arithmetic would tell, too, in seconds a network: every
    reshape of dimensions that are symbols is proved.
    """
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def is_traced_as_op(backend: str | None, *tensors: Tensor) -> bool:
    """Whether a call is to appear as one node: under export always, under torch.compile where no gradient is needed."""
    if backend is not None or not torch.compiler.is_compiling():
        return False
    return torch.compiler.is_exporting() or not needs_grad(*tensors)
