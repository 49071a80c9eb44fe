"""Tests of `inspect` on engine folders and checkpoints, most of which hold just enough.

Tests; no network is run.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.inspect import print_networks
from posecrafter_rt.cli.main import app
from posecrafter_rt.engines.folder import building
from posecrafter_rt.engines.tuned_file import TUNED_FILE
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence
from tests.tiny import NETWORKS

METADATA = {
    "base": "embedded", "base_hash": "ab" * 32, "controlnet": None, "vae": None, "prompt": "a person",
    "size": [32, 40], "norm_scope": "frame", "seed": 0, "steps": 12,
}  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    manifest = {"backend": "torch", "precision": "bf16", "size": [32, 40], "libraries": {"torch": "2.13.0"}}
    with building(tmp_path / "me.engine", {**manifest, "architecture": {"pose_channels": 7}}) as folder:
        (folder / "networks").mkdir()
        (folder / "networks" / "unet.safetensors").write_bytes(b"x" * 12_300)
    (tmp_path / "me.engine" / "inversions").mkdir()
    (tmp_path / "me.engine" / "inversions" / "a.safetensors").write_bytes(b"y" * 500)
    return tmp_path / "me.engine"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    keypoints = (random.random((3, NUM_KEYPOINTS, 3)) * [40, 32, 1]).astype(np.float32)
    frames = random.integers(0, 256, (3, 32, 40, 3), np.uint8)
    tensors = {"unet.a.weight": torch.zeros(4, 5), "controlnet.b.bias": torch.ones(6)}
    Checkpoint(tensors, frames, PoseSequence(keypoints, (32, 40)), METADATA).save(tmp_path / "tuned.ckpt")
    return tmp_path / "tuned.ckpt"


def test_an_engine_as_a_table(engine: Path) -> None:
    result = run(engine)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["backend", "torch"] in lines and ["size", "[32,", "40]"] in lines
    assert ["libraries", "torch", "2.13.0"] in lines
    assert ["inversions", "files", "1"] in lines and ["inversions", "on", "disk", "500", "B"] in lines
    assert [line[:2] for line in lines].count(["on", "disk"]) == 1 and [line[:1] for line in lines].count(["size"]) == 1
    assert ["networks/unet.safetensors", "12.3", "kB"] in lines
    assert "pose channels" not in result.stdout


def test_an_engine_as_json(engine: Path) -> None:
    record = json.loads(run(engine, "--json").stdout)
    assert record["intact"] is True
    assert record["files"] == {"networks/unet.safetensors": 12_300} and record["bytes"] == 12_300
    assert record["inversions"] == {"files": 1, "bytes": 500} and record["compiled"] == {"files": 0, "bytes": 0}
    assert record["architecture"] == {"pose_channels": 7}


def test_an_engines_networks_take_a_line_each(tiny_engine: Path) -> None:
    result = run(tiny_engine)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("networks "))
    assert lines[start].split() == ["networks", "runs", "in", "weights", "size", "takes", "gives"]
    rows = lines[start + 1 : start + 1 + len(NETWORKS)]
    assert [row.split()[0] for row in rows] == list(NETWORKS)
    assert {row.split()[1] for row in rows} == {"fp32"}
    for title in ("runs in", "takes", "gives"):  # one below the other
        column = lines[start].index(title)
        assert all(row[column - 1] == " " and row[column] != " " for row in rows)
    decoder = dict(zip(NETWORKS, rows, strict=True))["vae_decoder"]
    assert "latents frames×4×16×16 " in decoder and decoder.rstrip().endswith("pixels frames×3×32×32")


def test_an_engines_networks_as_json(tiny_engine: Path) -> None:
    details = json.loads(run(tiny_engine, "--json").stdout)["network_details"]
    assert list(details) == list(NETWORKS)
    assert details["prompt_kv"]["files"] == ["unet.safetensors", "controlnet.safetensors", TUNED_FILE]
    assert details["text_encoder"]["files"] == ["text_encoder.safetensors"]
    outputs = details["unet"]["outputs"]
    assert outputs["noise_pred"] == {"shape": ["frames", 4, 16, 16], "dtype": "float"} and len(outputs) == 2


def test_plugins_and_limits_are_shown_where_a_backend_kept_them(capsys: pytest.CaptureFixture[str]) -> None:
    tensor = {"shape": ["frames", 4, "groups"], "dtype": "float"}
    network: dict[str, Any] = {
        "precision": "fp16",
        "weights": 1_234_567,
        "bytes": 2_500_000,
        "inputs": {"latents": tensor, "text_kv": tensor},
        "outputs": {"noise_pred": tensor},
    }
    built = {**network, "plugins": 15, "attentions": 16, "limits": {"frames": [1, 128]}, "error": 0.00345}
    print_networks({"unet": built, "vae_encoder": network})
    header, unet, encoder = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert header.split() == ["networks", "runs", "in", "weights", "size", "plugins", "error", "takes", "gives"]
    assert unet.split()[1:4] == ["fp16", "1,234,567", "2.5"] and unet.split()[5:9] == ["15", "of", "16", "0.003"]
    assert "latents frames≤128×4×groups, 1 more" in unet and unet.endswith("noise_pred frames≤128×4×groups")
    assert " of " not in encoder and encoder.endswith("noise_pred frames×4×groups")


def test_an_engine_of_another_version_keeps_its_networks_to_itself(engine: Path) -> None:
    assert "network_details" not in json.loads(run(engine, "--json").stdout)
    assert not any(line.startswith("networks ") for line in run(engine).stdout.splitlines())


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_a_damaged_engine_is_shown_and_refused(engine: Path, damage: str) -> None:
    file = engine / "networks" / "unet.safetensors"
    file.unlink() if damage == "missing" else file.write_bytes(b"x" * 12_299 + b"z")
    result = run(engine, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["intact"] is False
    assert damage in result.stderr and "unet.safetensors" in result.stderr and "build-engine" in result.stderr


def test_a_checkpoint(checkpoint: Path) -> None:
    record = json.loads(run(checkpoint, "--json").stdout)
    assert (record["tensors"], record["parameters"], record["training_frames"]) == (2, 26, 3)
    assert record["prompt"] == "a person" and record["bytes"] == checkpoint.stat().st_size
    assert record["digest"] == Checkpoint.load(checkpoint).digest()
    assert "a person" in run(checkpoint).stdout


def test_what_a_checkpoints_networks_were_is_only_in_json(checkpoint: Path) -> None:
    """It is more than a hundred entries."""
    tuned = Checkpoint.load(checkpoint)
    tuned.metadata["configurations"] = {"vae.scaling_factor": 0.18215}
    tuned.save(checkpoint, force=True)
    assert "scaling" not in run(checkpoint).stdout
    assert json.loads(run(checkpoint, "--json").stdout)["configurations"] == {"vae.scaling_factor": 0.18215}


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"a": 1})])
def test_what_is_no_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.ckpt").write_bytes(content)
    result = run(tmp_path / "odd.ckpt")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "odd.ckpt" in result.stderr


@pytest.mark.parametrize("name", ["absent", "."])
def test_what_is_no_engine_is_one_line(tmp_path: Path, name: str) -> None:
    result = run(tmp_path / name)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stdout == ""


@pytest.mark.parametrize(
    "change", [{"files": None}, {"files": []}, {"problem": "none"}, {"loras": [1]}, {"bytes": "few"}]
)
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_an_altered_manifest_is_one_line(engine: Path, change: dict[str, Any], option: tuple[str, ...]) -> None:
    manifest = json.loads((engine / "manifest.json").read_text())
    for altered in ({**manifest, **change}, {"schema": manifest["schema"], **change}, {"schema": manifest["schema"]}):
        (engine / "manifest.json").write_text(json.dumps(altered))
        result = run(engine, *option)
        assert result.exit_code == 1 and result.stdout == ""
        assert (
            result.stderr.startswith(f"error: {engine} was altered: manifest.json is not the file")
            and result.stderr.count("\n") == 2
        )
