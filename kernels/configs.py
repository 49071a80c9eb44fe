"""How the Triton kernels are launched: tile sizes per compute capability, dtype and head size, from one table.

Layer 2: data, chosen offline; imports neither Triton nor a device.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("configs.json")  # written by bench/kernel_search.py
MAX_FRAMES = 256  # the last class of frames serves all longer clips
SCALE_LOG2E = 1.0 / math.log(2.0)  # softmax in powers of two: exp2 is one instruction

# Set explicitly: Triton's default for contraction changes between versions. A traced launch takes no such option.
EAGER_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class TileConfig:
    """A keyframe_attention launch: query rows and keys per tile, warps, pipeline stages, precision of fp32 products."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"


@dataclass(frozen=True)
class TemporalConfig:
    """A temporal_attention launch: positions, query frames and key frames per tile, warps, stages, fp32 precision.

    chunk: columns of q and k that are multiplied at a time, or 0 for all: large heads do not fit the registers.
    """

    block_p: int
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str = "tf32x3"
    chunk: int = 0


@dataclass(frozen=True)
class NormConfig:
    """A group_norm launch: positions and channels per tile, channels summed at a time in a group, warps, stages.

    max_blocks: the most blocks of positions into which a frame is divided; each has whole tiles.
    """

    block_rows: int
    block_channels: int = 64  # divides all widths of SD 1.5; a warp's lanes read whole lines of 128 bytes
    group_channels: int = 16  # a tile of 64 blocks × 32 channels spills registers under Triton 3.6 and 3.7
    max_blocks: int = 64
    num_warps: int = 4
    num_stages: int = 1

    def rows_per_block(self, num_rows: int) -> int:
        """Return the positions per block, for frames of num_rows positions."""
        return -(-num_rows // (self.max_blocks * self.block_rows)) * self.block_rows


def on_device_of(tensor: Tensor, *, is_traced: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which kernels run on a tensor's GPU: Triton launches on the thread's current one.

    It changes nothing for Triton's interpreter, which takes tensors of the CPU, nor for a traced launch, which runs none.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda and not is_traced else nullcontext()


def norm_config(num_rows: int) -> NormConfig:
    """Return the tile for frames of num_rows positions.

    64 × 64 gives each thread of four warps four loads of 16 bytes (5120 blocks for 16 frames of 4096 × 320). Small
    frames take 16 × 64, one load per thread: one of 64 × 2560 still has 160 blocks, for an H100's 132 multiprocessors.
    """
    return NormConfig(64 if num_rows >= 1024 else 16)


def split_head(head_size: int) -> tuple[int, int]:
    """Split a head size into (main, tail) tile widths: a power of two, and the rest padded to one of at least 16, or 0.

    Tensor cores need widths that are multiples of 16, tiles need powers of two. 40 → (32, 16), 80 → (64, 16).
    """
    main = max(16, 1 << (head_size.bit_length() - 1))
    left = max(0, head_size - main)
    return main, max(16, 1 << (left - 1).bit_length()) if left else 0


@cache
def _rows() -> dict[str, list[dict[str, Any]]]:
    return json.loads(TABLE.read_text())


def table_capability(capability: tuple[int, int]) -> int:
    """Return the table's row group for a device: 90 if a block may hold 227 KiB of shared memory, else 86."""
    major, minor = capability
    return 90 if major in (9, 10, 11) else 86  # compute capability 12 has 99 KiB again


def missing_reason(
    op: str, capability: tuple[int, int], dtype: torch.dtype, head_size: int, frames: int = 1
) -> str | None:
    """Return why the table has no row for a launch, or None. fp32 tiles of large heads do not fit without spills."""
    least = {"max_head_size": head_size}
    if op == "temporal_attention":
        least["max_frames"] = min(frames, MAX_FRAMES)
    if _find(op, capability, dtype, **least) is not None:
        return None
    return f"no tile for head size {head_size} in {dtype} on compute capability {capability[0]}.{capability[1]}"


@cache
def keyframe_config(capability: tuple[int, int], dtype: torch.dtype, head_size: int) -> TileConfig:
    """Return the tile for a device and head: the tightest row that holds the head."""
    row = _find("keyframe_attention", capability, dtype, max_head_size=head_size)
    assert row is not None, "unsupported_reason comes before a launch"
    return TileConfig(**row)


@cache
def temporal_config(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, num_queries: int, num_keys: int
) -> TemporalConfig:
    """Return the tile for a device, head and number of frames (the larger of queries and keys)."""
    frames = min(max(num_queries, num_keys), MAX_FRAMES)
    row = _find("temporal_attention", capability, dtype, max_head_size=head_size, max_frames=frames)
    assert row is not None, "unsupported_reason comes before a launch"
    return TemporalConfig(**row)


def _find(op: str, capability: tuple[int, int], dtype: torch.dtype, **least: int) -> dict[str, Any] | None:
    wanted = {"capability": table_capability(capability), "element_bytes": dtype.itemsize}
    rows = [row for row in _rows()[op] if all(row[name] == value for name, value in wanted.items())]
    rows = [row for row in rows if all(row[name] >= value for name, value in least.items())]
    if not rows:
        return None
    tightest = min(rows, key=lambda row: tuple(row[name] for name in least))
    return {name: value for name, value in tightest.items() if name not in wanted and name not in least}
