"""xformers' memory-efficient attention on CUDA: the only fast path here that has a gradient, for tuning.

Layer 2: xformers is imported when it is first run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from posecrafter_rt.errors import first_line, is_out_of_memory


def keyframe_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `ops.keyframe_attention`: each group's F frames are one long query sequence; K and V are not expanded."""
    from xformers.ops import memory_efficient_attention

    frames, tokens, channels = q.shape

    def heads_last(tensor: Tensor) -> Tensor:  # (G, n, heads, d), as xformers takes them
        return tensor.reshape(k.shape[0], -1, heads, channels // heads)

    out = memory_efficient_attention(heads_last(q), heads_last(k), heads_last(v))
    return out.reshape(frames, tokens, channels)


@cache
def failure(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why xformers cannot attend forward and backward there, or None; whether it can is known by trying only.

    It may be built for another torch, or have no operator for this GPU.
    """
    try:
        # Without hooks: those of gradient checkpointing would count what the trial saves, which happens only once.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            q = torch.zeros(1, 16, head_size, device=device, dtype=dtype, requires_grad=True)
            keyframe_attention(q, q, q, heads=1).sum().backward()
    except (ImportError, RuntimeError) as error:  # xformers' own NotImplementedError is one of the latter
        if is_out_of_memory(error):
            raise
        return f"xformers cannot run: {first_line(error)}"
    return None


def _unchanged(tensor: Any) -> Any:
    return tensor
