"""Lists the Triton kernels as compiled for three GPUs: registers, spills, shared memory, occupancy, roofline time.

Bench: `python -m bench.kernel_table [--json FILE] [--quick]` writes results/kernel_table.json and .md, or FILE and its
.md. It needs Triton, but no GPU. The times are bounds, not measurements. Exits with 1 if a configuration spills or does
not fit.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.hardware import GPUS, Gpu, blocks_per_multiprocessor, roofline_s
from bench.report import new_parser, publish
from bench.workloads import FRAMES, Attention, attentions
from posecrafter_rt.kernels.compile import Compiled, compile_keyframe, compile_temporal
from posecrafter_rt.kernels.configs import TemporalConfig, TileConfig, keyframe_config, temporal_config

DTYPE = torch.bfloat16
ELEMENT_BYTES = 2
HEADER = ("GPU", "op", "F", "L", "C", "tile", "warps", "stages", "registers", "spills", "shared KiB", "occupancy",
          "MB", "GFLOP", "bound", "roofline µs")  # fmt: skip


def compile_for(gpu: Gpu, problem: Attention) -> tuple[str, TileConfig | TemporalConfig, Compiled]:
    """Return the table's tile for a problem, as text and as it is, and what it compiles to."""
    capability = divmod(gpu.capability, 10)
    if problem.op == "keyframe_attention":
        tile = keyframe_config(capability, DTYPE, problem.head_size)
        built = compile_keyframe(gpu.capability, DTYPE, problem.head_size, tile)
        return f"{tile.block_m}×{tile.block_n}", tile, built
    config = temporal_config(capability, DTYPE, problem.head_size, problem.frames, problem.num_keys)
    built = compile_temporal(gpu.capability, DTYPE, problem.head_size, config)
    return f"{config.block_p}×({config.block_q}×{config.block_k})", config, built


def make_row(gpu: Gpu, problem: Attention) -> dict[str, Any]:
    words, config, built = compile_for(gpu, problem)
    blocks = blocks_per_multiprocessor(gpu, built.num_warps, built.registers, built.shared_bytes)
    num_bytes = problem.num_bytes(ELEMENT_BYTES)
    seconds = roofline_s(gpu, num_bytes, problem.flops, ELEMENT_BYTES)
    is_memory_bound = num_bytes / gpu.memory_bytes_per_s == seconds
    return {
        "gpu": gpu.name,
        "op": problem.op,
        "frames": problem.frames,
        "tokens": problem.tokens,
        "channels": problem.channels,
        "tile": words,
        "warps": config.num_warps,
        "stages": config.num_stages,
        "registers": built.registers,
        "spill_bytes": built.spill_bytes,
        "shared_kib": round(built.shared_bytes / 1024, 1),
        "occupancy_percent": round(100 * blocks * built.num_warps / gpu.max_warps),
        "mb": round(num_bytes / 1e6, 1),
        "gflop": round(problem.flops / 1e9, 2),
        "bound": "memory" if is_memory_bound else "tensor cores",
        "roofline_us": round(seconds * 1e6, 1),
    }


def main() -> None:
    parser = new_parser(__doc__, "one GPU, the first number of frames")
    options = parser.parse_args()
    gpus, frame_counts = (GPUS[:1], FRAMES[:1]) if options.quick else (GPUS, FRAMES)
    problems = [problem for frames in frame_counts for problem in attentions(frames)]
    rows = [make_row(gpu, problem) for gpu in gpus for problem in problems]
    lines = ["# Triton kernels as compiled, bf16, SD 1.5 at 512²", ""]
    lines += ["Compiled offline; the times are the roofline's (the larger of bytes and FLOPs at the card's peaks),", ""]
    lines[-2] += " not measurements."
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    publish("kernel_table", rows, "\n".join(lines) + "\n", options.json, options.quick)
    if any(row["spill_bytes"] or not row["occupancy_percent"] for row in rows):
        raise SystemExit("a configuration spills or does not fit")


if __name__ == "__main__":
    main()
