"""When imported, register the functions of `dispatch.compiler_op` as `torch.ops.posecrafter.*`.

Layer 2: a module of its own, because registering makes torch import Inductor, which takes seconds and a hundred
megabytes. Only tracing needs that.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.ops.dispatch import COMPILER_OPS


def _fake(q: Tensor, *others: Any) -> Tensor:
    """Return an attention's output as a tracer needs it: shape, dtype and layout.

    Tracing the arithmetic itself would do too, but takes seconds per network: each reshape of symbolic sizes is proved.
    """
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _register() -> None:
    log = logging.getLogger("torch._library.triton")
    level = log.level
    log.setLevel(logging.ERROR)  # torch warns if Triton is absent, which is no fault here
    try:
        for name, function in COMPILER_OPS.items():
            torch.library.triton_op(f"posecrafter::{name}", mutates_args=())(function).register_fake(_fake)
    finally:
        log.setLevel(level)


_register()
