"""xformers' memory-efficient attention on CUDA: the only fast path here that has a gradient, for tuning.

Layer 2: xformers is imported when it is first run.
"""

from __future__ import annotations

from torch import Tensor


def keyframe_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `ops.keyframe_attention`: each group's F frames are one long query sequence; K and V are not expanded."""
    from xformers.ops import memory_efficient_attention

    frames, tokens, channels = q.shape

    def heads_last(tensor: Tensor) -> Tensor:  # (G, n, heads, d), as xformers takes them
        return tensor.reshape(k.shape[0], -1, heads, channels // heads)

    out = memory_efficient_attention(heads_last(q), heads_last(k), heads_last(v))
    return out.reshape(frames, tokens, channels)
