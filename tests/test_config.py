"""The cache folder follows the environment, and what a process is given of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from posecrafter_rt.config import cache_dir, temporary_files_in


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSECRAFTER_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("POSECRAFTER_CACHE", "")  # set and empty counts as not set
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "posecrafter-rt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "posecrafter-rt"


def test_a_process_makes_its_temporary_files_where_it_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"]
    made = subprocess.run(command, env=temporary_files_in(tmp_path), capture_output=True, text=True, check=True).stdout
    assert Path(made.strip()).parent == tmp_path
