"""What every engine refuses before it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posecrafter_rt.engines.base import InputChecker, fitting_weights
from posecrafter_rt.errors import CheckpointError, ShapeError
from posecrafter_rt.spec import NetworkSpec, TensorSpec

CPU = torch.device("cpu")
SPEC = NetworkSpec(
    "net",
    (TensorSpec("latents", ("frames", 4, "height/2", "width/2")), TensorSpec("residual", ("frames", 8, "height/4", 3)),
     TensorSpec("text", ("groups", 5)), TensorSpec("ids", ("steps",), "int64")),
    (),
)  # fmt: skip


def inputs(**changes: Tensor) -> dict[str, Tensor]:
    good = {"latents": torch.zeros(6, 4, 8, 6), "residual": torch.zeros(6, 8, 4, 3), "text": torch.zeros(2, 5),
            "ids": torch.zeros(3, dtype=torch.int64)}  # fmt: skip
    return {**good, **changes}


def test_inputs_come_back_in_order() -> None:
    checked = InputChecker(SPEC, CPU)(dict(reversed(inputs().items())))
    assert [tuple(tensor.shape) for tensor in checked] == [(6, 4, 8, 6), (6, 8, 4, 3), (2, 5), (3,)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latents": torch.zeros(6, 3, 8, 6)}, "latents"),
        ({"latents": torch.zeros(6, 4, 8)}, "latents"),
        ({"latents": torch.zeros(0, 4, 8, 6)}, "latents"),
        ({"residual": torch.zeros(1, 8, 4, 3)}, "residual is .* with frames 6"),  # torch would broadcast it
        ({"residual": torch.zeros(6, 8, 8, 3)}, "height 16"),
        ({"text": torch.zeros(4, 5)}, "6 frames do not divide into 4 groups"),
        ({"text": torch.zeros(2, 5, dtype=torch.float64)}, "text is torch.float64"),
        ({"ids": torch.zeros(3)}, "ids is torch.float32"),
        ({"more": torch.zeros(1)}, "more"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Tensor], named: str) -> None:
    with pytest.raises(ShapeError, match=named):
        InputChecker(SPEC, CPU)(inputs(**changes))


def test_what_does_not_fit_is_named_after_what_did() -> None:
    check = InputChecker(SPEC, CPU)
    given = inputs()
    for _ in range(2):
        assert all(one is other for one, other in zip(check(given), given.values(), strict=True))
    for changes in ({"latents": torch.zeros(6, 3, 8, 6)}, {"ids": torch.zeros(3)}, {"more": torch.zeros(1)}):
        with pytest.raises(ShapeError):
            check(given | changes)


def test_a_missing_input_is_named() -> None:
    given = inputs()
    del given["text"]
    with pytest.raises(ShapeError, match="text"):
        InputChecker(SPEC, CPU)(given)


def test_only_weights_that_are_held_and_fit_are_taken() -> None:
    held = {"unet.a": (2, 3)}
    tensors = {"unet.a": torch.zeros(2, 3), "controlnet.b": torch.zeros(1)}
    assert set(fitting_weights(held, tensors)) == {"unet.a"}
    with pytest.raises(CheckpointError, match=r"unet.a has shape \(3, 2\)"):
        fitting_weights(held, {"unet.a": torch.zeros(3, 2)})
