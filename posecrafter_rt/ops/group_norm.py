"""`group_norm`: normalise each frame's groups of channels, with SiLU in the same pass.

Layer 2: dispatches between the reference and the fast path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.ops.reference import group_norm_ref
from posecrafter_rt.ops.registry import choose_backend


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise each frame and group of channels, scale and shift each channel, then apply SiLU if `silu`.

    out[n, c] = act((x[n, c] - μ[n, g]) / √(σ²[n, g] + eps) · weight[c] + bias[c]), with μ and σ² over positions and
    the channels of c's group g, in float32; act: y · sigmoid(y) with `silu`, else y.
    Args:
        x: (N, C, h, w); fp32, fp16 or bf16; C divisible by num_groups. weight, bias: (C,), dtype of x.
        backend: `triton` (CUDA, compute capability 8.0 or newer, no gradient, x dense in channels_last; it reads x
            twice, writes the result once in that layout, and rounds once) or `reference` (torch's group_norm, then
            silu). None: the first that can run, but the reference while torch compiles or exports: Inductor fuses the
            plain operations, and exporters translate them.
    Returns: (N, C, h, w), dtype of x, new tensor.
    Raises: ShapeError if the shapes do not fit together; BackendUnavailable if a named `backend` cannot run
        (message says why).
    """
    if x.ndim != 4 or x.shape[1] % num_groups or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ShapeError(
            f"group_norm: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)} do not fit "
            f"{num_groups} groups",
            "want x (N, C, h, w), weight and bias (C,), and C divisible by the groups",
        )
    if backend is None and torch.compiler.is_compiling():
        return group_norm_ref(x, num_groups, weight, bias, eps, silu)
    if choose_backend("group_norm", backend, x, weight, bias) == "reference":
        return group_norm_ref(x, num_groups, weight, bias, eps, silu)
    from posecrafter_rt.kernels import group_norm as kernel  # imports Triton

    return kernel.launch(x, num_groups, weight, bias, eps, silu=silu)
