"""What a result says of the machine and the code that it was measured with."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import timing
from bench.timing import machine


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
