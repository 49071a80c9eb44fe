"""What refitting compares: manifests fact by fact, graphs by their hashes, weights by their bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from posecrafter_rt.engines.folder import EngineFolder
from posecrafter_rt.engines.refit import (
    GRAPHS_FILE,
    changed_weights,
    check_graph,
    check_source,
    check_weights,
    graph_digest,
    in_stored_type,
    read_graphs,
    same_bits,
    write_graphs,
)
from posecrafter_rt.engines.tensorrt import in_types_of
from posecrafter_rt.errors import EngineFolderError
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import network_specs

MANIFEST: dict[str, Any] = {
    "package": "1.0", "device": {"type": "cpu", "name": "here"}, "backend": "torch", "precision": "fp32",
    "size": [32, 48], "base_hash": "0" * 64, "norm_scope": "frame", "max_frames": 64, "architecture": {"residuals": [[1, 2]]},
    "libraries": {"python": "3.12", "torch": "2.13"},
}  # fmt: skip


def check(built: dict[str, Any], wanted: dict[str, Any]) -> None:
    check_source(EngineFolder(Path("a.engine"), built), wanted)


def test_equal_facts_pass_whatever_else_is_there() -> None:
    check({**MANIFEST, "prompt": "a man", "checkpoint": "a"}, {**MANIFEST, "prompt": "a woman", "checkpoint": "b"})
    check(MANIFEST, {**MANIFEST, "size": (32, 48), "architecture": {"residuals": ((1, 2),)}})  # as code has them
    check(MANIFEST, {"backend": "torch"})


@pytest.mark.parametrize("name", [name for name in MANIFEST if name != "libraries"])
def test_every_fact_counts_also_where_it_is_missing(name: str) -> None:
    other = {"size": [32, 32], "device": {"type": "cpu", "name": "there"}, "architecture": {}}.get(name, "another")
    for built in ({**MANIFEST, name: other}, {key: value for key, value in MANIFEST.items() if key != name}):
        with pytest.raises(
            EngineFolderError, match=r"^a\.engine cannot be refitted to this checkpoint: its "
        ) as caught:
            check(built, MANIFEST)
        assert caught.value.hint and "without --refit" in caught.value.hint and "\n" not in str(caught.value)


def test_options_that_would_do_are_named() -> None:
    with pytest.raises(EngineFolderError) as caught:
        check(MANIFEST, {"size": [64, 64]})
    assert caught.value.hint == "give --size 32x48, or build without --refit"
    with pytest.raises(EngineFolderError, match="its most frames at once is 64, not 32") as caught:
        check(MANIFEST, {"max_frames": 32})
    assert caught.value.hint == "give --max-frames 64, or build without --refit"


def test_a_graph_is_known_by_all_but_its_weights(make_tiny_model: Callable[..., PoseModel]) -> None:
    def digests(model: PoseModel) -> dict[str, str]:
        specs, arch = network_specs(model.architecture()), model.architecture()
        return {name: graph_digest(network, specs[name], arch) for name, network in model.networks().items()}

    model = make_tiny_model("frame")
    model.fold()
    before = digests(model)
    limited = replace(model.architecture(), max_frames=8)  # which no graph depends on
    assert before == {name: graph_digest(network, network_specs(limited)[name], limited)
                      for name, network in model.networks().items()}  # fmt: skip
    for parameter in model.unet.parameters():
        parameter.data.mul_(2)
    assert digests(model) == before
    clip = make_tiny_model("clip")
    clip.fold()
    assert {name for name, digest in digests(clip).items() if digest != before[name]} >= {"unet", "controlnet"}
    assert digests(make_tiny_model("frame"))["unet"] != before["unet"]  # not folded


def test_graphs_are_read_as_written_and_compared(tmp_path: Path) -> None:
    write_graphs(tmp_path, {"unet": "a", "vae_decoder": None})
    graphs = read_graphs(tmp_path)
    check_graph(tmp_path, graphs, "unet", "a")
    for name, digest, match in (
        ("unet", "b", "its unet was exported from another configuration"),
        ("vae_decoder", "a", "weights of its vae_decoder were merged"),
        ("controlnet", "a", "controlnet"),
    ):
        with pytest.raises(EngineFolderError, match=match):
            check_graph(tmp_path, graphs, name, digest)
    (tmp_path / GRAPHS_FILE).write_text("{")
    with pytest.raises(EngineFolderError, match=GRAPHS_FILE):
        read_graphs(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_bits_are_compared_not_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 2]]).to(dtype)
    assert same_bits(tensor, tensor.clone()) and not same_bits(tensor, tensor + 1)
    assert not same_bits(tensor, tensor[0]) and same_bits(tensor[0, 0], tensor[0, 0].clone())
    if dtype.is_floating_point:
        assert not same_bits(torch.tensor([0.0], dtype=dtype), torch.tensor([-0.0], dtype=dtype))
        nothing = torch.tensor([float("nan")], dtype=dtype)
        assert same_bits(nothing, nothing.clone())


@pytest.mark.parametrize(("value", "dtype", "fits"), [
    (6e4, torch.float16, True), (1e5, torch.float16, False), (1e5, torch.bfloat16, True), (1e5, torch.float32, True),
    (float("nan"), torch.float32, False)])  # fmt: skip
def test_what_a_stored_type_does_not_hold_is_refused(value: float, dtype: torch.dtype, fits: bool) -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, value], [2.0, 3.0]]).T)
    if fits:
        stored = in_stored_type("w", weight, dtype)
        assert stored.dtype == dtype and stored.is_contiguous() and not stored.requires_grad
        assert torch.equal(stored, weight.to(dtype))
    else:
        with pytest.raises(EngineFolderError, match=f"^w does not fit {dtype}$") as caught:
            in_stored_type("w", weight, dtype)
        assert ("--precision bf16" in str(caught.value.hint)) == (dtype == torch.float16)  # else none is wider


def test_weights_that_are_not_stored_yet_are_those_that_are_judged() -> None:
    one, infinite = torch.ones(2).half(), torch.tensor([torch.inf]).half()
    assert set(changed_weights({"a": one, "n": torch.tensor([3])}, {})) == {"a", "n"}
    assert set(changed_weights({"a": one, "b": infinite}, {"a": one + 1, "b": infinite})) == {"a"}
    for check, hint in ((check_weights, "build the engine with"),
                        (partial(changed_weights, stored={"b": torch.zeros(1).half()}), "build without --refit, with")):  # fmt: skip
        with pytest.raises(EngineFolderError, match=r"^b does not fit torch\.float16$") as caught:
            check({"b": infinite})
        assert caught.value.hint == f"{hint} --precision bf16"


def test_weights_of_a_plan_change_in_their_stored_type() -> None:
    def changed(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return changed_weights(in_types_of(stored, network), stored)

    network = torch.nn.Linear(2, 1)
    network.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
    network.bias.data.fill_(1.0)
    stored = {"weight": torch.tensor([[1.0, 2.0]]).half(), "bias": torch.tensor([0.5]), "constant": torch.zeros(3)}
    assert set(changed(stored)) == {"bias"}
    network.bias.data.fill_(-torch.inf)
    assert not changed({"bias": torch.tensor([-torch.inf])})  # what is stored is not judged
    network.bias.data.fill_(1.0)
    network.weight.data[0, 0] = 1 + 2**-12  # equal in float16
    assert set(changed(stored)) == {"bias"}
    network.weight.data[0, 0] = 1.5
    replaced = changed(stored)
    assert set(replaced) == {"weight", "bias"} and replaced["weight"].dtype == torch.float16
    network.weight.data[0, 0] = 1e6
    with pytest.raises(EngineFolderError, match="weight does not fit"):
        changed(stored)
