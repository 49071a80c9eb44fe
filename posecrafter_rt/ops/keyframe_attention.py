"""`keyframe_attention`: every frame attends to its group's key frame.

Layer 2: dispatches between the reference and the fast paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.ops.dispatch import compiler_op, is_traced_as_op
from posecrafter_rt.ops.reference import keyframe_attention_ref
from posecrafter_rt.ops.registry import choose_backend


def keyframe_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, backend: str | None = None) -> Tensor:
    """Attend from every frame to the key frame.

    out[g·F + f] = softmax(q[g·F + f] · k[g]ᵀ / √d) · v[g] per head (Eq. 1; k, v are the key frame's alone).
    Args:
        q: (G·F, L, C); k, v: (G, L', C); fp32, fp16 or bf16; C = heads · d, channels contiguous (rows may be strided:
            slices of one fused projection are read in place). G: guidance passes or stream steps.
        backend: `triton` (CUDA, compute capability 8.0 or newer, no gradient, d a multiple of 8: in 16 bits up to 160,
            or 256 if a block has 227 KiB of shared memory; in fp32 up to 80; larger tiles spill registers), `xformers`
            (CUDA, 16 bits, only with a gradient; if it is installed and a trial of it succeeds) or `reference` (torch's
            fused attention over the same unexpanded K and V). None: the first that can run.
    Returns: (G·F, L, C), dtype of q, new tensor.
    Raises: ShapeError if the shapes do not fit together; BackendUnavailable if a named `backend` cannot run
        (message says why).
    """
    is_shaped = q.ndim == k.ndim == 3 and k.shape == v.shape and k.shape[-1] == q.shape[-1] and k.shape[0] != 0
    if not is_shaped or q.shape[0] % k.shape[0]:
        raise ShapeError(f"keyframe_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit",
                         "want q (G·F, L, C), and k and v (G, L', C), with one group or more")  # fmt: skip
    if heads < 1 or q.shape[-1] % heads:
        raise ShapeError(f"keyframe_attention: {q.shape[-1]} channels do not divide into {heads} heads",
                         "want channels = heads · head size")  # fmt: skip
    if is_traced_as_op(backend, q, k, v):
        from posecrafter_rt.ops import traced  # noqa: F401  (registers it)

        return torch.ops.posecrafter.keyframe_attention(q, k, v, heads)
    return _run(q, k, v, heads, choose_backend("keyframe_attention", backend, q, k, v, heads=heads))


def _run(q: Tensor, k: Tensor, v: Tensor, heads: int, backend: str, is_traced: bool = False) -> Tensor:
    if backend == "reference":
        return keyframe_attention_ref(q, k, v, heads)
    if backend == "xformers":
        from posecrafter_rt.ops import xformers

        return xformers.keyframe_attention(q, k, v, heads)
    from posecrafter_rt.kernels import keyframe_attention as kernel  # imports Triton

    return kernel.launch(q, k, v, heads, is_traced=is_traced)


@compiler_op("keyframe_attention")
def _keyframe_attention_op(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return _run(q, k, v, heads, choose_backend("keyframe_attention", None, q, k, v, heads=heads), is_traced=True)
