"""`affine_warp_paste`: copy an inverted latent to every frame and paste its warped regions.

Layer 2: checks the arguments and dispatches between the reference and the native paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posecrafter_rt.errors import ShapeError
from posecrafter_rt.ops import native
from posecrafter_rt.ops.dispatch import is_traced_as_op
from posecrafter_rt.ops.reference import MODES, affine_warp_paste_ref
from posecrafter_rt.ops.registry import choose_backend


def affine_warp_paste(
    latent: Tensor, affines: Tensor, rects: Tensor, mode: str = "bilinear", *, backend: str | None = None
) -> Tensor:
    """Copy a latent to N + 1 frames and edit the last N: warp the whole latent per region, paste its rectangle.

    out[0] = x_T; out[j][y, x] = x_T(A⁻¹·[x, y, 1]ᵀ) inside the region's rectangle, else x_T (paper Eq. 18-19).
    Regions are pasted in order, each sampled from the unedited x_T. If a sample's centre falls outside
    [0, w-1] × [0, h-1], the pixel keeps its value. A singular or non-finite affine leaves its region unedited.
    Args:
        latent: x_T (C, h, w); fp32, fp16 or bf16.
        affines: (N, R, 2, 3) float, reference → target in latent pixels (centres at integers), as `cv2.warpAffine`
            takes them without WARP_INVERSE_MAP; read as float32, on any device.
        rects: (N, R, 4) integer x0, y0, x1, y1, half open, in latent pixels; clipped to the frame; empty: no edit.
        mode: `bilinear`, `nearest` (ties to even), or `unit_variance` (bilinear weights over the root of their
            squares' sum).
        backend: `native` (CPU, CUDA) or `reference`; None: the first that can run. All agree bit for bit.
    Returns: (N + 1, C, h, w), dtype and device of latent, new contiguous tensor.
    Raises: ShapeError for shapes, dtypes or a mode outside the above; BackendUnavailable if a named `backend`
        cannot run (message says why).
    """
    _check(latent, 3, affines, rects, mode)
    affines, rects = _to_device(affines, rects, latent)
    # Only then: a call as an op makes torch import Dynamo, which takes seconds.
    if is_traced_as_op(backend, latent, affines):
        return _affine_warp_paste_op(latent, affines, rects, mode)
    chosen = choose_backend("affine_warp_paste", backend, latent, affines, regions=affines.shape[1])
    return _run(latent, affines, rects, mode, chosen)


def affine_warp_paste_(
    latents: Tensor, affines: Tensor, rects: Tensor, mode: str = "bilinear", *, backend: str | None = None
) -> Tensor:
    """Edit given latents in place (sampling step τ > 1): each frame's own latent is source and target.

    As `affine_warp_paste`, with latents[j] read from a snapshot in place of x_T; frame 0 is left untouched.
    Args: latents: (N + 1, C, h, w), fp32, fp16 or bf16, **modified in place**; the rest as `affine_warp_paste`.
    Returns: latents.
    Raises: ShapeError for shapes, dtypes or a mode outside the above; BackendUnavailable as `affine_warp_paste`.
    """
    _check(latents, 4, affines, rects, mode)
    if latents.shape[0] != affines.shape[0] + 1:
        raise ShapeError(
            f"affine_warp_paste_: {latents.shape[0]} latents do not fit {affines.shape[0]} edits",
            "pass the inserted frame first: N + 1 latents for N edits",
        )
    affines, rects = _to_device(affines, rects, latents)
    if is_traced_as_op(backend, latents, affines):
        _affine_warp_paste_inplace_op(latents, affines, rects, mode)
        return latents
    chosen = choose_backend("affine_warp_paste", backend, latents, affines, regions=affines.shape[1])
    _run_inplace(latents, affines, rects, mode, chosen)
    return latents


def _check(latent: Tensor, ndim: int, affines: Tensor, rects: Tensor, mode: str) -> None:
    if latent.ndim != ndim or latent.dtype not in native.DTYPES or 0 in latent.shape:
        raise ShapeError(f"affine_warp_paste: latent of shape {tuple(latent.shape)}, {latent.dtype}",
                         f"want {ndim} dimensions, none empty, in fp32, fp16 or bf16")  # fmt: skip
    if affines.ndim != 4 or affines.shape[2:] != (2, 3) or not affines.is_floating_point():
        raise ShapeError(
            f"affine_warp_paste: affines of shape {tuple(affines.shape)}, {affines.dtype}", "want float (N, R, 2, 3)"
        )
    if rects.shape != (*affines.shape[:2], 4) or rects.is_floating_point() or rects.dtype == torch.bool:
        raise ShapeError(
            f"affine_warp_paste: rects of shape {tuple(rects.shape)}, {rects.dtype} for affines {tuple(affines.shape)}",
            "want integer (N, R, 4): x0, y0, x1, y1",
        )
    if mode not in MODES:
        raise ShapeError(f"affine_warp_paste: unknown mode {mode!r}", f"choose one of {', '.join(MODES)}")


def _to_device(affines: Tensor, rects: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    on_stream = latent.is_cuda  # a kernel waits for the copies; the CPU would read them before they are complete
    return (
        affines.to(latent.device, torch.float32, non_blocking=on_stream).contiguous(),
        rects.to(latent.device, torch.int64, non_blocking=on_stream).contiguous(),
    )


def _run(latent: Tensor, affines: Tensor, rects: Tensor, mode: str, backend: str) -> Tensor:
    if backend == "reference":
        edited = affine_warp_paste_ref(latent.unsqueeze(0), affines, rects, mode)
        return torch.cat([latent.unsqueeze(0), edited])
    out = latent.new_empty(affines.shape[0] + 1, *latent.shape)
    native.paste(latent.contiguous(), out, affines, rects, mode, copy=True)
    return out


def _run_inplace(latents: Tensor, affines: Tensor, rects: Tensor, mode: str, backend: str) -> None:
    edited = latents[1:]
    if backend == "reference":
        edited.copy_(affine_warp_paste_ref(edited, affines, rects, mode))
    elif latents.is_contiguous():
        snapshot = edited.clone() if latents.is_cuda else edited  # the CPU path keeps one frame's snapshot at a time
        native.paste(snapshot, edited, affines, rects, mode, copy=False)
    else:
        dense = edited.contiguous()
        out = torch.empty_like(dense)
        native.paste(dense, out, affines, rects, mode, copy=True)
        edited.copy_(out)


# The schema says `resample`: torch passes a keyword `mode` of its own through some dispatch paths.
@torch.library.custom_op("posecrafter::affine_warp_paste", mutates_args=())
def _affine_warp_paste_op(latent: Tensor, affines: Tensor, rects: Tensor, resample: str) -> Tensor:
    backend = choose_backend("affine_warp_paste", None, latent, regions=affines.shape[1])
    return _run(latent, affines, rects, resample, backend)


@_affine_warp_paste_op.register_fake
def _affine_warp_paste_fake(latent: Tensor, affines: Tensor, rects: Tensor, resample: str) -> Tensor:
    return latent.new_empty(affines.shape[0] + 1, *latent.shape)


@torch.library.custom_op("posecrafter::affine_warp_paste_", mutates_args=("latents",))
def _affine_warp_paste_inplace_op(latents: Tensor, affines: Tensor, rects: Tensor, resample: str) -> None:
    backend = choose_backend("affine_warp_paste", None, latents, regions=affines.shape[1])
    _run_inplace(latents, affines, rects, resample, backend)


@_affine_warp_paste_inplace_op.register_fake
def _affine_warp_paste_inplace_fake(latents: Tensor, affines: Tensor, rects: Tensor, resample: str) -> None:
    return None
