"""Compile the Triton kernels ahead of time for a named GPU architecture, and read what resources they take.

Layer 2: needs Triton, no device. Serves the compile tests, the configurations' table and TensorRT's plugins.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from posecrafter_rt.kernels import group_norm, keyframe_attention, temporal_attention
from posecrafter_rt.kernels.configs import EAGER_OPTIONS, NormConfig, TemporalConfig, TileConfig

FLOAT32 = ("partials_ptr", "coefficients_ptr")  # whatever the operator's dtype
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Compiled:
    """One kernel's machine code. registers: per thread; spill_bytes: stack per thread; shared_bytes: per block."""

    name: str
    ptx: str
    cubin: bytes
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_keyframe(
    capability: int,
    dtype: torch.dtype,
    head_size: int,
    config: TileConfig,
    *,
    ptx_version: int | None = None,
    narrow: bool = False,
) -> Compiled:
    """Compile `keyframe_attention_kernel` for sm_<capability>, with channels divisible by 16 as SD 1.5's are.

    ptx_version: cap of the PTX ISA version (86: 8.6), for consumers older than Triton's own assembler.
    narrow: every integer argument has 32 bits, even group strides, for callers that can pass no others.
    """
    kernel = keyframe_attention.keyframe_attention_kernel
    constants = keyframe_attention.constants(head_size, config)
    return _compile(kernel, dtype, constants, config, capability, ptx_version, has_mask=False, narrow=narrow)


def compile_temporal(
    capability: int,
    dtype: torch.dtype,
    head_size: int,
    config: TemporalConfig,
    *,
    mask: Literal["none", "shared", "groups"] = "none",
    ptx_version: int | None = None,
    narrow: bool = False,
) -> Compiled:
    """Compile `temporal_attention_kernel` for sm_<capability>; as `compile_keyframe`.

    mask: none, one that all groups share, or one for each group.
    """
    kernel = temporal_attention.temporal_attention_kernel
    constants = temporal_attention.constants(head_size, config, group_masks=mask == "groups")
    return _compile(kernel, dtype, constants, config, capability, ptx_version, has_mask=mask != "none", narrow=narrow)


def compile_group_norm(capability: int, dtype: torch.dtype, config: NormConfig, *, silu: bool) -> list[Compiled]:
    """Compile group_norm's three kernels, in the order in which they run; as `compile_keyframe`."""
    tile = {"BLOCK_ROWS": config.block_rows, "BLOCK_CHANNELS": config.block_channels}
    kernels: list[tuple[Any, dict[str, Any]]] = [
        (group_norm.group_norm_statistics_kernel, tile),
        (
            group_norm.group_norm_coefficients_kernel,
            {"BLOCKS": config.max_blocks, "BLOCK_CHANNELS": config.group_channels},
        ),
        (group_norm.group_norm_apply_kernel, {"SILU": silu, **tile}),
    ]
    return [
        _compile(kernel, dtype, constants, config, capability, None, has_mask=False, narrow=False)
        for kernel, constants in kernels
    ]


def _compile(  # noqa: PLR0913 - what those above have in common
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    config: TileConfig | TemporalConfig | NormConfig,
    capability: int,
    ptx_version: int | None,
    has_mask: bool,
    narrow: bool,
) -> Compiled:
    signature: dict[str, str] = {}
    constants = dict(constants)
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "mask_ptr":
            signature[name] = "*u8" if has_mask else "constexpr"
            constants |= {} if has_mask else {"mask_ptr": None}
        elif name.endswith("_ptr"):
            signature[name] = POINTERS[torch.float32 if name in FLOAT32 else dtype]
        elif name == "eps":
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name.endswith("group_stride") and not narrow else "i32"
    # Alignment decides the code: without it there is no asynchronous copy and no vector load.
    aligned = ("_stride", "channels", "q_ptr", "k_ptr", "v_ptr", "x_ptr", "out_ptr", *FLOAT32)
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name.endswith(aligned) and name != "group_channels"  # e.g. 10, of 320 in 32 groups
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **EAGER_OPTIONS}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spill_bytes = _resources(built.asm["cubin"])
    return Compiled(
        built.metadata.name, built.asm["ptx"], built.asm["cubin"], config.num_warps, registers, spill_bytes,
        built.metadata.shared,
    )  # fmt: skip


def cuobjdump(cubin: bytes, option: str) -> str:
    """Return what the cuobjdump of Triton's wheel prints about a cubin; with `-sass`, its machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes of a cubin's only kernel, as the cuobjdump of Triton's wheel reads them."""
    usage = cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return int(found.group(1)), int(found.group(2))
