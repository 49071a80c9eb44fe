"""The tiny base as an OpenVINO folder, and its decoder compiled by AOTInductor, built once; the OpenVINO operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posecrafter_rt.engines import openvino_operations as operations
from posecrafter_rt.engines.inductor import InductorBackend, write_weights
from posecrafter_rt.engines.openvino import OpenVinoBackend
from posecrafter_rt.machine import cpu_features
from posecrafter_rt.models.loading import PoseModel, load_base
from posecrafter_rt.spec import network_specs
from tests.tiny import some_tuned


@pytest.fixture(scope="session")
def plain_model(tiny_base: Path) -> PoseModel:
    """The tiny base, folded, in float32; do not change it. Some of each kind of weights count as tuned."""
    model = load_base(str(tiny_base))
    model.tuned = some_tuned(model)
    model.unet.gives_deep_features = True  # as in engines, whose graphs are then the same
    model.fold()
    return model


@pytest.fixture(scope="session")
def openvino_networks(plain_model: PoseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `OpenVinoBackend.build` writes for 32 × 32 pixels; do not write to it."""
    folder = tmp_path_factory.mktemp("openvino") / "networks"
    folder.mkdir()
    arch = replace(plain_model.architecture(), size=(32, 32))  # traced in half the time that any size takes
    OpenVinoBackend().build(plain_model, arch, folder, "fp32", lambda stage: None)
    return folder


@pytest.fixture(scope="session")
def inductor_decoder(plain_model: PoseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `InductorBackend.build` writes of the decoder for 32 × 32 pixels; do not write to it.

    The cheapest network that is worth it: to compile all takes minutes. It is compiled where there is one thread.
    """
    folder = tmp_path_factory.mktemp("inductor") / "networks"
    folder.mkdir()
    arch = replace(plain_model.architecture(), size=(32, 32))
    network, spec = plain_model.networks()["vae_decoder"], network_specs(arch)["vae_decoder"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        write_weights(folder, InductorBackend().build_network(network, spec, arch, folder, "fp32")[1])
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture
def operation() -> None:
    """Skips where the OpenVINO operations cannot be had; compiled when the first test asks, not while tests are collected."""
    reason = operations.missing_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def byte_operation() -> None:
    """Skips where those in eight bits cannot be had; a test of `lanes` asks for these first, which may have no VNNI."""
    reason = operations.missing_bytes_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=[16, 8], ids=lambda lanes: f"{lanes}-lanes")
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The operations with vectors of so many floats, and with all else that this processor has; skips where they cannot be had."""
    return take_vectors(request, monkeypatch, request.param)


def take_vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, lanes: int, **others: bool) -> int:
    """The widest that this processor has of so many floats, and with these fields, are used; skips where it has none."""
    wanted = {"lanes": lanes, **others}
    found = [vectors for vectors in operations.VECTORS
             if vectors.needed <= cpu_features() and wanted.items() <= vectors._asdict().items()]  # fmt: skip
    if not found:
        pytest.skip(f"this processor has no such vectors: {wanted}")
    monkeypatch.setattr(operations, "cpu_features", lambda: found[0].needed)
    request.getfixturevalue("operation")
    if operations.left_out() is not None:
        pytest.skip(f"the compiler here does not know them: {operations.left_out()}")
    return lanes


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about the operations is forgotten, before and after."""
    operations._built.cache_clear()
    yield
    operations._built.cache_clear()
