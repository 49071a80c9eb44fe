"""Rounding to 16 bits after each operation: it rounds what it says, and operations taken apart are those that torch has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import islands
from bench.islands import DTYPES, NORMS_AND_SOFTMAX, Rounded, compare, markdown, variants
from bench.runs import moving_person
from bench.untrained import untrained_checkpoint
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.poses.keypoints import PoseSequence

RNG = torch.Generator().manual_seed(0)
X, WEIGHT, BIAS = torch.randn(2, 8, 6, 5, generator=RNG), torch.randn(8, generator=RNG), torch.randn(8, generator=RNG)
TOKENS, MASK = torch.randn(3, 2, 2, 7, 8, generator=RNG), torch.rand(7, 7, generator=RNG) > 0.3
MASK.fill_diagonal_(True)  # a row of nothing is not a number
OPERATIONS: list[tuple[str, Callable[[], Tensor]]] = [
    ("GroupNorm", lambda: F.group_norm(X, 4, WEIGHT, BIAS)),
    ("GroupNorm", lambda: F.group_norm(X.flatten(2), 2, WEIGHT, BIAS, 1e-3)),
    ("LayerNorm", lambda: F.layer_norm(X.permute(0, 2, 3, 1), (8,), WEIGHT, BIAS)),
    ("softmax", lambda: F.scaled_dot_product_attention(*TOKENS)),
    ("softmax", lambda: F.scaled_dot_product_attention(*TOKENS, MASK)),
    ("softmax", lambda: F.scaled_dot_product_attention(*TOKENS, MASK.float())),
]


@torch.inference_mode()
@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_an_operation_taken_apart_is_torchs(name: str, operation: Callable[[], Tensor]) -> None:
    mode = Rounded(torch.float32, (name,))
    with mode:
        result = operation()
    assert mode.num_low == 1
    torch.testing.assert_close(result, operation(), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("name", "operation"), OPERATIONS)
def test_its_insides_are_rounded_only_where_it_is_named(
    name: str, operation: Callable[[], Tensor], dtype: torch.dtype
) -> None:
    exact = operation()
    results = []
    for low in ((), (name,)):
        with Rounded(dtype, low):
            results.append(operation())
        assert torch.equal(results[-1], results[-1].to(dtype).float())
    assert torch.equal(results[0], exact.to(dtype).float())
    assert (results[1] - exact).abs().mean() > (results[0] - exact).abs().mean()


@torch.inference_mode()
def test_a_variance_beyond_the_type_is_not_finite() -> None:
    """What the islands are for: torch's own norm has float32 inside."""
    wide = torch.linspace(-600, 600, 240).reshape(1, 8, 6, 5)
    results = []
    for low in ((), ("GroupNorm",)):
        with Rounded(torch.float16, low) as mode:
            results.append(F.group_norm(wide, 1, torch.ones(8), torch.zeros(8)))
        assert (mode.largest > 65504) == bool(low)
    assert results[0].std() > 0.9 and results[1].abs().max() == 0  # divided by infinity


@torch.inference_mode()
def test_operations_in_place_and_views_are_rounded_where_they_lie() -> None:
    x = torch.zeros(4)
    with Rounded(torch.bfloat16) as mode:
        x[1:3].add_(torch.full((2,), 1.01))
    assert x.tolist() == [0, torch.tensor(1.01).bfloat16().item(), torch.tensor(1.01).bfloat16().item(), 0]
    assert mode.largest == pytest.approx(1.01)


@torch.inference_mode()
def test_numbers_that_become_of_the_type_are_rounded() -> None:
    with Rounded(torch.bfloat16):
        assert torch.tensor([981]).to(torch.float32).item() == 980


def build(checkpoint: Checkpoint, folder: Path) -> Path:
    checkpoint.save(folder / "tuned.ckpt")
    return build_engine(folder / "tuned.ckpt", folder / "tuned.engine", BuildOptions("torch", "fp32")).folder.path


TARGET, TRUTH = (
    moving_person(3, (32, 32), phase=1.0),
    np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8),
)


def test_what_16_bits_do_not_hold_is_told(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_built = {precision: {"as built": variants(precision)["as built"]} for precision in ("fp16", "bf16")}
    monkeypatch.setattr(islands, "variants", as_built.__getitem__)
    checkpoint = untrained_checkpoint(str(tiny_base), num_frames=3)
    name = next(name for name in checkpoint.tensors if name.endswith("conv_temp.weight"))
    checkpoint.tensors[name].mul_(1e6)
    exact, *rows = compare(build(checkpoint, tmp_path), TARGET, TRUTH, 2)
    assert "error" not in exact
    assert {row["precision"] for row in rows if row.get("error") == "not finite"} == {"fp16"}
    assert all("error" in row for row in rows if row["precision"] == "fp16")
    assert "| fp16 | as built | not finite |  |  |" in markdown({"num_frames": 3, "steps": 1, "rows": rows})


def test_another_error_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, target: PoseSequence, steps: int, *variant: object) -> np.ndarray:
        if variant:
            raise PoseCrafterError("memory ran out")
        return TRUTH

    monkeypatch.setattr(islands, "render", fail)
    with pytest.raises(PoseCrafterError, match="memory ran out"):
        compare(tmp_path, TARGET, TRUTH, 2)


def test_every_variant_renders_and_differs_from_what_is_built(tiny_base: Path, tmp_path: Path) -> None:
    exact, *rows = compare(build(untrained_checkpoint(str(tiny_base), num_frames=3), tmp_path), TARGET, TRUTH, 2)
    assert "psnr_to_exact" not in exact
    assert [(row["precision"], row["variant"]) for row in rows] == [
        (precision, name) for precision in DTYPES for name in variants(precision)]  # fmt: skip
    for row in rows:
        assert (row["num_low"] > 0) == any(row["variant"].endswith(name) for name in (*NORMS_AND_SOFTMAX, "three"))
    bf16 = {row["variant"]: row["psnr_to_exact"] for row in rows if row["precision"] == "bf16"}
    assert len(set(bf16.values())) == len(bf16) and all(20 < quality < 90 for quality in bf16.values())
