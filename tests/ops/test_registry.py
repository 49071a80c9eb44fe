"""Which backends exist, what each refuses and in what words.

Tests of posecrafter_rt/ops/registry.py.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.ops import BACKENDS, native, registry, unsupported_reason, xformers


def test_every_operator_ends_with_a_reference_that_refuses_nothing() -> None:
    for op, backends in BACKENDS.items():
        assert list(backends)[-1] == "reference"
        assert unsupported_reason(op, "reference") is None


def test_unknown_names_are_named() -> None:
    with pytest.raises(BackendUnavailable, match="'flash'") as caught:
        unsupported_reason("keyframe_attention", "flash")
    assert "triton" in str(caught.value.hint)
    with pytest.raises(BackendUnavailable, match="'attention'"):
        unsupported_reason("attention", "reference")


def test_native_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda: None)
    latent = torch.zeros(1, 2, 2)
    assert unsupported_reason("affine_warp_paste", "native", latent, regions=1024) is None
    assert "1025 regions" in str(unsupported_reason("affine_warp_paste", "native", latent, regions=1025))
    assert "meta" in str(unsupported_reason("affine_warp_paste", "native", latent.to("meta")))
    assert "gradient" in str(unsupported_reason("affine_warp_paste", "native", latent.requires_grad_()))
    monkeypatch.setattr(native, "missing_reason", lambda: "not built")
    assert unsupported_reason("affine_warp_paste", "native") == "not built"


def test_triton_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 16)
    assert unsupported_reason("keyframe_attention", "triton", q, q, q, heads=2) == registry._missing("triton") or (
        torch.cuda.is_available()
    )
    monkeypatch.setattr(registry, "_missing", lambda package: None)
    assert "CUDA tensors, got cpu" in str(unsupported_reason("keyframe_attention", "triton", q, q, q, heads=2))


def test_group_norm_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 4, 2, 3), torch.ones(4)

    def reason(x: torch.Tensor) -> str:
        return str(unsupported_reason("group_norm", "triton", x, weight, weight))

    monkeypatch.setattr(registry, "_missing", lambda package: "no CUDA device")
    assert reason(x) == "no CUDA device"
    monkeypatch.setattr(registry, "_missing", lambda package: None)
    assert "CUDA tensors, got cpu" in reason(x)
    monkeypatch.setattr(registry, "_triton_tensors", lambda *tensors: None)  # as if on a GPU
    assert "channels_last" in reason(x)
    dense = x.to(memory_format=torch.channels_last)
    assert unsupported_reason("group_norm", "triton", dense, weight, weight) is None
    assert "gradient" in reason(dense.requires_grad_())
    assert "contiguous" in str(unsupported_reason("group_norm", "triton", dense, weight, torch.ones(8)[::2]))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "compiler" in reason(dense.detach())


def test_xformers_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 16)
    assert unsupported_reason("keyframe_attention", "xformers") == registry._missing("xformers")
    monkeypatch.setattr(registry, "_missing", lambda package: None)
    assert unsupported_reason("keyframe_attention", "xformers") is None
    assert "CUDA tensors, got cpu" in str(unsupported_reason("keyframe_attention", "xformers", q, q, q, heads=2))


class OnGpu(Tensor):
    """A tensor without values, of a GPU that need not be there."""

    @staticmethod
    def __new__(cls, index: int) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, (1, 2, 16), dtype=torch.float16, device=torch.device("cuda", index))

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise AssertionError(f"{function} needs values")


@pytest.fixture
def give_xformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Tensor]], None]]:
    """give_xformers(attend): stands in for an installed xformers, whose only operator is `attend`."""

    def give(attend: Callable[..., Tensor]) -> None:
        module = ModuleType("xformers.ops")
        module.memory_efficient_attention = attend  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers.ops", module)

    xformers.failure.cache_clear()
    yield give
    xformers.failure.cache_clear()


def attend_heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)


def test_xformers_is_for_gradients_and_only_where_a_trial_of_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = {
        (torch.device("cuda:1"), torch.float16, 8): "no operator",
        (torch.device("cuda:0"), torch.float16, 8): None,
    }
    monkeypatch.setattr(xformers, "failure", lambda *case: trials[case])
    monkeypatch.setattr(registry, "_missing", lambda package: None if package == "xformers" else "not installed")
    for index, chosen in ((0, "xformers"), (1, "reference")):
        q = OnGpu(index)
        assert "none is needed" in str(unsupported_reason("keyframe_attention", "xformers", q, q, q, heads=2))
        q.requires_grad_()
        assert registry.choose_backend("keyframe_attention", None, q, q, q, heads=2) == chosen
    with pytest.raises(BackendUnavailable, match="'xformers' cannot run: no operator"):
        registry.choose_backend("keyframe_attention", "xformers", q, q, q, heads=2)


def test_xformers_is_tried_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, give_xformers: Callable[..., None]
) -> None:
    def without_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def refuse(_: Tensor) -> None:
            raise RuntimeError("no backward")

        out = attend_heads_last(q, k, v)
        out.register_hook(refuse)
        return out

    def without_operator(*_: Tensor) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n  query: …")

    def starved(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    def failure(head_size: int) -> str | None:
        return xformers.failure(torch.device("cpu"), torch.float32, head_size)

    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # type: ignore[arg-type]
    assert "xformers.ops" in str(failure(8))
    give_xformers(without_operator)
    reason = failure(12)
    assert reason == "xformers cannot run: No operator found for `memory_efficient_attention_forward` with inputs:"
    give_xformers(attend_heads_last)
    assert failure(12) == reason  # it is tried once
    give_xformers(without_backward)
    assert failure(16) == "xformers cannot run: no backward"
    give_xformers(starved)
    with pytest.raises(torch.OutOfMemoryError):  # of this moment, not of xformers
        failure(24)
    give_xformers(attend_heads_last)
    with torch.no_grad():
        assert failure(24) is None


def test_xformers_is_tried_within_a_block_that_is_recomputed(give_xformers: Callable[..., None]) -> None:
    """As gradient checkpointing does, which fails if the second time saves fewer tensors than the first."""
    give_xformers(attend_heads_last)

    def block(q: Tensor) -> Tensor:
        assert xformers.failure(q.device, q.dtype, 8) is None
        return q.sin()

    q = torch.ones(3, requires_grad=True)
    checkpoint(block, q, use_reentrant=False).sum().backward()
    torch.testing.assert_close(q.grad, q.detach().cos())


def test_a_missing_extension_is_one_line_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "missing_reason", lambda: "the extension is not built")
    registry._log_refusal.cache_clear()
    with caplog.at_level(logging.INFO, logger="posecrafter_rt.ops.registry"):
        for _ in range(2):
            assert registry.choose_backend("affine_warp_paste", None, torch.zeros(1, 2, 2), regions=1) == "reference"
    assert caplog.messages == ["affine_warp_paste: backend native not used: the extension is not built"]
    with pytest.raises(BackendUnavailable, match="not built"):
        registry.choose_backend("affine_warp_paste", "native", torch.zeros(1, 2, 2), regions=1)
