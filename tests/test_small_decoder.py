"""An engine with a small decoder: who takes it, who must ask for it, where it comes from, and that it is what was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.config import cache_dir
from posecrafter_rt.engines import get_backend
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError
from posecrafter_rt.export.onnx import export_network, save_model
from posecrafter_rt.export.verify import default_cases, verify_network
from posecrafter_rt.models.small_decoder import describe_config, new_small_decoder
from posecrafter_rt.spec import SMALL_DECODER, network_specs
from tests.models.test_small_decoder import tiny_taesd
from tests.tiny import SIZE, TORCH, some_poses


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of other tests, and in it a small decoder that was not trained."""
    return with_small_decoder(tiny_checkpoint, tmp_path_factory.mktemp("tuned") / "small.ckpt", seed=0)


def with_small_decoder(source: Path, path: Path, seed: int) -> Path:
    tuned, small = Checkpoint.load(source), new_small_decoder(4, 2, torch.Generator().manual_seed(seed))
    named = {f"small_decoder.{name}": parameter.detach() for name, parameter in small.named_parameters()}
    replace(tuned, tensors={**tuned.tensors, **named},
            metadata={**tuned.metadata, "small_decoder": describe_config(small)}).save(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(checkpoint, tmp_path_factory.mktemp("engines") / "small.engine", TORCH).folder.path


def test_renders_take_it_when_they_are_told_to_and_say_so(engine: Path) -> None:
    poses = some_poses(2)
    with Avatar.load(engine) as avatar:
        full = avatar.render(poses, num_inference_steps=2)
        assert "decoder" not in avatar.last_report.to_json()["approximations"]
        small = avatar.render(poses, num_inference_steps=2, decoder="small")
        assert avatar.last_report.to_json()["approximations"]["decoder"] == "small"
        assert not np.array_equal(small, full)
        assert np.array_equal(avatar.render(poses, num_inference_steps=2, decoder="full"), full)
        with pytest.raises(PoseCrafterError, match="unknown decoder 'tiny'"):
            avatar.render(poses, decoder="tiny")


def test_streams_take_it_unless_they_are_told_not_to(engine: Path) -> None:
    pose = some_poses(1).keypoints[0]
    with Avatar.load(engine) as avatar:
        frames = {}
        for decoder in (None, "small", "full"):
            with avatar.stream(steps=1, decoder=decoder) as stream:
                assert stream.reference.decoder == decoder or decoder is None
                frames[decoder] = stream.step(pose)
        assert np.array_equal(frames[None], frames["small"]) and not np.array_equal(frames["small"], frames["full"])


def test_an_engine_without_one_says_how_to_get_it(avatar: Avatar) -> None:
    for ask in (lambda: avatar.render(some_poses(1), decoder="small"), lambda: avatar.stream(decoder="small")):
        with pytest.raises(PoseCrafterError, match="no small decoder") as caught:
            ask()
        assert "--small-decoder" in str(caught.value.hint)
    with avatar.stream(steps=1) as stream:
        assert stream.reference.decoder == "full"


def test_one_that_is_given_takes_the_checkpoints_place(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    tiny_taesd(seed=5).save_pretrained(tmp_path / "taesd")
    options = replace(TORCH, small_decoder=str(tmp_path / "taesd"))
    built = build_engine(checkpoint, tmp_path / "given.engine", options)
    assert build_engine(checkpoint, tmp_path / "given.engine", options).was_current
    pose = some_poses(1).keypoints[0]
    with Avatar.load(engine) as ours, Avatar.load(built.folder.path) as given:
        latents = torch.randn(1, 4, SIZE[0] // 2, SIZE[1] // 2, generator=torch.Generator().manual_seed(0))
        expected = tiny_taesd(seed=5).decode(latents).sample
        torch.testing.assert_close(
            given.engines[SMALL_DECODER](latents=latents)["pixels"], expected, rtol=1e-4, atol=1e-5
        )
        with ours.stream(steps=1) as first, given.stream(steps=1) as second:
            assert not np.array_equal(first.step(pose), second.step(pose))
    tiny_taesd(seed=6).save_pretrained(tmp_path / "taesd")
    assert not build_engine(checkpoint, tmp_path / "given.engine", options).was_current


def test_refitting_gives_what_building_gives(tiny_checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    other = with_small_decoder(tiny_checkpoint, tmp_path / "other.ckpt", seed=1)
    refitted = build_engine(other, tmp_path / "refitted.engine", BuildOptions(refit=engine)).folder
    built = build_engine(other, tmp_path / "built.engine", TORCH).folder
    assert {name: digest for name, digest in refitted.manifest["files"].items() if name.startswith("networks/")} == {
        name: digest for name, digest in built.manifest["files"].items() if name.startswith("networks/")}  # fmt: skip
    without = build_engine(tiny_checkpoint, tmp_path / "without.engine", TORCH).folder.path
    for checkpoint, source in ((tiny_checkpoint, engine), (other, without)):  # it has one network less, or more
        with pytest.raises(EngineFolderError, match="cannot be refitted"):
            build_engine(checkpoint, tmp_path / "refused.engine", BuildOptions(refit=source))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ours", "taesd"])
def test_it_is_exported_and_runs_in_openvino_as_in_torch(
    kind: str, make_tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model()
    model.small_decoder = tiny_taesd() if kind == "taesd" else new_small_decoder(4, 2, torch.Generator().manual_seed(0))
    model.fold()
    arch = replace(model.architecture(), size=SIZE)
    network, spec = model.networks()[SMALL_DECODER], network_specs(arch)[SMALL_DECODER]
    proto = export_network(network, spec, arch, graphs=BlobCache(cache_dir() / "graphs"))
    save_model(proto, tmp_path / "network.onnx")
    assert verify_network(tmp_path / "network.onnx", network, spec, default_cases(arch)) < 1e-5
    backend = get_backend("openvino")
    if backend.unsupported_reason("fp32") is not None:
        pytest.skip(str(backend.unsupported_reason("fp32")))
    model.networks = lambda: {SMALL_DECODER: network}  # the others have tests of their own
    monkeypatch.setattr("posecrafter_rt.engines.openvino.network_specs", lambda arch: {SMALL_DECODER: spec})
    (tmp_path / "networks").mkdir()
    backend.build(model, arch, tmp_path / "networks", "fp32", lambda stage: None)
    engines = backend.load(tmp_path / "networks", arch, "fp32", tmp_path / "compiled")
    for frames in (1, 3):
        latents = torch.randn(frames, 4, SIZE[0] // 2, SIZE[1] // 2, generator=torch.Generator().manual_seed(frames))
        found = engines[SMALL_DECODER](latents=latents)["pixels"]
        torch.testing.assert_close(found, network(latents)[0], rtol=1e-3, atol=1e-4)
