"""Importing it registers what `dispatch.compiler_op` names, as `torch.ops.posecrafter.*`.

Layer 2: by itself, since to register them torch imports Inductor, seconds and a hundred megabytes that only tracing is to
cost.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.ops.dispatch import COMPILER_OPS


def _fake(q: Tensor, *others: Any) -> Tensor:
    """What an attention gives as far as a tracer asks.

    Its own arithmetic would tell, too, in seconds a network: every reshape of dimensions that are symbols is proved.
    """
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _register() -> None:
    log = logging.getLogger("torch._library.triton")
    level = log.level
    log.setLevel(logging.ERROR)  # torch warns at registration where Triton is absent; here that is no fault
    try:
        for name, function in COMPILER_OPS.items():
            torch.library.triton_op(f"posecrafter::{name}", mutates_args=())(function).register_fake(_fake)
    finally:
        log.setLevel(level)


_register()
