"""Locks: who may hold what beside whom, and that a process that is killed holds nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from posecrafter_rt.locks import locked

HOLDER = """
import sys, time
from pathlib import Path
from posecrafter_rt.locks import locked
with locked(Path(sys.argv[1]), shared=True):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    return tmp_path / str(request.param)


def refused(path: Path) -> bool:
    """Whether it cannot be held alone."""
    try:
        with locked(path) as is_held:
            assert is_held
    except BlockingIOError:
        return True
    return False


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_held_cannot_be_held_alone(path: Path, shared: bool) -> None:
    with locked(path, shared=shared) as is_held:
        assert is_held and refused(path)
    assert not refused(path)


def test_several_may_share(path: Path) -> None:
    with locked(path, shared=True) as first, locked(path, shared=True) as second:
        assert first and second
    assert not refused(path)


@pytest.mark.parametrize("how", ["shared", "wait"])
def test_who_shares_or_is_to_wait_waits_for_who_does_not_share(path: Path, how: str) -> None:
    seen: list[bool] = []

    def hold() -> None:
        with locked(path, shared=how == "shared", wait=how == "wait") as is_held:
            seen.append(is_held)
            assert refused(path)

    thread = threading.Thread(target=hold)
    with locked(path):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not seen
    thread.join(30)
    assert seen == [True]


def test_what_is_renamed_stays_held(path: Path) -> None:
    with locked(path):
        moved = path.rename(path.with_name("moved"))
        assert refused(moved)


def test_a_read_only_file_can_be_held(path: Path) -> None:
    path.chmod(0o500)
    with locked(path) as is_held:
        assert is_held and refused(path)


def test_a_killed_process_holds_nothing(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert refused(path)
    finally:
        process.kill()
        process.wait()
    assert not refused(path)


def during_the_call(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Let something happen between opening what is to be held and holding it, once."""
    flock, calls = fcntl.flock, [action]

    def flocked(descriptor: int, operation: int) -> None:
        if calls:
            calls.pop()()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flocked)


def test_what_took_its_place_meanwhile_is_held_instead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace() -> None:
        is_folder = path.is_dir()
        path.rename(path.with_name("old"))
        path.mkdir() if is_folder else path.touch()

    during_the_call(monkeypatch, replace)
    with locked(path):
        assert refused(path) and not refused(path.with_name("old"))


def test_what_was_removed_meanwhile_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during_the_call(monkeypatch, lambda: path.rename(path.with_name("old")))
    with pytest.raises(FileNotFoundError), locked(path):
        pass


def test_without_locks_nothing_is_held_and_nothing_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with ExitStack() as stack:
        assert [stack.enter_context(locked(path, shared=shared)) for shared in (False, True, False)] == [False] * 3
