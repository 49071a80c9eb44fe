"""`keyframe_attention`: every frame attends to its group's key frame.

Layer 2: dispatches between the reference and the fast paths.
"""

from __future__ import annotations

from torch import Tensor

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.ops.reference import keyframe_attention_ref


def keyframe_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attend from every frame to the key frame.

    out[g·F + f] = softmax(q[g·F + f] · k[g]ᵀ / √d) · v[g] per head (Eq. 1; k, v are the key frame's alone).
    Args: q: (G·F, L, C); k, v: (G, L', C); fp32, fp16 or bf16; C = heads · d. G: guidance passes or stream steps.
    Returns: (G·F, L, C), dtype of q, new tensor.
    Raises: ShapeError if the shapes do not fit together.
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[-1] != q.shape[-1] or q.shape[0] % k.shape[0]:
        raise ShapeError(f"keyframe_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    return keyframe_attention_ref(q, k, v, heads)
