"""`--refit`: another checkpoint's engine out of an engine that is there; what building anew gives, to the bit."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.main import app
from posecrafter_rt.engines import get_backend
from posecrafter_rt.engines.folder import open_folder
from posecrafter_rt.engines.manifest import read_manifest, write_manifest
from posecrafter_rt.engines.refit import GRAPHS_FILE
from posecrafter_rt.engines.tuned_file import TUNED_FILE
from posecrafter_rt.errors import EngineFolderError, ModelError
from posecrafter_rt.export.shapes import random_inputs
from posecrafter_rt.models.loading import load_base, named_parameters
from posecrafter_rt.models.lora import Lora
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.spec import (
    ONE_FRAME_NETWORKS,
    SHALLOW_STREAM,
    SHALLOW_UNET,
    STREAM_NETWORKS,
    Architecture,
    network_specs,
)

SIZE = (32, 32)
SIZES = {"frames": 3, "groups": 1, "steps": 2, "window": 3, "height": 32, "width": 32}
TUNED = (".attn1.to_out.", ".attn_temp.", ".conv_temp.")


def poses(count: int, seed: int) -> PoseSequence:
    rng = np.random.default_rng(seed)
    points = rng.uniform(4, 28, (1, 134, 2)) + rng.normal(0, 1, (count, 134, 2))
    return PoseSequence(np.concatenate([points, np.ones((count, 134, 1))], -1).astype(np.float32), SIZE, 25.0)


def write_checkpoint(path: Path, base: Path, seed: int, decoder: str, **metadata: Any) -> Path:
    """A checkpoint with other weights, frames, poses and prompt for each seed. decoder: a part of the names that it
    has tuned of the autoencoder's decoder."""
    model, generator = load_base(str(base)), torch.Generator().manual_seed(seed)
    tensors = {
        name: parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in named_parameters(model)
        if any(part in name for part in TUNED) or (name.startswith("vae.decoder.") and decoder in name)
    }
    frames = np.random.default_rng(seed).integers(0, 256, (4, *SIZE, 3), np.uint8)
    said = {**model.identity(), "prompt": f"person {seed}", "size": list(SIZE), "norm_scope": "frame", "seed": seed,
            "steps": seed, **metadata}  # fmt: skip
    Checkpoint(tensors, frames, poses(4, seed), said).save(path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A and B, tuned in the same weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return (write_checkpoint(folder / "a.ckpt", tiny_base, 1, "conv_out"),
            write_checkpoint(folder / "b.ckpt", tiny_base, 2, "conv_out"))  # fmt: skip


@dataclass(frozen=True)
class Engines:
    """Folders: of A, of B as built anew, and of B as refitted from A."""

    source: Path
    built: Path
    refitted: Path


@pytest.fixture(scope="module")
def build_source(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A's engine by the backend's name, in fp32, built once each; do not write to it."""
    folder = tmp_path_factory.mktemp("sources")
    return lambda name: build_engine(checkpoints[0], folder / f"{name}.engine", BuildOptions(name, "fp32")).folder.path


@pytest.fixture(scope="module")
def engines(
    backend_name: str, checkpoints: tuple[Path, Path], build_source: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Engines:  # fmt: skip
    folder, source = tmp_path_factory.mktemp(backend_name), build_source(backend_name)
    built = build_engine(checkpoints[1], folder / "b.engine", BuildOptions(backend_name, "fp32")).folder.path
    result = build_engine(checkpoints[1], folder / "refitted.engine", BuildOptions(refit=source))
    assert not result.was_current and result.backend_reason == f"that of {source}"
    return Engines(source, built, result.folder.path)


@pytest.fixture(scope="module")
def torch_engine(build_source: Callable[[str], Path]) -> Path:
    """A's engine of the torch backend; do not write to it."""
    return build_source("torch")


@pytest.fixture
def copied(torch_engine: Path, tmp_path: Path) -> Path:
    """The same to write to."""
    return shutil.copytree(torch_engine, tmp_path / "copied.engine")


def contents(engine: Path) -> dict[str, bytes]:
    """Every file but the manifest and hashes of others; OpenVINO's nodes are numbered through the whole process."""
    files = {name: (engine / name).read_bytes() for name in read_manifest(engine)["files"]}
    return {name: re.sub(rb'name="(\w+)_\d+"', rb'name="\1"', content) if name.endswith(".xml") else content
            for name, content in files.items() if Path(name).name != "description.json"}  # fmt: skip


def backend_of(engine: Path) -> str:
    return str(read_manifest(engine)["backend"])


def is_linked(engine: Path, source: Path, stem: str) -> bool:
    """Whether both have the same file, not only an equal one; it is there in each."""
    files = list((source / "networks").glob(f"{stem}.*"))
    assert files
    return all(file.samefile(engine / "networks" / file.name) for file in files)


def differing_files(first: Path, second: Path) -> set[str]:
    """By their names without folder and suffix."""
    ours, theirs = contents(first), contents(second)
    assert set(ours) == set(theirs)
    return {Path(name).stem for name in ours if ours[name] != theirs[name]}


def test_every_file_is_what_building_writes(engines: Engines) -> None:
    if backend_of(engines.source) == "tensorrt":
        pytest.skip("a plan that was built anew may hold other kernels")
    assert differing_files(engines.refitted, engines.built) == set()
    changed = differing_files(engines.source, engines.built)  # so that equality means something
    assert "tuned" in changed and changed <= {"tuned", "reference", "tokenizer_config"}
    manifests = [read_manifest(engine) for engine in (engines.refitted, engines.built)]
    for manifest in manifests:
        assert manifest.pop("seal") and manifest.pop("files")
    assert manifests[0] == manifests[1]


def test_every_network_computes_what_a_built_one_computes(engines: Engines) -> None:
    with (
        Avatar.load(engines.source) as source,
        Avatar.load(engines.built) as built,
        Avatar.load(engines.refitted) as ours,
    ):
        specs = network_specs(Architecture.from_json(ours.folder.manifest["architecture"]))
        is_tensorrt = ours.folder.manifest["backend"] == "tensorrt"  # built twice, it may choose other kernels
        same = partial(torch.allclose, rtol=1e-3, atol=1e-4) if is_tensorrt else torch.equal
        changed = set()
        for name, spec in specs.items():
            inputs = random_inputs(spec, {**SIZES, "frames": 1 if name in ONE_FRAME_NETWORKS else SIZES["frames"]})
            before, expected, got = (avatar.engines[name](**inputs) for avatar in (source, built, ours))
            assert all(same(got[key], expected[key]) for key in expected), name
            if not all(same(before[key], expected[key]) for key in expected):
                changed.add(name)
        assert changed == {"unet", "controlnet", "vae_decoder", SHALLOW_UNET, *STREAM_NETWORKS, SHALLOW_STREAM}


def test_rendered_frames_are_those_of_a_built_engine(engines: Engines) -> None:
    def render(path: Path) -> np.ndarray:
        with Avatar.load(path) as avatar:
            return avatar.render(poses(2, 7), num_inference_steps=2)  # three frames with the reference

    got, expected = render(engines.refitted), render(engines.built)
    if backend_of(engines.source) == "tensorrt":
        assert np.abs(got.astype(int) - expected).max() <= 2
    else:
        assert np.array_equal(got, expected)


def test_a_lora_is_fused_by_refitting_as_by_building(
    engines: Engines, checkpoints: tuple[Path, Path], tiny_lora: Path, tmp_path: Path
) -> None:
    loras, name = (Lora(tiny_lora, 0.5),), backend_of(engines.source)
    built = build_engine(checkpoints[1], tmp_path / "built.engine", BuildOptions(name, "fp32", loras=loras)).folder.path
    options = BuildOptions(refit=engines.source, loras=loras)
    refitted = build_engine(checkpoints[1], tmp_path / "refitted.engine", options).folder.path
    assert build_engine(checkpoints[1], built, options).was_current
    back = build_engine(checkpoints[1], tmp_path / "back.engine", BuildOptions(refit=refitted)).folder.path
    if name != "tensorrt":  # a plan that was built anew may hold other kernels
        assert differing_files(refitted, built) == set() and differing_files(back, engines.built) == set()
        assert {"unet", "text_encoder"} <= differing_files(built, engines.built)
        again = build_engine(checkpoints[0], tmp_path / "again.engine", replace(options, refit=refitted)).folder.path
        assert is_linked(again, refitted, "unet")  # with the same LoRA only what is tuned differs
        a = build_engine(checkpoints[0], tmp_path / "a.engine", BuildOptions(name, "fp32", loras=loras)).folder.path
        assert differing_files(again, a) == set()


@pytest.mark.parametrize("decoder", ["conv1", "conv_out.weight"], ids=["others", "parts of modules"])
def test_what_else_was_tuned_is_replaced_as_by_building(
    engines: Engines, tiny_base: Path, tmp_path: Path, decoder: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, name = write_checkpoint(tmp_path / "c.ckpt", tiny_base, 3, decoder), backend_of(engines.source)
    refitted = build_engine(checkpoint, tmp_path / "r.engine", BuildOptions(refit=engines.source)).folder.path
    built = build_engine(checkpoint, tmp_path / "c.engine", BuildOptions(name, "fp32")).folder.path
    if name != "tensorrt":  # a plan that was built anew may hold other kernels
        assert differing_files(refitted, built) == set() and "vae" in "".join(differing_files(built, engines.built))
        assert "the engine to refit was tuned in other weights" in caplog.text


def test_an_engine_tuned_in_parts_of_layers_is_built_anew(tiny_base: Path, tmp_path: Path) -> None:
    first, second = (write_checkpoint(tmp_path / f"{seed}.ckpt", tiny_base, seed, "conv_out.weight") for seed in (1, 2))
    source = build_engine(first, tmp_path / "a.engine", BuildOptions("torch", "fp32")).folder.path
    refitted = build_engine(second, tmp_path / "r.engine", BuildOptions(refit=source)).folder.path
    built = build_engine(second, tmp_path / "b.engine", BuildOptions("torch", "fp32")).folder.path
    assert differing_files(refitted, built) == set() and not is_linked(refitted, source, "unet")
    assert read_manifest(refitted)["tuned"] is None


def test_the_source_stays_as_it_is(engines: Engines, checkpoints: tuple[Path, Path]) -> None:
    assert open_folder(engines.source).manifest["checkpoint"] == Checkpoint.load(checkpoints[0]).digest()


def test_to_refit_back_gives_the_source(engines: Engines, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    back = build_engine(checkpoints[0], tmp_path / "a.engine", BuildOptions(refit=engines.refitted)).folder.path
    if backend_of(engines.source) != "tensorrt":
        assert differing_files(back, engines.source) == set()


def test_refitted_and_built_are_the_same_engine(engines: Engines, checkpoints: tuple[Path, Path]) -> None:
    manifest = read_manifest(engines.source)
    options = BuildOptions(manifest["backend"], manifest["precision"])
    assert build_engine(checkpoints[1], engines.refitted, options).was_current
    assert build_engine(checkpoints[1], engines.built, BuildOptions(refit=engines.source)).was_current


def test_an_engine_can_be_refitted_in_its_place(copied: Path, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    build_engine(checkpoints[1], copied, BuildOptions(refit=copied))
    built = build_engine(checkpoints[1], tmp_path / "b.engine", BuildOptions("torch", "fp32")).folder.path
    assert differing_files(copied, built) == set() and read_manifest(copied) == read_manifest(built)


def test_of_a_chain_of_refits_no_engine_needs_those_before(
    engines: Engines, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = (shutil.copytree(engines.source, tmp_path / "a.engine"), tmp_path / "b.engine")
    build_engine(checkpoints[1], second, BuildOptions(refit=first))
    shutil.rmtree(first)
    build_engine(checkpoints[0], second, BuildOptions(refit=second))  # in its own place
    if backend_of(engines.source) != "tensorrt":
        assert differing_files(second, engines.source) == set()
    open_folder(second)


def test_16_bit_weights_are_replaced_too(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    options = BuildOptions("torch", "bf16")
    source = build_engine(checkpoints[0], tmp_path / "a.engine", options).folder.path
    built = build_engine(checkpoints[1], tmp_path / "b.engine", options).folder.path
    refitted = build_engine(checkpoints[1], tmp_path / "r.engine", BuildOptions(refit=source)).folder.path
    assert differing_files(refitted, built) == set()


def test_all_but_the_networks_is_the_checkpoints_own(torch_engine: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The same weights in a base with other words, another schedule and other recommendations."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    edit(base / "scheduler" / "scheduler_config.json", beta_end=0.02)
    edit(base / "posecrafter.json", strength=0.5)
    edit(base / "tokenizer" / "tokenizer_config.json", do_lower_case=False)
    checkpoint = write_checkpoint(tmp_path / "b.ckpt", base, 2, "conv_out")
    refitted = build_engine(checkpoint, tmp_path / "r.engine", BuildOptions(refit=torch_engine)).folder
    assert refitted.manifest["scheduler"]["beta_end"] == 0.02 and refitted.manifest["prompt"] == "person 2"
    assert refitted.manifest["recommended"]["strength"] == 0.5
    built = build_engine(checkpoint, tmp_path / "b.engine", BuildOptions("torch", "fp32")).folder
    assert contents(refitted.path) == contents(built.path)
    with Avatar.load(refitted.path) as avatar, Avatar.load(torch_engine) as source:
        assert np.array_equal(avatar.frames, Checkpoint.load(checkpoint).frames)
        assert not np.array_equal(avatar.poses.keypoints, source.poses.keypoints)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(checkpoint: Path, output: Path, options: BuildOptions, match: str) -> None:
    """Building is refused in one line with a hint, and nothing is written."""
    with pytest.raises(EngineFolderError, match=match) as caught:
        build_engine(checkpoint, output, options)
    assert caught.value.hint and "\n" not in str(caught.value)
    assert not output.exists() and not list(output.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backend": "openvino"}, "its backend is torch, not openvino"),
        ({"precision": "bf16"}, "its precision is fp32, not bf16"),
        ({"size": (48, 48)}, "its size is 32x32, not 48x48"),
    ],
)
def test_other_options_are_refused(
    torch_engine: Path, checkpoints: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    refused(checkpoints[1], tmp_path / "b.engine", BuildOptions(**options, refit=torch_engine), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda said: {"package": "0.0"}, "its posecrafter-rt is 0.0, not"),
        (lambda said: {"device": {"type": "cpu", "name": "another"}}, "its device is another, not"),
        (lambda said: {"device": {**said["device"], "cuda_driver": "13.1"}}, " with CUDA 13.1, not "),
        (lambda said: {"libraries": {**said["libraries"], "diffusers": "1.0"}}, "its diffusers is 1.0, not"),
        (lambda said: {"libraries": {}}, "its diffusers is None, not"),
        (
            lambda said: {"architecture": {**said["architecture"], "text_tokens": 9, "more": 1}},
            "its architecture has another more, text_tokens",
        ),
        (lambda said: {"norm_scope": "clip"}, "its norm_scope is clip, not frame"),
        (lambda said: {"base_hash": "0123456789abcdef"}, "its base's hash is 0123456789ab, not"),
    ],
)
def test_an_engine_of_other_making_is_refused(
    copied: Path,
    checkpoints: tuple[Path, Path],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    match: str,
) -> None:
    manifest = read_manifest(copied)
    write_manifest(copied, {**manifest, **change(manifest)})
    refused(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=copied), match)


def test_pythons_version_does_not_matter(copied: Path, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = read_manifest(copied)
    write_manifest(copied, {**manifest, "libraries": {**manifest["libraries"], "python": "3.0"}})
    build_engine(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=copied))


def test_another_base_or_norm_scope_of_the_checkpoint_is_refused(
    torch_engine: Path, tiny_base: Path, write_tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "o.ckpt", write_tiny_base(tmp_path / "other", seed=5), 2, "conv_out")
    refused(other, tmp_path / "b.engine", BuildOptions(refit=torch_engine), "its base's hash is")
    clip = write_checkpoint(tmp_path / "c.ckpt", tiny_base, 2, "conv_out", norm_scope="clip")
    refused(clip, tmp_path / "b.engine", BuildOptions(refit=torch_engine), "its norm_scope is frame, not clip")


def test_the_same_weights_in_another_configuration_are_refused(
    engines: Engines, tiny_base: Path, tmp_path: Path
) -> None:
    """The hash of a base is over its weights; what is computed with them is in its configuration."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    edit(base / "unet" / "config.json", norm_eps=0.1)
    checkpoint = write_checkpoint(tmp_path / "b.ckpt", base, 2, "conv_out")
    refused(checkpoint, tmp_path / "b.engine", BuildOptions(refit=engines.source), "configuration")


def test_a_source_that_is_missing_or_lacks_a_file_is_refused(
    copied: Path, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    refused(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=tmp_path / "no"), "is not an engine folder")
    (copied / "networks" / "unet.safetensors").unlink()
    refused(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=copied), "unet.safetensors is missing")


def test_what_is_damaged_in_the_source_is_found_when_it_is_copied_or_loaded(
    copied: Path, checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a refit links it does not read: that would take longer than all the rest."""
    file, altered = copied / "networks" / "unet.safetensors", "was altered: networks/unet.safetensors is not the file"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refitted = build_engine(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=copied)).folder.path
    with pytest.raises(EngineFolderError, match=f"{refitted} {altered}"):
        Avatar.load(refitted)
    monkeypatch.setattr(os, "link", refuse)
    refused(checkpoints[1], tmp_path / "c.engine", BuildOptions(refit=copied), f"{copied} {altered}")


@pytest.mark.parametrize("name", [TUNED_FILE, "components.json"])
def test_what_a_refit_reads_is_verified(
    copied: Path, checkpoints: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    file = copied / "networks" / name
    file.write_bytes(file.read_bytes() + b" ")
    refused(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=copied), f"was altered: networks/{name}")


def test_symbolic_links_in_the_source_are_followed(
    copied: Path, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    file = copied / "networks" / "unet.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(Path("../../elsewhere"))
    refitted = build_engine(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=copied)).folder
    assert not (refitted.networks / file.name).is_symlink() and is_linked(refitted.path, copied, "unet")
    file.unlink()
    open_folder(refitted.path)


def test_an_interrupted_refit_leaves_nothing(
    torch_engine: Path, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    def interrupt(stage: str, seconds_left: float | None) -> None:
        if stage == "writing the tuned weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=torch_engine), progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_all_but_the_tuned_weights_are_links(
    engines: Engines, checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not get_backend(backend_of(engines.source)).holds_tuned_apart:
        pytest.skip("its weights lie in its plans")
    for file in (engines.source / "networks").iterdir():
        assert is_linked(engines.refitted, engines.source, file.stem) == (file.name != TUNED_FILE), file
    monkeypatch.setattr(os, "link", refuse)  # as between file systems
    copied = build_engine(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=engines.source)).folder.path
    assert differing_files(copied, engines.built) == set()
    assert not is_linked(copied, engines.source, "graphs" if (copied / "networks" / GRAPHS_FILE).is_file() else "unet")


def refuse(*arguments: object) -> None:
    raise OSError("no links here")


def test_the_bases_weights_need_not_be_there(
    engines: Engines, checkpoints: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for file in base.rglob("*.safetensors"):
        file.unlink()
    options = BuildOptions(refit=engines.source, base=str(base))
    if get_backend(backend_of(engines.source)).holds_tuned_apart:
        refitted = build_engine(checkpoints[1], tmp_path / "b.engine", options).folder.path
        assert differing_files(refitted, engines.built) == set()
    with pytest.raises(ModelError, match="has no .*safetensors"):
        build_engine(checkpoints[1], tmp_path / "n.engine", BuildOptions("torch", "fp32", base=str(base)))


class TestOpenVino:
    """Refused where names of weights were lost."""

    @pytest.fixture
    def source(self, build_source: Callable[[str], Path]) -> Path:
        pytest.importorskip("openvino")
        reason = get_backend("openvino").unsupported_reason("fp32")
        if reason is not None:
            pytest.skip(reason)
        return build_source("openvino")

    def test_merged_weights_and_missing_graphs_are_refused(
        self, source: Path, checkpoints: tuple[Path, Path], tmp_path: Path
    ) -> None:
        engine = shutil.copytree(source, tmp_path / "copied.engine")
        file, manifest = engine / "networks" / GRAPHS_FILE, read_manifest(engine)
        edit(file, unet=None)
        reseal(engine, manifest)
        refused(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=engine), "weights of its unet were merged")
        file.unlink()
        reseal(engine, manifest)
        refused(checkpoints[1], tmp_path / "b.engine", BuildOptions(refit=engine), f"it holds no {GRAPHS_FILE}")


def reseal(engine: Path, manifest: dict[str, Any]) -> None:
    """Make a changed folder whole again."""
    from posecrafter_rt.atomic import sha256_file

    present = {name: sha256_file(engine / name) for name in manifest["files"] if (engine / name).is_file()}
    write_manifest(engine, {**manifest, "files": present})


def test_the_command_refits(torch_engine: Path, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    def run(*more: str) -> Any:
        output = tmp_path / "b.engine"
        return CliRunner().invoke(
            app, ["build-engine", str(checkpoints[1]), "--refit", str(torch_engine), "-o", str(output), *more])  # fmt: skip

    refusal = run("--precision", "bf16")
    assert refusal.exit_code == 1 and "--precision fp32" in refusal.output and "--refit" in refusal.output
    result = run("--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["backend"], summary["precision"], summary["was_current"]) == ("torch", "fp32", False)
    assert summary["backend_reason"] == f"that of {torch_engine}"
