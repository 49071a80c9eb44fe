"""What running TensorRT plans does without TensorRT: stand-ins for its refitter and its context note what they are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn

from posecrafter_rt.engines import tensorrt as backend_module
from posecrafter_rt.engines import tensorrt_runtime as runtime_module
from posecrafter_rt.engines.description import read_description, write_description
from posecrafter_rt.engines.refit import graph_digest, write_graphs
from posecrafter_rt.engines.tensorrt import TensorRTBackend
from posecrafter_rt.engines.tensorrt_runtime import Slot, refit
from posecrafter_rt.errors import CheckpointError
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import network_specs
from posecrafter_rt.tensor_file import save_tensors


def test_a_weight_beyond_the_stored_type_is_refused_before_the_plan_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[tuple[str, torch.dtype] | str] = []
    refitter = SimpleNamespace(
        get_all_weights=lambda: ["w"], get_missing_weights=lambda: ["merged"],
        set_named_weights=lambda name, weights: did.append((name, weights)) or True,
        refit_cuda_engine=lambda: did.append("refitted") or True,
    )  # fmt: skip
    library = SimpleNamespace(Refitter=lambda *arguments: refitter, Weights=lambda dtype, *memory: dtype)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(runtime_module, "make_logger", lambda: None)
    monkeypatch.setattr(runtime_module, "trt_dtype", lambda dtype: dtype)

    stored = {"w": torch.zeros(2).half(), "merged": torch.tensor([-torch.inf]).half()}  # what was there is not judged

    def give(value: float) -> None:
        plan: Any = None
        refit(plan, {"w": torch.tensor([1.0, value])}, stored, stored.__getitem__, "hint")

    with pytest.raises(CheckpointError, match=r"^w does not fit torch\.float16$") as caught:
        give(1e5)
    assert caught.value.hint == "build the engine with --precision bf16" and not did
    give(6e4)
    assert did == [("w", torch.float16), ("merged", torch.float16), "refitted"]


def test_a_recording_that_fails_without_a_message_is_named_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(runtime_module, "recording", fails)
    slot: Any = Slot.__new__(Slot)
    slot.spec, slot.records = SimpleNamespace(name="unet"), True
    slot.workspace = SimpleNamespace(stream=SimpleNamespace(synchronize=lambda: None))
    assert slot._record() is None and not slot.records
    assert "unet runs without a CUDA graph: RuntimeError" in caplog.text


@pytest.mark.parametrize("num_bytes", [0, 7])
def test_a_network_without_inner_memory_is_bound_to_none(num_bytes: int) -> None:
    bound: list[tuple[int, int]] = []
    slot: Any = Slot.__new__(Slot)
    slot.num_bytes, slot.generation, slot.graphs = num_bytes, -1, {}
    slot.context = SimpleNamespace(set_device_memory=lambda *memory: bound.append(memory))
    slot.workspace = SimpleNamespace(reserve=lambda num_bytes: None, generation=0, memory=torch.empty(num_bytes))
    slot._take_workspace()
    assert len(bound) == (num_bytes > 0) and all(address for address, _ in bound)


def test_a_refit_lets_a_plan_go_before_another_is_read(
    plain_model: PoseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was written is read to be compared, and then comes the next network's."""
    arch, networks = plain_model.architecture(), plain_model.networks()
    plans, held = WeakSet[Any](), list[int]()

    def read(*arguments: object) -> Any:
        plan = nn.Identity()
        plans.add(plan)
        held.append(len(plans))
        return plan

    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    for name, network in networks.items():
        others = {key: parameter + 1 for key, parameter in network.named_parameters()}
        save_tensors(others, source / f"{name}.safetensors")
    write_graphs(source, {name: graph_digest(network, network_specs(arch)[name], arch)
                          for name, network in networks.items()})  # fmt: skip
    (source / backend_module.TIMING_CACHE).touch()
    write_description(source, {name: {"plugins": 1, "error": 1.0} for name in networks})
    (source / backend_module.DESCRIPTION).write_text(json.dumps({"tensorrt": "11.4.0", "device": "A (8.6)"}))
    monkeypatch.setattr(backend_module, "gpu_name", lambda: "A (8.6)")
    monkeypatch.setattr(backend_module, "_version", lambda: "11.4.0")
    monkeypatch.setattr(backend_module, "_deserialize", read)
    monkeypatch.setattr(backend_module, "refit", lambda *arguments: None)
    monkeypatch.setattr(backend_module, "_serialize", lambda plan: b"")
    monkeypatch.setattr(TensorRTBackend, "_compare", lambda *arguments: read() and 0.25)
    TensorRTBackend().refit(source, folder, plain_model, arch, "fp32", lambda stage: None)
    assert held == [1] * 2 * len(networks)
    assert read_description(folder) == {name: {"plugins": 1, "error": 0.25} for name in networks}
