"""`temporal_attention`: attention across frames at each spatial position.

Layer 2: dispatches between the reference and the fast paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.ops.dispatch import compiler_op, is_traced_as_op
from posecrafter_rt.ops.reference import temporal_attention_ref
from posecrafter_rt.ops.registry import choose_backend


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Attend over the frames at each position.

    out[g, i, n] = Σ_j softmax_j(q[g, i, n] · k[g, j, n] / √d) · v[g, j, n] per head (Eq. 2).
    Args:
        q: (G, Fq, L, C); k, v: (G, Fk, L, C); fp32, fp16 or bf16; C = heads · d, channels contiguous (groups, frames
            and rows may be strided: slices of one fused projection or of a ring buffer are read in place).
        mask: bool (Fq, Fk), or (G, Fq, Fk) if groups differ; True where a query's frame may attend to a key's frame.
            None: everywhere. A query frame without any key yields 0. A causal window with an anchor is such a mask.
        backend: `triton` (CUDA, compute capability 8.0 or newer, no gradient, d a multiple of 8 up to 160;
            larger tiles spill registers) or `reference`. None: the first that can run.
    Returns: (G, Fq, L, C), dtype of q, new contiguous tensor.
    Raises: ShapeError if the shapes do not fit together; BackendUnavailable if a named `backend` cannot run
        (message says why).
    """
    is_shaped = q.ndim == k.ndim == 4 and k.shape == v.shape
    if not is_shaped or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ShapeError(f"temporal_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit",
                         "want q (G, Fq, L, C), and k and v (G, Fk, L, C)")  # fmt: skip
    if heads < 1 or q.shape[-1] % heads:
        raise ShapeError(f"temporal_attention: {q.shape[-1]} channels do not divide into {heads} heads",
                         "want channels = heads · head size")  # fmt: skip
    frames = (q.shape[1], k.shape[1])
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in (frames, (q.shape[0], *frames))):
        raise ShapeError(
            f"temporal_attention: mask {tuple(mask.shape)}, {mask.dtype}",
            f"want bool {frames}: query frames × key frames, with the groups before them or without",
        )
    if is_traced_as_op(backend, q, k, v):
        from posecrafter_rt.ops import traced  # noqa: F401  (registers it)

        return torch.ops.posecrafter.temporal_attention(q, k, v, heads, mask)
    return _run(q, k, v, heads, mask, choose_backend("temporal_attention", backend, q, k, v, heads=heads))


def _run(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, backend: str, is_traced: bool = False
) -> Tensor:
    if backend == "reference":
        return temporal_attention_ref(q, k, v, heads, mask)
    from posecrafter_rt.kernels import temporal_attention as kernel  # imports Triton

    return kernel.launch(q, k, v, heads, mask, is_traced=is_traced)


@compiler_op("temporal_attention")
def _temporal_attention_op(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    backend = choose_backend("temporal_attention", None, q, k, v, heads=heads)
    return _run(q, k, v, heads, mask, backend, is_traced=True)
