"""One file of weights for several networks: each computes what it did, and equal constants lie there once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13 as op
from torch import Tensor

from posecrafter_rt.engines.openvino_weights import SharedWeights, weights_path
from tests.engines.openvino_models import constant, draw, parameter

PIXELS = draw(1, 6)


def save(path: Path, *weights: Tensor) -> Path:
    """A network that multiplies by one weight after another and then reshapes, by constants without a name."""
    result: Any = parameter(PIXELS)
    for index, weight in enumerate(weights):
        of = constant(weight)
        of.set_friendly_name(f"unet.{index}")
        result = op.matmul(result, of, False, True)
    result = op.reshape(result, np.array([-1, 1]), special_zero=False)
    openvino.save_model(openvino.Model([result], [result_input(result)], "network"), path, compress_to_fp16=False)
    return path


def result_input(node: Any) -> Any:
    while node.get_type_name() != "Parameter":
        node = node.input_value(0).get_node()
    return node


def run(path: Path) -> Tensor:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path, weights_path(path)), "CPU")
    return torch.from_numpy(compiled([PIXELS.numpy()])[0].copy())


def test_networks_compute_the_same_from_the_file_that_they_share(tmp_path: Path) -> None:
    first, second, third = draw(6, 6, seed=1), draw(6, 6, seed=2), draw(6, 6, seed=3)
    almost = first.clone()
    almost[-1, -1] += 1  # begins as another does
    networks = {"unet": (first, second), "unet_stream": (second, third, first), "unet_shallow": (almost, second)}
    paths = [save(tmp_path / f"{name}.xml", *weights) for name, weights in networks.items()]
    core = openvino.Core()
    before = [torch.from_numpy(core.compile_model(path, "CPU")([PIXELS.numpy()])[0].copy()) for path in paths]
    shared = SharedWeights(tmp_path / "unet.bin")
    sizes = [shared.add(path) for path in paths]
    assert all(torch.equal(run(path), right) for path, right in zip(paths, before, strict=True))
    assert sorted(file.name for file in tmp_path.glob("*.bin")) == ["unet.bin"]
    matrix = 6 * 6 * 4
    assert [size // matrix for size in sizes] == [2, 3, 2]
    assert (tmp_path / "unet.bin").stat().st_size // matrix == 4  # first, second, third, almost


@pytest.mark.parametrize(("name", "holder"), [("unet_stream", "unet"), ("controlnet_stream", "controlnet"),
                                              ("unet", "unet"), ("vae_decoder", "vae_decoder")])  # fmt: skip
def test_a_stream_has_the_weights_of_the_network_that_renders(tmp_path: Path, name: str, holder: str) -> None:
    assert weights_path(tmp_path / f"{name}.xml") == tmp_path / f"{holder}.bin"


def test_an_empty_constant_takes_no_place(tmp_path: Path) -> None:
    given = parameter(PIXELS)
    for index in range(2):
        result = op.concat([given, op.constant(np.zeros((1, 0), np.float32))], 1)
        openvino.save_model(openvino.Model([result], [given], "network"), tmp_path / f"{index}.xml")
    shared = SharedWeights(tmp_path / "unet.bin")
    for index, name in enumerate(("unet", "unet_stream")):
        path = (tmp_path / f"{index}.xml").rename(tmp_path / f"{name}.xml")
        (tmp_path / f"{index}.bin").rename(tmp_path / f"{name}.bin")
        shared.add(path)
        assert torch.equal(run(path), PIXELS)
