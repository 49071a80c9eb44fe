"""The free dimensions of `spec`: their symbols, and concrete shapes for given sizes.

Layer 4: shared by export and engines; torch only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posecrafter_rt.spec import NetworkSpec


def split_dim(dim: str) -> tuple[str, int]:
    """Split a free dimension into symbol and divisor: "height/8" → ("height", 8), "frames" → ("frames", 1)."""
    symbol, _, divisor = dim.partition("/")
    return symbol, int(divisor or 1)


def resolve_shape(dims: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a concrete shape. sizes: of "frames", "groups", "steps", "window", and "height", "width" in pixels."""

    def resolve(dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        symbol, divisor = split_dim(dim)
        return sizes[symbol] // divisor

    return tuple(resolve(dim) for dim in dims)


def random_inputs(spec: NetworkSpec, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs for tracing, parity checks and warm-up: normal float32, int64 in 0 … 255, and bool."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: str, shape: tuple[int, ...]) -> Tensor:
        if dtype == "int64":
            return torch.randint(0, 256, shape, generator=generator)
        if dtype == "bool":
            return torch.rand(shape, generator=generator) < 0.5
        return torch.randn(shape, generator=generator)

    return {tensor.name: draw(tensor.dtype, resolve_shape(tensor.dims, sizes)) for tensor in spec.inputs}
