"""GroupNorm with SiLU: the formula, the plain operations bit for bit, and what compilers and exporters see.

Tests of posecrafter_rt/ops/group_norm.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posecrafter_rt.errors import BackendUnavailable, ShapeError
from posecrafter_rt.ops import group_norm


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = normal(2, channels, seed=1, dtype=dtype)
    return normal(3, channels, 5, 7, seed=0, dtype=dtype).to(memory_format=torch.channels_last), weight, bias


@pytest.mark.parametrize("silu", [False, True])
def test_the_formula(silu: bool) -> None:
    x, weight, bias = (tensor.double() for tensor in inputs(12))
    grouped = x.reshape(3, 4, 3, 5, 7)
    mean, variance = grouped.mean((2, 3, 4), keepdim=True), grouped.var((2, 3, 4), correction=0, keepdim=True)
    expected = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    expected = expected * weight[:, None, None] + bias[:, None, None]
    expected = expected * expected.sigmoid() if silu else expected
    torch.testing.assert_close(group_norm(x, 4, weight, bias, 1e-5, silu=silu), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_on_a_cpu_it_is_the_plain_operations_bit_for_bit(dtype: torch.dtype, silu: bool) -> None:
    x, weight, bias = inputs(12, dtype)
    plain = torch.nn.functional.group_norm(x, 4, weight, bias, 1e-6)
    plain = torch.nn.functional.silu(plain) if silu else plain
    out = group_norm(x, 4, weight, bias, 1e-6, silu=silu)
    assert out.dtype == dtype and torch.equal(out, plain)


def test_it_has_a_gradient() -> None:
    x, weight, bias = (tensor.double().requires_grad_() for tensor in inputs(4))
    assert torch.autograd.gradcheck(lambda *args: group_norm(args[0], 2, *args[1:], 1e-5, silu=True), (x, weight, bias))


def test_exporters_and_compilers_see_the_plain_operations() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return group_norm(x, 4, weight, bias, 1e-5, silu=True)

    graph = torch.export.export(Norm(), inputs(12)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "aten.group_norm.default", "aten.silu.default"]  # fmt: skip
    compiled = torch.compile(Norm(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs(12)), Norm()(*inputs(12)))


@pytest.mark.parametrize(
    ("shape", "groups", "width"), [((1, 4, 3), 2, 4), ((1, 4, 3, 3), 3, 4), ((1, 4, 3, 3), 2, 8)], ids=str
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], groups: int, width: int) -> None:
    with pytest.raises(ShapeError, match="do not fit"):
        group_norm(torch.zeros(shape), groups, torch.ones(width), torch.zeros(width), 1e-5)


def test_a_named_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(BackendUnavailable, match="group_norm: backend 'triton' cannot run"):
        group_norm(torch.zeros(1, 4, 3, 3), 2, torch.ones(4), torch.zeros(4), 1e-5, backend="triton")
