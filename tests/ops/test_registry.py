"""Which backends exist, what each refuses and in what words.

Tests of posecrafter_rt/ops/registry.py.
"""

from __future__ import annotations

import logging

import pytest
import torch

from posecrafter_rt.errors import BackendUnavailable
from posecrafter_rt.ops import BACKENDS, native, registry, unsupported_reason


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
