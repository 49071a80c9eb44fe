"""A stream's networks in OpenVINO: of frames that follow a reference nothing is computed that only its own frame has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from torch import Tensor

from posecrafter_rt.engines.openvino import OpenVinoBackend
from posecrafter_rt.engines.openvino_streams import REFERENCES_OWN, leave_out_reference
from posecrafter_rt.engines.openvino_weights import weights_path
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.export.verify import relative_error
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import IS_REFERENCE, STREAM_NETWORKS, network_specs

SIZES = {"frames": 3, "groups": 1, "steps": 3, "window": 3, "height": 32, "width": 32}


def load(model: PoseModel, networks: Path, cache: Path) -> dict[str, Any]:
    return OpenVinoBackend().load(networks, model.architecture(), "fp32", cache)


def draw(model: PoseModel, name: str, is_reference: list[bool]) -> dict[str, Tensor]:
    inputs = random_inputs(network_specs(model.architecture())[name], SIZES, seed=1)
    return inputs | {IS_REFERENCE: torch.tensor(is_reference)}


@pytest.mark.parametrize("is_reference", [[False] * 3, [True] * 3, [False, True, False]])
@pytest.mark.parametrize("name", STREAM_NETWORKS)
def test_a_reference_gives_its_own_and_frames_that_follow_one_do_not(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path, name: str, is_reference: list[bool]
) -> None:
    engine, inputs = load(plain_model, openvino_networks, tmp_path)[name], draw(plain_model, name, is_reference)
    with torch.no_grad():
        expected = plain_model.networks()[name](*inputs.values())
    wanted = dict(zip((out.name for out in engine.spec.outputs), expected, strict=True))
    own = {key for key in wanted if key.startswith(REFERENCES_OWN)}
    found = engine(**inputs)
    assert own and set(found) == set(wanted) - (set() if any(is_reference) else own)
    assert list(found) == [key for key in wanted if key in found]
    assert all(relative_error(found[key], wanted[key]) < 1e-5 for key in found)


def test_calls_of_either_kind_may_follow_each_other(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    """Also where another process has compiled both."""
    kinds = [draw(plain_model, "unet_stream", is_reference) for is_reference in ([False] * 3, [True] * 3)]
    anew = [load(plain_model, openvino_networks, tmp_path)["unet_stream"](**inputs) for inputs in kinds]
    expected = [outputs["noise_pred"].clone() for outputs in anew]
    engine = load(plain_model, openvino_networks, tmp_path)["unet_stream"]
    for _ in range(2):
        for inputs, wanted in zip(kinds, expected, strict=True):
            assert torch.equal(engine(**inputs)["noise_pred"], wanted)
    assert not torch.equal(*expected) and len(engine._requests) == 2


@pytest.mark.parametrize("name", STREAM_NETWORKS)
def test_nothing_is_computed_for_a_reference_that_is_not_there(
    plain_model: PoseModel, openvino_networks: Path, name: str
) -> None:
    """Of key-frame attention in each block queries are left of the frames themselves, and no question."""

    def constants(model: openvino.Model) -> set[str]:
        return {node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "Constant"}

    graph = openvino_networks / f"{name}.xml"
    whole, model = (openvino.Core().read_model(graph, weights_path(graph)) for _ in range(2))
    leave_out_reference(model)
    weights = {key for key in constants(whole) if key.endswith((".attn1.to_k.weight", ".attn1.to_v.weight"))}
    assert weights and constants(whole) & weights and not constants(model) & weights
    assert not any(IS_REFERENCE in each.get_names() for each in model.inputs)
    assert len(whole.outputs) - len(model.outputs) == len(weights) / 2


def test_a_network_that_does_not_ask_stays_as_it_is(openvino_networks: Path) -> None:
    whole, model = (openvino.Core().read_model(openvino_networks / "unet.xml") for _ in range(2))
    leave_out_reference(model)
    assert len(model.get_ops()) == len(whole.get_ops())


def test_weights_that_frames_do_not_need_are_swapped_all_the_same(
    plain_model: PoseModel, openvino_networks: Path, tmp_path: Path
) -> None:
    engine = load(plain_model, openvino_networks, tmp_path)["controlnet_stream"]
    key = "controlnet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    weight = dict(plain_model.networks()["controlnet_stream"].named_parameters())[key].detach()
    follows, leads = (draw(plain_model, "controlnet_stream", [value] * 3) for value in (False, True))

    def residual(inputs: dict[str, Tensor]) -> Tensor:
        return engine(**inputs)["mid_block_residual"].clone()

    before = residual(follows), residual(leads)
    assert engine.swap_weights({key: weight * 2}) == {key}
    assert torch.equal(residual(follows), before[0]) and not torch.equal(residual(leads), before[1])
