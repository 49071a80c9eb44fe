"""What a result says of the machine and the code that it was measured with, and for how long a call is timed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import timing
from bench.timing import compare, machine


def git(folder: Path, *words: str) -> str:
    """What a command of git prints in a folder."""
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with a commit, which the code is taken to lie in."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("one")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    git(tmp_path, "tag", "--annotate", "v1", "--message", "a name that is not asked for")
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    return tmp_path


def test_the_commit_is_named_and_whether_tracked_files_differ(repository: Path) -> None:
    commit = git(repository, "rev-parse", "--short", "HEAD")
    (repository / "untracked.py").write_text("of no weight")
    assert machine()["commit"] == commit
    (repository / "code.py").write_text("two")
    assert machine()["commit"] == f"{commit}+"


def test_a_source_archive_names_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of a repository which it happens to lie in."""
    archive = repository / "archive"
    archive.mkdir()
    monkeypatch.setattr(timing, "ROOT", archive)
    assert "commit" not in machine()


def test_without_git_no_commit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    assert "commit" not in machine()  # it is no repository
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = machine()
    assert "commit" not in facts and "processor" in facts


@pytest.mark.parametrize("has_gpu", [False, True])
def test_each_call_is_measured_for_its_budget(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the processor in four turns, on a GPU at once."""
    spent: dict[str, list[float]] = {"one": [], "two": []}

    def timed(name: str, budget_s: float, *options: Any) -> list[float]:
        spent[name].append(budget_s)
        return [1.0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(timing, "_sample_cpu", timed)
    monkeypatch.setattr(timing, "_time_cuda", timed)
    compare({name: name for name in spent}, budget_s=2.0)  # type: ignore[misc]
    assert spent == dict.fromkeys(spent, [2.0] if has_gpu else [0.5] * 4)


@pytest.mark.parametrize(("properties", "card"), [
    (SimpleNamespace(uuid="7ab1-c2"), "GPU-7ab1-c2"), (SimpleNamespace(), "0"),
])  # fmt: skip
def test_the_driver_is_asked_for_the_card_that_torch_uses(
    properties: Any, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It numbers all cards, torch those of CUDA_VISIBLE_DEVICES."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor word; do :; done\necho "$word, 1980 MHz, 2619 MHz, 700 W"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = timing._driver(properties)
    assert found["driver_version"] == f"--id={card}" and found["power.limit"] == "700 W"
    program.write_text('#!/bin/sh\nfor word; do :; done\ntest "$word" = --id=0 && echo 580.65\n')
    assert timing._driver(properties) == {"driver_version": "580.65"}  # part of a card has a number of its own
