"""Free dimensions and the inputs drawn for them."""

from __future__ import annotations

import pytest
import torch

from posecrafter_rt.export.shapes import random_inputs, resolve_shape, split_dim
from posecrafter_rt.spec import NetworkSpec, TensorSpec

SPEC = NetworkSpec("any", (TensorSpec("x", ("frames", 4, "height/8", "width")), TensorSpec("ids", (2,), "int64")), ())
SIZES = {"frames": 3, "height": 64, "width": 24}


def test_dimensions_are_divided() -> None:
    assert split_dim("height/8") == ("height", 8) and split_dim("frames") == ("frames", 1)
    assert resolve_shape(SPEC.inputs[0].dims, SIZES) == (3, 4, 8, 24)
    with pytest.raises(KeyError):
        resolve_shape(("groups",), SIZES)


def test_random_inputs_have_the_spec_s_shapes_and_follow_the_seed() -> None:
    inputs, again, other = (random_inputs(SPEC, SIZES, seed) for seed in (1, 1, 2))
    assert inputs["x"].shape == (3, 4, 8, 24) and inputs["x"].dtype == torch.float32
    assert inputs["ids"].shape == (2,) and inputs["ids"].dtype == torch.int64
    assert torch.equal(inputs["x"], again["x"]) and not torch.equal(inputs["x"], other["x"])
