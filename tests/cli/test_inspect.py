"""Tests of `inspect` on engine folders and checkpoints that hold just enough.

Tests; no network is run.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.cli.main import app
from posecrafter_rt.engines.folder import building
from posecrafter_rt.poses.keypoints import NUM_KEYPOINTS, PoseSequence

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
    assert ["inversions", "files", "1"] in lines and ["inversions", "size", "500", "B"] in lines
    assert ["networks/unet.safetensors", "12.3", "kB"] in lines
    assert "pose channels" not in result.stdout


def test_an_engine_as_json(engine: Path) -> None:
    record = json.loads(run(engine, "--json").stdout)
    assert record["intact"] is True
    assert record["files"] == {"networks/unet.safetensors": 12_300} and record["bytes"] == 12_300
    assert record["inversions"] == {"files": 1, "bytes": 500} and record["compiled"] == {"files": 0, "bytes": 0}
    assert record["architecture"] == {"pose_channels": 7}


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
