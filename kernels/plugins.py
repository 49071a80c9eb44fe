"""The attention kernels for TensorRT to launch: little shared memory, 32-bit integers, PTX without leftovers.

Layer 2: needs Triton, no device.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from posecrafter_rt.kernels import keyframe_attention, temporal_attention
from posecrafter_rt.kernels.compile import Compiled, compile_keyframe, compile_temporal
from posecrafter_rt.kernels.configs import (
    TemporalConfig,
    TileConfig,
    keyframe_config,
    missing_reason,
    temporal_config,
)

# What a block may use without asking the driver for more. TensorRT's launcher of ahead-of-time plugins does not ask.
SHARED_BYTES = 48 << 10
MIN_BLOCK = 16  # tensor cores take no smaller tile
CHANNELS_MULTIPLE = 16  # the kernels are compiled for pointers and strides aligned to 16 elements
KERNELS: dict[str, Any] = {
    "keyframe_attention": keyframe_attention.keyframe_attention_kernel,
    "temporal_attention": temporal_attention.temporal_attention_kernel,
}

Tile = TileConfig | TemporalConfig


def unsupported_reason(
    op: str, capability: tuple[int, int], dtype: torch.dtype, channels: int, heads: int
) -> str | None:
    """Return why an attention of this width has no plugin, or None."""
    if channels % heads or channels // heads % 8 or channels % CHANNELS_MULTIPLE:
        return f"{channels} channels of {heads} heads; channels must be a multiple of 16, a head's of 8"
    return missing_reason(op, capability, dtype, channels // heads)


def integer_names(op: str) -> list[str]:
    """Return the kernel's integer arguments in order; they lie between the three inputs and the output."""
    names = [name for name in KERNELS[op].arg_names if name.islower() and name != "mask_ptr"]
    assert names[:3] == ["q_ptr", "k_ptr", "v_ptr"] and names[-1] == "out_ptr", names
    return names[3:-1]


@cache
def plugin_kernel(
    op: str, capability: tuple[int, int], dtype: torch.dtype, head_size: int, frames: int = 1
) -> tuple[Compiled, Tile]:
    """Compile the kernel in the largest tile that fits SHARED_BYTES without spills; return it and the tile.

    frames: the number that a temporal tile is chosen for; any other number works too. The PTX takes q, k, v,
    `integer_names` in 32 bits, and out; nothing else. Its name is of this PTX alone: see `named_apart`.
    Raises: ValueError if no tile fits.
    """
    if op == "keyframe_attention":
        table: Tile = keyframe_config(capability, dtype, head_size)
    else:
        table = temporal_config(capability, dtype, head_size, frames, frames)
    architecture = capability[0] * 10 + capability[1]
    compile_kernel: Any = compile_keyframe if op == "keyframe_attention" else compile_temporal
    for tile in smaller_tiles(table):
        built = compile_kernel(architecture, dtype, head_size, tile, ptx_version=ptx_version(architecture), narrow=True)
        if built.shared_bytes <= SHARED_BYTES and built.spill_bytes == 0:
            ptx = strip_ptx(built.ptx, built.name, 3 + len(integer_names(op)) + 1)
            name, ptx = named_apart(built.name, ptx)
            return replace(built, name=name, ptx=ptx), tile
    raise ValueError(f"{op}: no tile of head size {head_size} in {dtype} fits {SHARED_BYTES} bytes of shared memory")


def smaller_tiles(tile: Tile) -> Iterator[Tile]:
    """Yield a tile, then ever smaller ones: with two stages, with smaller blocks, and last with one stage."""
    yield tile
    if tile.num_stages > 2:
        tile = replace(tile, num_stages=2)
        yield tile
    while (smaller := _halve(tile)) is not None:
        tile = smaller
        yield tile
    if tile.num_stages > 1:
        yield replace(tile, num_stages=1)


def _halve(tile: Tile) -> Tile | None:
    """Halve the keys or query rows, near two rows per key (temporal: keys, then positions); None: cannot be smaller."""
    if isinstance(tile, TileConfig):
        if tile.block_n > MIN_BLOCK and 2 * tile.block_n >= tile.block_m:
            return replace(tile, block_n=tile.block_n // 2)
        return replace(tile, block_m=tile.block_m // 2) if tile.block_m > MIN_BLOCK else None
    if tile.block_k > MIN_BLOCK:
        return replace(tile, block_k=tile.block_k // 2)
    return replace(tile, block_p=tile.block_p // 2) if tile.block_p > 1 else None


def ptx_version(architecture: int) -> int:
    """Return a PTX version that knows an architecture and that drivers older than Triton's assembler can load."""
    return 86 if architecture <= 100 else 88


def named_apart(name: str, ptx: str) -> tuple[str, str]:
    """Return a kernel's name with a digest of its PTX, and the PTX with that name.

    Within a plan, TensorRT tells kernels apart by name: of two with one name it would run the same code for both, with
    the launch parameters of each.
    """
    unique = f"{name}_{hashlib.sha256(ptx.encode()).hexdigest()[:16]}"
    return unique, ptx.replace(name, unique)  # the parameters' names begin with it, too


def strip_ptx(ptx: str, name: str, num_arguments: int) -> str:
    """Remove Triton's trailing scratch parameters, which the kernel does not read, and all debug information.

    TensorRT passes exactly the declared arguments, and the debug information names files of the building machine.
    Raises: ValueError if the parameters are not `num_arguments` and some unused pointers.
    """
    entry = re.search(rf"\.entry {re.escape(name)}\(\n(.*?)\n\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError(f"the PTX has no entry {name}")
    parameters = entry.group(1).split(",\n")
    for parameter in parameters[num_arguments:]:
        symbol = parameter.split()[-1]
        if ".ptr" not in parameter or len(re.findall(rf"\b{re.escape(symbol)}\b", ptx)) > 1:
            raise ValueError(f"{name} reads {symbol}, which TensorRT does not pass")
    if len(parameters) < num_arguments:
        raise ValueError(f"{name} takes {len(parameters)} arguments, not {num_arguments}")
    ptx = ptx[: entry.start(1)] + ",\n".join(parameters[:num_arguments]) + ptx[entry.end(1) :]
    ptx = re.sub(r"^\s*\.section\s+\.debug\w*\s*\{[^}]*\}\n?", "", ptx, flags=re.MULTILINE)
    return re.sub(r"^\s*\.(loc|file)\s.*\n", "", ptx, flags=re.MULTILINE)
