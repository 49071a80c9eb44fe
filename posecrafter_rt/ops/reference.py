"""The oracles: each operator once in plain PyTorch, the slow backend of every fast path.

Layer 2: torch only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("bilinear", "nearest", "unit_variance")
SINGULAR_RATIO = 1e-6  # |det| at or below this share of the linear part's squared norm counts as singular


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """(b, n, heads · d) → (b, heads, n, d), a view."""
    batch, tokens, channels = tensor.shape
    return tensor.reshape(batch, tokens, heads, channels // heads).transpose(1, 2)


def keyframe_attention_ref(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Eq. 1 with each group's F frames as one long query sequence over the key frame's K and V."""
    frames, tokens, channels = q.shape
    groups = k.shape[0]
    grouped = q.reshape(groups, -1, channels)  # (G, F·L, C)
    out = F.scaled_dot_product_attention(split_heads(grouped, heads), split_heads(k, heads), split_heads(v, heads))
    return out.transpose(1, 2).reshape(frames, tokens, channels).to(q.dtype)  # autocast gives another type


def temporal_attention_ref(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Eq. 2: at each position, attention over the frame axis; positions become the batch."""
    groups, num_queries, tokens, channels = q.shape
    num_keys = k.shape[1]

    def positions_first(tensor: Tensor, num_frames: int) -> Tensor:  # (G·L, heads, F, d)
        frames_last = tensor.transpose(1, 2).reshape(groups * tokens, num_frames, channels)
        return split_heads(frames_last, heads)

    if mask is not None and mask.ndim == 3:
        mask = mask.repeat_interleave(tokens, dim=0).unsqueeze(1)  # (G·L, 1, Fq, Fk)
    out = F.scaled_dot_product_attention(
        positions_first(q, num_queries), positions_first(k, num_keys), positions_first(v, num_keys), attn_mask=mask
    )
    out = out.transpose(1, 2).reshape(groups, tokens, num_queries, channels)
    return out.transpose(1, 2).contiguous().to(q.dtype)


def group_norm_ref(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """torch's GroupNorm with statistics per frame, then SiLU. (N, C, h, w) → the same shape."""
    out = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(out) if silu else out


def invert_affines_ref(affines: Tensor) -> tuple[Tensor, Tensor]:
    """Invert (..., 2, 3) affines → float32 inverses, and bool (...): False where singular or not finite.

    Worked out in float64 and rounded once, so that every backend samples at the same float32 coordinates.
    """
    a, b, c, d, e, f = affines.to(torch.float64).flatten(-2).unbind(-1)
    determinant = a * e - b * d
    norm = (a * a + b * b) + (d * d + e * e)
    usable = affines.isfinite().flatten(-2).all(-1) & (determinant.abs() > SINGULAR_RATIO * norm)
    safe = torch.where(usable, determinant, torch.ones_like(determinant))
    inverse = torch.stack(
        [e / safe, -b / safe, (b * f - c * e) / safe, -d / safe, a / safe, (c * d - a * f) / safe], -1
    )
    return inverse.to(torch.float32).unflatten(-1, (2, 3)), usable


def sample_ref(source: Tensor, source_x: Tensor, source_y: Tensor, mode: str) -> Tensor:
    """Sample `source` (N or 1, C, h, w) at float32 (N, h, w) coordinates that lie inside it → float32 (N, C, h, w)."""
    frames, channels = source_x.shape[0], source.shape[1]
    height, width = source.shape[-2:]
    planes = source.to(torch.float32).flatten(-2).expand(frames, -1, -1)

    def gather(x: Tensor, y: Tensor) -> Tensor:
        index = (y * width + x).to(torch.int64).flatten(-2)  # (N, h·w)
        taken = planes.gather(2, index.unsqueeze(1).expand(-1, channels, -1))
        return taken.unflatten(-1, source_x.shape[1:])

    if mode == "nearest":
        return gather(source_x.round().long(), source_y.round().long())  # ties to even, as OpenCV
    left, top = source_x.floor(), source_y.floor()
    fx, fy = source_x - left, source_y - top
    x0, y0 = left.long(), top.long()
    x1, y1 = (x0 + 1).clamp(max=width - 1), (y0 + 1).clamp(max=height - 1)
    gx, gy = 1 - fx, 1 - fy
    w00, w01, w10, w11 = gx * gy, fx * gy, gx * fy, fx * fy
    if mode == "unit_variance":
        squares = (w00 * w00 + w01 * w01) + (w10 * w10 + w11 * w11)
        norm = squares.double().sqrt().float()  # correctly rounded; torch's fp32 root need not be
        w00, w01, w10, w11 = w00 / norm, w01 / norm, w10 / norm, w11 / norm
    upper = w00.unsqueeze(1) * gather(x0, y0) + w01.unsqueeze(1) * gather(x1, y0)
    return upper + (w10.unsqueeze(1) * gather(x0, y1) + w11.unsqueeze(1) * gather(x1, y1))


def affine_warp_paste_ref(source: Tensor, affines: Tensor, rects: Tensor, mode: str) -> Tensor:
    """Edit `source` (N or 1, C, h, w; 1: shared by all frames) with (N, R) regions → new (N, C, h, w).

    A pixel takes the value of the last region whose rectangle holds it and whose sample lies inside the source.
    """
    height, width = source.shape[-2:]
    frames, regions = affines.shape[:2]
    inverse, usable = invert_affines_ref(affines)
    x = torch.arange(width, device=source.device, dtype=torch.float32)
    y = torch.arange(height, device=source.device, dtype=torch.float32).unsqueeze(-1)
    edited = source.expand(frames, -1, -1, -1).clone(memory_format=torch.contiguous_format)
    for region in range(regions):
        m = inverse[:, region, :, :, None, None]  # (N, 2, 3, 1, 1)
        source_x = (m[:, 0, 0] * x + m[:, 0, 1] * y) + m[:, 0, 2]  # (N, h, w)
        source_y = (m[:, 1, 0] * x + m[:, 1, 1] * y) + m[:, 1, 2]
        inside = (source_x >= 0) & (source_x <= width - 1) & (source_y >= 0) & (source_y <= height - 1)
        x0, y0, x1, y1 = rects[:, region, :, None, None].unbind(1)  # (N, 1, 1) each
        pasted = inside & usable[:, region, None, None] & (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        zero = torch.zeros_like(source_x)
        warped = sample_ref(source, torch.where(inside, source_x, zero), torch.where(inside, source_y, zero), mode)
        edited = torch.where(pasted.unsqueeze(1), warped.to(source.dtype), edited)
    return edited
