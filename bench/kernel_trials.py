"""Launches one attention problem with one tile on a device, compares it with fp64, and times it.

Bench: kernel_tune.py uses it in the timing process and in the processes that compile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.kernels import attention_inputs
from bench.timing import time_call
from bench.workloads import HEADS, Attention
from posecrafter_rt.kernels import keyframe_attention, temporal_attention
from posecrafter_rt.kernels.configs import TemporalConfig, TileConfig
from posecrafter_rt.ops.reference import keyframe_attention_ref, temporal_attention_ref

Tile = TileConfig | TemporalConfig
Inputs = tuple[Tensor, Tensor, Tensor]  # q, k, v
# Added to the allowed error, as in tests/kernels/test_gpu.py.
FLOOR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
COMPARED = 64  # positions at each end of a frame that are compared with fp64
WARM_TOKENS = 64


def launch(inputs: Inputs, tile: Tile) -> Tensor:
    """Run the Triton kernel with this tile."""
    if isinstance(tile, TileConfig):
        return keyframe_attention.launch(*inputs, HEADS, config=tile)
    return temporal_attention.launch(*inputs, HEADS, None, config=tile)


def reference(problem: Attention, inputs: Inputs) -> Tensor:
    """Run the operator's reference, torch's fused attention."""
    if problem.op == "keyframe_attention":
        return keyframe_attention_ref(*inputs, HEADS)
    return temporal_attention_ref(*inputs, HEADS)


def warm(problem: Attention, dtype: torch.dtype, tile: Tile) -> str:
    """Launch a tile, so that its code is compiled into Triton's cache on disk. Returns: an error's first line, or "".

    Few positions suffice: machine code depends on types and on which integers 16 divides, and 16 divides all levels'
    sizes.
    """
    try:
        few = replace(problem, tokens=min(problem.tokens, WARM_TOKENS))
        launch(attention_inputs(few, dtype, "cuda"), tile)
        torch.cuda.synchronize()
    except Exception as error:  # Triton raises many kinds, CUDA its own
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


@dataclass(frozen=True)
class Trial:
    """A problem's random inputs on a device, and what its results are compared with."""

    problem: Attention
    dtype: torch.dtype
    device: str

    @cached_property
    def inputs(self) -> Inputs:
        return attention_inputs(self.problem, self.dtype, self.device)

    def ends(self, tensor: Tensor) -> Tensor:
        """Return the first and last positions of every frame, where blocks begin and end."""
        return torch.cat([tensor[..., :COMPARED, :], tensor[..., -COMPARED:, :]], -2)

    @cached_property
    def judged(self) -> tuple[Tensor, float]:
        """Return the exact result at both ends, and the allowed error: twice that of the reference, plus FLOOR."""
        q, k, v = self.inputs
        q = self.ends(q)
        if self.problem.op == "temporal_attention":
            k, v = self.ends(k), self.ends(v)
        exact = reference(self.problem, (q.double(), k.double(), v.double()))
        error = (reference(self.problem, (q, k, v)).double() - exact).abs().max().item()
        return exact, 2 * error + FLOOR[self.dtype]

    def fault(self, tile: Tile) -> str:
        """Return what is wrong with a tile's result, or an empty string."""
        exact, allowed = self.judged
        torch.full_like(self.inputs[0], float("nan"))  # freed: the launch most likely gets this memory for its output
        out = launch(self.inputs, tile)
        if not out.isfinite().all().item():
            return "not all values are written and finite"
        error = (self.ends(out).double() - exact).abs().max().item()
        return "" if error <= allowed else f"error {error:.2g} where {allowed:.2g} is allowed"

    def time_ms(self, tile: Tile, budget_s: float) -> float:
        """Return the median time of a launch; L2 is flushed before each."""
        return time_call(lambda: launch(self.inputs, tile), budget_s=budget_s).median_ms

    def reference_ms(self, budget_s: float) -> float:
        return time_call(lambda: reference(self.problem, self.inputs), budget_s=budget_s).median_ms
