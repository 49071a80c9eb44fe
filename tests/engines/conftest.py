"""The tiny base as an OpenVINO folder, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from posecrafter_rt.engines.openvino import OpenVinoBackend
from posecrafter_rt.models.loading import PoseModel, load_base


@pytest.fixture(scope="session")
def plain_model(tiny_base: Path) -> PoseModel:
    """The tiny base, folded, in float32; do not change it."""
    model = load_base(str(tiny_base))
    model.fold()
    return model


@pytest.fixture(scope="session")
def openvino_networks(plain_model: PoseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `OpenVinoBackend.build` writes; do not write to it."""
    folder = tmp_path_factory.mktemp("openvino") / "networks"
    folder.mkdir()
    OpenVinoBackend().build(plain_model, plain_model.architecture(), folder, "fp32", lambda stage: None)
    return folder
