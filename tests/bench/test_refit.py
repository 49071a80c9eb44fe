"""The refits' benchmark: identities that differ where tuning does, real builds, the verdict. No timing is judged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import refit
from bench.refit import QUICK, WAYS, build, make_identities, markdown, measure, parse
from posecrafter_rt.building import BuildOptions
from posecrafter_rt.checkpoint import Checkpoint
from posecrafter_rt.engines.folder import open_folder
from posecrafter_rt.models.settings import BaseSettings


@pytest.fixture(scope="module")
def identities(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("identities")
    paths = [folder / "first.ckpt", folder / "second.ckpt"]
    assert make_identities(str(tiny_base), None, paths)["tuned"] > 1000
    return paths


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the caches lie is changed for the length of a test."""
    for name in ("POSECRAFTER_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "unused")

    def attempt(function: Any, *arguments: Any) -> dict[str, Any]:
        try:
            result: dict[str, Any] = function(*arguments)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return result

    monkeypatch.setattr(refit, "in_own_process", attempt)


def test_identities_differ_in_everything_that_is_tuned(identities: list[Path]) -> None:
    first, second = map(Checkpoint.load, identities)
    assert set(first.tensors) == set(second.tensors) and first.digest() != second.digest()
    tuned = [name for name in first.tensors if re.search("|".join(BaseSettings().trainable), name)]
    assert any(".attn1.to_out." in name for name in tuned) and any(".attn_temp.to_q." in name for name in tuned)
    assert not any(torch.equal(first.tensors[name], second.tensors[name]) for name in tuned)


def test_a_backend_is_measured_in_every_way(in_this_process: None, identities: list[Path], tmp_path: Path) -> None:
    row = measure("torch", identities, tmp_path, 2)
    assert (row["backend"], row["refit_peak_bytes"] > 0) == ("torch", True) and all(row[way] > 0 for way in WAYS)
    assert [path.name for path in tmp_path.glob("*.engine")] == ["first.engine"]  # the others made room
    assert open_folder(tmp_path / "first.engine").manifest["checkpoint"] == Checkpoint.load(identities[0]).digest()


def test_builds_keep_what_they_keep_in_the_folder_given(
    in_this_process: None, identities: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.machine._held_bytes", lambda: 7 << 50)  # as of what a build has started
    built = build(identities[0], tmp_path / "a.engine", BuildOptions("torch", "fp32"), tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.blob")) and built["peak_bytes"] == 7 << 50


def test_what_fails_is_told(in_this_process: None, identities: list[Path], tmp_path: Path) -> None:
    row = measure("torch", [tmp_path / "none.ckpt", identities[1]], tmp_path, 1)
    assert row["error"].startswith("first, nothing cached: ")


def test_the_verdict() -> None:
    row = {"backend": "openvino", "precision": "bf16", "first_s": 60.0, "anew_s": 12.34, "refit_s": 5.0}
    rows = [{**row, "refit_peak_bytes": 2e9}, {**row, "backend": "torch", "refit_s": 5.1, "refit_peak_bytes": 1e9},
            {"backend": "inductor", "precision": "bf16", "error": "first, nothing cached: the process died"}]  # fmt: skip
    setup = {"base": "embedded", "size": [128, 160], "tuned": 12_000_000, "rounds": 3}
    facts = {"processor": "one", "torch_threads": 2, "torch": "2"}
    text = markdown({"setup": setup, "machine": facts, "rows": rows, "not_here": {"tensorrt": "no GPU"}})
    assert "| openvino bf16 | 60.0 | 12.3 | 5.0 | met | 2000 |" in text
    assert "| torch bf16 | 60.0 | 12.3 | 5.1 | missed | 1000 |" in text
    assert "- inductor: first, nothing cached: the process died" in text and "- tensorrt: no GPU" in text
    assert "128×160, 12,000,000 tuned numbers" in text


def test_a_quick_run_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["refit", "--quick"])
    assert parse().backend == [QUICK] == ["torch"]
    monkeypatch.setattr("sys.argv", ["refit", "--quick", "--backend", "inductor"])
    assert parse().backend == ["inductor"]
    monkeypatch.setattr("sys.argv", ["refit"])
    assert {"torch", "openvino", "inductor"} <= set(parse().backend)
