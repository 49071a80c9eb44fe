"""Features kept over steps: the identity that it rests on, what it saves, and who may ask for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.engines import Engine
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.models.loading import PoseModel
from posecrafter_rt.spec import SHALLOW_UNET, network_specs
from tests.tiny import some_poses

Network = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BuildOptions(backend="torch", precision="fp32")
    return build_engine(tiny_checkpoint, tmp_path_factory.mktemp("engines") / "tiny.engine", options).folder.path


@pytest.fixture
def avatar(engine: Path) -> Iterator[Avatar]:
    with Avatar.load(engine) as avatar:
        yield avatar


def check_identity(unet: Network, shallow: Network, inputs: dict[str, Tensor], tolerance: float) -> None:
    """On features of the same step the shallow U-Net is the whole one; on others it is not."""
    whole = {name: tensor.clone() for name, tensor in unet(**inputs).items()}
    given = {name: inputs[name] for name in ("latents", "time_projections", "text_kv", "down_block_residual_0")}
    found = shallow(**given, deep_features=whole["deep_features"])["noise_pred"].clone()
    torch.testing.assert_close(found, whole["noise_pred"], rtol=0, atol=tolerance)
    others = shallow(**given, deep_features=whole["deep_features"].flip(0))["noise_pred"]
    assert not torch.allclose(others, whole["noise_pred"], atol=1e-2)


@pytest.mark.parametrize("norm_scope", ["clip", "frame"])
def test_modules_on_features_of_the_same_step_give_the_same_bits(
    make_tiny_model: Callable[..., PoseModel], norm_scope: str
) -> None:
    model = make_tiny_model(norm_scope)
    model.unet.gives_deep_features = True
    networks, specs = model.networks(), network_specs(model.architecture())

    def named(name: str) -> Network:
        def call(**inputs: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                outputs = networks[name](*(inputs[tensor.name] for tensor in specs[name].inputs))
            return {tensor.name: output for tensor, output in zip(specs[name].outputs, outputs, strict=True)}

        return call

    sizes = {"frames": 6, "groups": 2, "height": 32, "width": 48}
    inputs = random_inputs(specs["unet"], sizes)
    check_identity(named("unet"), named(SHALLOW_UNET), inputs, tolerance=0)
    assert named("unet")(**inputs)["deep_features"].shape == (6, *specs["unet"].outputs[1].dims[1:2], 16, 24)


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=pytest.mark.slow)])
def test_engines_on_features_of_the_same_step_agree(tiny_checkpoint: Path, backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    options = BuildOptions(backend=backend, precision="fp32")
    with Avatar.load(build_engine(tiny_checkpoint, tmp_path / "tiny.engine", options).folder.path) as avatar:
        unet, shallow = avatar.engines["unet"], avatar.engines[SHALLOW_UNET]
        for frames, groups in ((3, 1), (6, 2)):
            check_identity(unet, shallow, random_inputs(unet.spec, {"frames": frames, "groups": groups}), 1e-5)
        exact = avatar.render(some_poses(2), num_inference_steps=2)
        assert not np.array_equal(avatar.render(some_poses(2), num_inference_steps=2, unet_every=2), exact)


class Watched:
    """An engine that notes its network's name whenever it is called for a clip, not for the reference alone."""

    def __init__(self, engine: Engine, called: list[str]) -> None:
        self.engine, self.spec, self.device, self.called = engine, engine.spec, engine.device, called
        self.has_own_threads = engine.has_own_threads

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        if len(inputs["latents"]) > 1:
            self.called.append(self.spec.name)
        return self.engine(**inputs)

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        return self.engine.swap_weights(tensors)


C, U, S = "controlnet", "unet", SHALLOW_UNET


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [C, U] * 5),
    ({"unet_every": 2}, [C, U, S, C, U, S, C, U]),
    ({"unet_every": 3}, [C, U, S, S, C, U, S]),
    ({"unet_every": 9}, [C, U, S, S, S, S]),
    ({"controlnet_every": 2}, [C, U, U, C, U, U, C, U]),
    ({"unet_every": 2, "controlnet_every": 2}, [C, U, S, C, U, S, C, U]),
    ({"unet_every": 2, "controlnet_every": 3}, [C, U, S, U, S, C, U]),
    ({"unet_every": 3, "tau": 3}, [C, U, S, C, U, S, S]),  # the latents of step 3 are others
])  # fmt: skip
def test_which_networks_run_at_which_step(
    avatar: Avatar, monkeypatch: pytest.MonkeyPatch, options: dict, expected: list[str]
) -> None:
    called: list[str] = []
    for name in (C, U, S):
        monkeypatch.setitem(avatar.engines, name, Watched(avatar.engines[name], called))
    avatar.render(some_poses(1), num_inference_steps=5, **options)
    assert called == expected


def test_a_stream_runs_whole_at_every_second_step_of_a_frame(avatar: Avatar) -> None:
    poses, frames = some_poses(3).keypoints, {}
    for every in (1, 2):
        with avatar.stream(steps=3, window=1, unet_every=every) as stream:
            frames[every] = np.stack([stream.step(pose) for pose in poses])
    assert frames[1].shape == frames[2].shape and not np.array_equal(frames[1], frames[2])


def test_the_report_names_it(avatar: Avatar) -> None:
    avatar.render(some_poses(1), num_inference_steps=2, unet_every=2)
    assert avatar.last_report is not None
    assert avatar.last_report.to_json()["approximations"] == {"num_inference_steps": 2, "unet_every": 2}


def test_it_is_built_unless_it_is_declined(tiny_checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    plain = BuildOptions(backend="torch", precision="fp32", feature_reuse=False)
    built = build_engine(tiny_checkpoint, tmp_path / "plain.engine", plain).folder
    with Avatar.load(built.path) as avatar:
        assert SHALLOW_UNET not in avatar.engines
        assert len(avatar.engines["unet"].spec.outputs) == 1
        with pytest.raises(PoseCrafterError, match="without feature reuse") as refusal:
            avatar.render(some_poses(1), preset="balanced")
        with pytest.raises(PoseCrafterError, match="without feature reuse"):
            avatar.stream(steps=2, unet_every=2)
        avatar.stream(steps=2).close()
        assert refusal.value.hint is not None and refusal.value.hint.endswith("--size 32x32")


def test_a_refitted_engine_has_it_if_its_source_had(tiny_checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    plain = BuildOptions(backend="torch", precision="fp32", feature_reuse=False)
    without = build_engine(tiny_checkpoint, tmp_path / "plain.engine", plain).folder.path
    for source, is_built in ((engine, True), (without, False)):
        refitted = build_engine(tiny_checkpoint, tmp_path / "refitted.engine", BuildOptions(refit=source)).folder
        assert refitted.manifest["feature_reuse"] == is_built
    for source, there, wanted in ((engine, "on", "off"), (without, "off", "on")):
        options = BuildOptions(refit=source, feature_reuse=wanted == "on")
        with pytest.raises(EngineFolderError, match=f"its feature reuse is {there}, not {wanted}"):
            build_engine(tiny_checkpoint, tmp_path / "other.engine", options)
