"""`affine_warp_paste`: copy an inverted latent to every frame and paste its warped regions.

Layer 2: checks the arguments and dispatches between the reference and the fast paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.ops.reference import MODES, affine_warp_paste_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def affine_warp_paste(latent: Tensor, affines: Tensor, rects: Tensor, mode: str = "bilinear") -> Tensor:
    """Copy a latent to N + 1 frames and edit the last N: warp the whole latent per region, paste its rectangle.

    out[0] = x_T; out[j][y, x] = x_T(A⁻¹·[x, y, 1]ᵀ) inside the region's rectangle, else x_T (paper Eq. 18-19).
    Regions are pasted in order, each sampled from the unedited x_T; where the sample's centre falls outside
    [0, w-1] × [0, h-1] the pixel keeps what it has. A singular or non-finite affine leaves its region unedited.
    Args:
        latent: x_T (C, h, w); fp32, fp16 or bf16.
        affines: (N, R, 2, 3) float, reference → target in latent pixels (centres at integers), as `cv2.warpAffine`
            takes them without WARP_INVERSE_MAP; read as float32.
        rects: (N, R, 4) integer x0, y0, x1, y1, half open, in latent pixels; clipped to the frame; empty: no edit.
        mode: `bilinear`, `nearest`, or `unit_variance` (bilinear weights divided by the root of their squares' sum).
    Returns: (N + 1, C, h, w), dtype of latent, new contiguous tensor.
    Raises: ShapeError for shapes, dtypes or a mode outside the above.
    """
    _check(latent, 3, affines, rects, mode)
    affines, rects = affines.to(latent.device, torch.float32), rects.to(latent.device)
    edited = affine_warp_paste_ref(latent.unsqueeze(0), affines, rects, mode)
    return torch.cat([latent.unsqueeze(0), edited])


def affine_warp_paste_(latents: Tensor, affines: Tensor, rects: Tensor, mode: str = "bilinear") -> Tensor:
    """Edit given latents in place (sampling step τ > 1): each frame's own latent is source and target.

    As `affine_warp_paste`, with latents[j] read from a snapshot in place of x_T; frame 0 is left untouched.
    Args: latents: (N + 1, C, h, w), fp32, fp16 or bf16, **modified in place**; the rest as `affine_warp_paste`.
    Returns: latents.
    Raises: ShapeError for shapes, dtypes or a mode outside the above.
    """
    _check(latents, 4, affines, rects, mode)
    if latents.shape[0] != affines.shape[0] + 1:
        raise ShapeError(
            f"affine_warp_paste_: {latents.shape[0]} latents do not fit {affines.shape[0]} affines",
            "pass the inserted frame first: N + 1 latents for N edits",
        )
    affines, rects = affines.to(latents.device, torch.float32), rects.to(latents.device)
    latents[1:] = affine_warp_paste_ref(latents[1:], affines, rects, mode)
    return latents


def _check(latent: Tensor, ndim: int, affines: Tensor, rects: Tensor, mode: str) -> None:
    if latent.ndim != ndim or latent.dtype not in DTYPES or 0 in latent.shape:
        raise ShapeError(f"affine_warp_paste: latent of shape {tuple(latent.shape)}, {latent.dtype}")
    if affines.ndim != 4 or affines.shape[2:] != (2, 3) or not affines.is_floating_point():
        raise ShapeError(f"affine_warp_paste: affines of shape {tuple(affines.shape)}, {affines.dtype}; want (N, R, 2, 3)")
    if rects.shape != (*affines.shape[:2], 4) or rects.is_floating_point() or rects.dtype == torch.bool:
        raise ShapeError(
            f"affine_warp_paste: rects of shape {tuple(rects.shape)}, {rects.dtype} for affines {tuple(affines.shape)}",
            "want integer (N, R, 4): x0, y0, x1, y1",
        )
    if mode not in MODES:
        raise ShapeError(f"affine_warp_paste: unknown mode {mode!r}", f"choose one of {', '.join(MODES)}")
