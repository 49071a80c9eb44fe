"""Engines with LoRAs: other frames under another identity, and no inversion of another engine's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from posecrafter_rt.atomic import sha256_file
from posecrafter_rt.avatar import Avatar
from posecrafter_rt.building import BuildOptions, build_engine
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.main import app
from posecrafter_rt.engines.manifest import read_manifest
from posecrafter_rt.engines.tuned_file import TUNED_FILE, read_tuned
from posecrafter_rt.errors import CheckpointError
from posecrafter_rt.models.loading import load_base
from posecrafter_rt.models.lora import Lora
from posecrafter_rt.poses.keypoints import PoseSequence

SIZE = (32, 32)
TUNED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"  # the LoRA adds to it, too


def some_poses(count: int) -> PoseSequence:
    rng = np.random.default_rng(0)
    points = rng.uniform(4, 28, (1, 134, 2)) + rng.normal(0, 1, (count, 134, 2))
    return PoseSequence(np.concatenate([points, np.ones((count, 134, 1))], -1).astype(np.float32), SIZE, 25.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "tuned.ckpt"
    tensors = {TUNED: torch.randn(32, 32, generator=torch.Generator().manual_seed(1)) * 0.2}
    frames = np.random.default_rng(1).integers(0, 256, (4, *SIZE, 3), np.uint8)
    said = {**load_base(str(tiny_base)).identity(), "prompt": "a person", "size": list(SIZE), "norm_scope": "frame",
            "seed": 0, "steps": 1}  # fmt: skip
    Checkpoint(tensors, frames, some_poses(4), said).save(path)
    return path


@pytest.fixture(scope="module")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(Lora, …) -> the torch backend's engine with them, in fp32, built once each; do not write to it."""
    folder, built = tmp_path_factory.mktemp("engines"), {}

    def make(*loras: Lora) -> Path:
        if loras not in built:
            options = BuildOptions("torch", "fp32", loras=loras)
            built[loras] = build_engine(checkpoint, folder / f"{len(built)}.engine", options).folder.path
        return built[loras]

    return make


def render(engine: Path) -> tuple[np.ndarray, bool]:
    """Frames, and whether the inversion was cached."""
    with Avatar.load(engine) as avatar:
        frames = avatar.render(some_poses(2), num_inference_steps=2)
        assert avatar.last_report is not None
        return frames, avatar.last_report.inversion_cached


def networks(engine: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (engine / "networks").iterdir()}


def test_what_was_tuned_stays_below_the_delta(
    build: Callable[..., Path], checkpoint: Path, tiny_lora: Path, tiny_factors: dict
) -> None:
    weights = read_tuned(build(Lora(tiny_lora, 0.5)) / "networks")
    name = TUNED.removeprefix("unet.")
    down, up = tiny_factors["unet", name.removesuffix(".weight")]
    assert torch.equal(weights[TUNED], Checkpoint.load(checkpoint).tensors[TUNED] + 0.5 * (up @ down))


def test_only_the_unet_and_the_text_encoder_change(build: Callable[..., Path], tiny_lora: Path) -> None:
    plain, fused = build(), build(Lora(tiny_lora))
    ours, theirs = networks(fused), networks(plain)
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == {"unet.safetensors", "text_encoder.safetensors", TUNED_FILE}
    before, after = (load_file(engine / "networks" / "unet.safetensors") for engine in (plain, fused))
    temporal = [name for name in before if "_temp." in name or ".temporal_out." in name]
    assert temporal and all(torch.equal(before[name], after[name]) for name in temporal)
    assert not np.array_equal(render(plain)[0], render(fused)[0])


def test_scale_0_is_another_engine_of_the_same_networks(build: Callable[..., Path], tiny_lora: Path) -> None:
    plain, fused = build(), build(Lora(tiny_lora, 0.0))
    assert networks(plain) == networks(fused)
    assert read_manifest(plain)["fingerprint"] != read_manifest(fused)["fingerprint"]


def test_the_manifest_and_the_fingerprint(build: Callable[..., Path], tiny_lora: Path, tmp_path: Path) -> None:
    twice = tmp_path / "other.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(tiny_lora).items()}, twice)
    choices = [(), (Lora(tiny_lora),), (Lora(tiny_lora, 0.5),), (Lora(twice),), (Lora(tiny_lora), Lora(twice)),
               (Lora(twice), Lora(tiny_lora))]  # fmt: skip
    manifests = [read_manifest(build(*loras)) for loras in choices]
    assert len({manifest["fingerprint"] for manifest in manifests}) == len(choices)
    assert "loras" not in manifests[0]
    assert manifests[4]["loras"] == [{"file": path.name, "sha256": sha256_file(path), "scale": 1.0}
                                     for path in (tiny_lora, twice)]  # fmt: skip


def test_the_same_loras_again_are_nothing_to_do(checkpoint: Path, tiny_lora: Path, tmp_path: Path) -> None:
    def again(*loras: Lora) -> bool:
        return build_engine(checkpoint, tmp_path / "me.engine", BuildOptions("torch", "fp32", loras=loras)).was_current

    file = tmp_path / "style.safetensors"
    shutil.copy(tiny_lora, file)
    assert [again(Lora(file)), again(Lora(file)), again(Lora(file, 1)), again()] == [False, True, True, False]
    assert not again(Lora(file))
    save_file({name: 2 * tensor for name, tensor in load_file(tiny_lora).items()}, file)
    assert not again(Lora(file))


def test_no_inversion_of_other_loras_is_used(
    build: Callable[..., Path], checkpoint: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    """Even where caches are carried into a folder that was built again in the same place."""
    place = tmp_path / "me.engine"
    shutil.copytree(build(), place)
    render(place)
    assert render(place)[1]
    shutil.copytree(place / "inversions", tmp_path / "kept")
    expected, _ = render(shutil.copytree(build(Lora(tiny_lora)), tmp_path / "fresh.engine"))
    build_engine(checkpoint, place, BuildOptions("torch", "fp32", loras=(Lora(tiny_lora),)))
    assert not (place / "inversions").exists()
    shutil.copytree(tmp_path / "kept", place / "inversions")
    frames, is_cached = render(place)
    assert not is_cached and np.array_equal(frames, expected)
    assert render(place)[1]


def test_a_refused_lora_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    foreign, output = tmp_path / "foreign.safetensors", tmp_path / "out" / "me.engine"
    save_file({"lora_te2_a.lora_down.weight": torch.ones(2, 4), "lora_te2_a.lora_up.weight": torch.ones(4, 2)}, foreign)
    for path in (foreign, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=path.name):
            build_engine(checkpoint, output, BuildOptions("torch", "fp32", loras=(Lora(path),)))
    assert not output.parent.exists()


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_and_inspect(checkpoint: Path, tiny_lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "me.engine"
    common = ["build-engine", checkpoint, "-o", output, "--backend", "torch", "--precision", "fp32"]
    result = run(*common, "--lora", f"{tiny_lora}:0.5", "--lora", tiny_lora, "--json")
    assert result.exit_code == 0, result.output
    digest = sha256_file(tiny_lora)
    expected = [{"file": tiny_lora.name, "sha256": digest, "scale": scale} for scale in (0.5, 1.0)]
    assert json.loads(result.stdout)["loras"] == expected
    again = run(*common, "--lora", f"{tiny_lora}:0.5", "--lora", tiny_lora)
    assert "nothing to do" in again.output and f"LoRA {tiny_lora.name}" in again.output
    assert json.loads(run("inspect", output, "--json").stdout)["loras"] == expected
    shown = [line.split() for line in run("inspect", output).stdout.splitlines()]
    assert ["LoRA", tiny_lora.name, "scale", "0.5,", "SHA-256", digest] in shown


@pytest.mark.parametrize("scale", ["strong", "", "1,5"])
def test_a_scale_that_is_no_number_is_bad_usage(checkpoint: Path, tiny_lora: Path, scale: str) -> None:
    result = run("build-engine", checkpoint, "--lora", f"{tiny_lora}:{scale}")
    told = " ".join(result.output.replace("│", " ").split())  # out of its box
    assert result.exit_code == 2 and f"{scale!r} is not a number; write FILE:SCALE" in told


def test_a_colon_in_a_files_name(checkpoint: Path, tiny_lora: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "style:2", tmp_path / "me.engine"
    torch.save(load_file(tiny_lora), file)  # what is no .safetensors is read as torch.save writes it
    result = run("build-engine", checkpoint, "-o", output, "--backend", "torch", "--precision", "fp32",
                 "--lora", file, "--lora", f"{file}:-1", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    said = [(one["file"], one["scale"]) for one in json.loads(result.stdout)["loras"]]
    assert said == [("style:2", 1.0), ("style:2", -1.0)]
