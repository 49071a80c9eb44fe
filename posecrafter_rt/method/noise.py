"""Training noise that the frames of a clip partly share, as all frames share one inverted latent in rendering.

Layer 1: torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def shared_noise(latents: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Return standard normal noise for G clips of F frames. In some clips, frames share a random proportion of it.

    sqrt(s) · common + sqrt(1 - s) · own, with s uniform in 0..1 with `probability`, else 0; every element is N(0, 1).
    Args: latents: (G, F, C, h, w), only for their shape and device; probability: 0..1, that a clip shares noise.
    Returns: (G, F, C, h, w) float32 on that device, drawn on the CPU so that a seed gives the same noise everywhere.
    """
    groups, frames = latents.shape[:2]
    drawing: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    own = torch.randn(latents.shape, **drawing)
    common = torch.randn(groups, 1, *latents.shape[2:], **drawing).expand(-1, frames, -1, -1, -1)
    drawn, proportion = torch.rand(2, groups, 1, 1, 1, 1, **drawing)
    proportion = proportion * (drawn < probability)
    return (proportion.sqrt() * common + (1 - proportion).sqrt() * own).to(latents.device)
