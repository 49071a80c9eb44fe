"""`temporal_attention`: attention across frames at each spatial position.

Layer 2: dispatches between the reference and the fast paths.
"""

from __future__ import annotations

from torch import Tensor

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.ops.reference import temporal_attention_ref


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attend over the frames at each position.

    out[g, i, n] = Σ_j softmax_j(q[g, i, n] · k[g, j, n] / √d) · v[g, j, n] per head (Eq. 2).
    Args: q: (G, Fq, L, C); k, v: (G, Fk, L, C); fp32, fp16 or bf16; C = heads · d.
        mask: bool (Fq, Fk), True where a query frame may attend to a key frame; None: everywhere.
    Returns: (G, Fq, L, C), dtype of q, new tensor.
    Raises: ShapeError if the shapes do not fit together.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ShapeError(f"temporal_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    return temporal_attention_ref(q, k, v, heads, mask)
