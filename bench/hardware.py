"""What the GPUs of the tables can do, and how many blocks of a kernel fit on one of their multiprocessors.

Bench: the data are from NVIDIA's published architecture papers and the CUDA programming guide's table of limits. NVIDIA
does not state the L2 bandwidth; it is rounded from public micro-benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One card. tensor_flops: dense 16-bit products with fp32 sums. shared_bytes: per multiprocessor."""

    name: str
    capability: int
    multiprocessors: int
    clock_hz: float
    memory_bytes_per_s: float
    l2_bytes_per_s: float
    tensor_flops: float
    tf32_flops: float
    shared_bytes: int
    shared_bytes_per_block: int
    max_warps: int
    max_blocks: int

    def flops(self, element_bytes: int) -> float:
        """Return the peak FLOP/s of the attention kernels' products: 16-bit, or fp32 as three tf32 products."""
        return self.tensor_flops if element_bytes == 2 else self.tf32_flops / 3


GPUS = (
    Gpu("RTX 3090", 86, 82, 1.695e9, 936e9, 2.5e12, 71e12, 35.6e12, 100 << 10, 99 << 10, 48, 16),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1008e9, 5e12, 165e12, 82.6e12, 100 << 10, 99 << 10, 48, 24),
    Gpu("H100 SXM", 90, 132, 1.83e9, 3350e9, 5.5e12, 989e12, 494e12, 228 << 10, 227 << 10, 64, 32),
)
# By a part of the name that NVIDIA's driver reports. An H200 is an H100 with more memory.
NAMES = {"RTX 3090": "RTX 3090", "RTX 4090": "RTX 4090", "H100 80GB HBM3": "H100 SXM", "H200": "H100 SXM"}
REGISTERS = 65536  # per multiprocessor; allocated to warps in units of 256
SHARED_RESERVED = 1024  # the system's share of a block's shared memory


def blocks_per_multiprocessor(gpu: Gpu, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Return how many blocks fit: the least that warps, registers, shared memory and the block limit allow, or 0."""
    if shared_bytes > gpu.shared_bytes_per_block:
        return 0
    registers_per_warp = -(-registers * 32 // 256) * 256
    return min(
        gpu.max_blocks,
        gpu.max_warps // num_warps,
        REGISTERS // (registers_per_warp * num_warps),
        gpu.shared_bytes // (shared_bytes + SHARED_RESERVED),
    )


def roofline_s(gpu: Gpu, num_bytes: float, num_flops: float, element_bytes: int) -> float:
    """Return the time that memory or the tensor cores take at their peaks, whichever is longer."""
    return max(num_bytes / gpu.memory_bytes_per_s, num_flops / gpu.flops(element_bytes))


def tensor_peak(name: str) -> float | None:
    """Return a card's specified 16-bit FLOP/s, given the name that its driver reports; None if it is not listed."""
    known = next((ours for theirs, ours in NAMES.items() if theirs in name), None)
    return next((gpu.tensor_flops for gpu in GPUS if gpu.name == known), None)
