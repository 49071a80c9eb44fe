"""How an engine folder comes to its place: whole or not at all, whoever else builds, uses or kills."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from posecrafter_rt.atomic import disk_full
from posecrafter_rt.engines.folder import building, in_use, open_folder
from posecrafter_rt.errors import DiskFull, EngineFolderError, OutputExists
from posecrafter_rt.locks import locked
from tests.engines.test_folder import build, names


def test_an_engine_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = build(tmp_path / "e", "old")
    with building(path, {}) as staging:
        (staging / "new.bin").write_text("new")
        assert open_folder(path).networks.joinpath("unet.bin").read_text() == "old"
    assert names(path) == ["manifest.json", "new.bin"] and names(tmp_path) == ["e"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("anything"), SystemExit])
def test_a_build_that_ends_early_leaves_the_old_engine_and_nothing_else(
    tmp_path: Path, error: type[BaseException] | BaseException
) -> None:
    path = build(tmp_path / "e", "old")
    with pytest.raises(type(error) if isinstance(error, BaseException) else error), building(path, {}) as staging:
        (staging / "half").write_text("half")
        raise error
    assert names(tmp_path) == ["e"]
    open_folder(path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O: No space left on device (os error 28)")],
)
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFull, match="e"), building(tmp_path / "e", {}):
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("is_told", [False, True])
def test_another_full_disk_is_told_by_its_own_name(tmp_path: Path, is_told: bool) -> None:
    """A compiler's cache, say."""
    cache = tmp_path / "cache"
    full = OSError(errno.ENOSPC, "No space left on device", None if is_told else str(cache / "code"))
    error = disk_full(cache / "code") if is_told else RuntimeError("it failed")
    error.__cause__ = full
    with pytest.raises(DiskFull, match="^no space left to write .*cache/code$"), building(tmp_path / "mine" / "e", {}):
        raise error
    assert names(tmp_path / "mine") == []


def test_ctrl_c_between_the_renames_brings_the_old_engine_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "e", "old")
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if source.suffix == ".part":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(path, "new")
    assert names(tmp_path) == ["e"] and open_folder(path).networks.joinpath("unet.bin").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from posecrafter_rt.engines.folder import building

target, moment, path = sys.argv[1:]
rename, calls = Path.rename, []

def killed(source, target):
    calls.append(1)
    if len(calls) == int(moment):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target)

if target == "rename":
    Path.rename = killed
with building(Path(path), {}) as staging:
    (staging / "half").write_text("half")
    if target == "block":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(path: Path, target: str, moment: int = 1) -> None:
    """Let a process build an engine, and kill it in the block, or at the n-th renaming."""
    done = subprocess.run([sys.executable, "-c", KILLED, target, str(moment), str(path)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    build(tmp_path / "e")
    kill(tmp_path / "e", "block")
    kill(tmp_path / "e", "rename")
    kill(tmp_path / "else", "block")
    for name in (".e.0123abcd.old", ".e.4567abcd.part"):
        shutil.copytree(tmp_path / "e", tmp_path / name)
    mine = [".e.part", ".e.0123abcd.mine", ".e.notours0.part"]
    for name in mine:
        (tmp_path / name).mkdir()
    (others,) = tmp_path.glob(".else.*")
    with building(tmp_path / "e", {}), building(tmp_path / "e", {}):  # nor does one take the other's for a leftover
        assert len(list(tmp_path.glob(".e.????????.part"))) == 2 + 1  # `.e.notours0.part`
    assert names(tmp_path) == sorted(["e", others.name, *mine])
    open_folder(tmp_path / "e")


@pytest.mark.parametrize("moment", ["its folder has no manifest yet", "its manifest is not held yet"])
def test_a_build_that_another_takes_for_a_leftover_as_it_begins_makes_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    touch, touched = Path.touch, []

    def overtaken(file: Path) -> None:
        touched.append(file)
        is_first = len(touched) == 1
        if is_first and moment == "its folder has no manifest yet":
            build(tmp_path / "e", "other")
        touch(file)
        if is_first and moment == "its manifest is not held yet":
            build(tmp_path / "e", "other")

    monkeypatch.setattr(Path, "touch", overtaken)
    build(tmp_path / "e", "mine")
    assert touched[0] in touched[1:] and touched[-1] not in touched[:-1]  # the other removed the first
    assert names(tmp_path) == ["e"] and open_folder(tmp_path / "e").networks.joinpath("unet.bin").read_text() == "mine"


def test_leftovers_that_hold_nothing_yet_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".e.0123abcd.part").mkdir()
    (tmp_path / ".e.4567abcd.part").write_text("no folder")
    build(tmp_path / "e")
    assert names(tmp_path) == ["e"]


def test_a_build_killed_between_the_renames_is_undone_by_the_next(tmp_path: Path) -> None:
    build(tmp_path / "e", "old")
    kill(tmp_path / "e", "rename", 2)
    assert not (tmp_path / "e").exists()
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "e", {}):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["e"] and open_folder(tmp_path / "e").networks.joinpath("unet.bin").read_text() == "old"


def test_what_was_forced_away_is_brought_back_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    (tmp_path / ".e.0123abcd.old").write_text("mine")
    with pytest.raises(OutputExists):
        build(tmp_path / "e")
    assert names(tmp_path) == ["e"] and (tmp_path / "e").read_text() == "mine"


def test_an_engine_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = build(tmp_path / "e", "old")
    begun = []
    with in_use(open_folder(path)), in_use(open_folder(path)):
        refused = pytest.raises(EngineFolderError, match="e is in use by a render, a stream, a server or a refit")
        with refused as caught, building(path, {}):
            begun.append("before the work, not after it")
        assert caught.value.hint and "-o FOLDER" in caught.value.hint and not begun
        assert open_folder(path).networks.joinpath("unet.bin").read_text() == "old" and names(tmp_path) == ["e"]
    build(path, "new")
    assert open_folder(path).networks.joinpath("unet.bin").read_text() == "new"


def test_an_engine_that_is_taken_into_use_while_another_is_built_stays(tmp_path: Path) -> None:
    path = build(tmp_path / "e", "old")
    with ExitStack() as used:
        with pytest.raises(EngineFolderError, match="in use"), building(path, {}):
            used.enter_context(in_use(open_folder(path)))
        assert open_folder(path).networks.joinpath("unet.bin").read_text() == "old" and names(tmp_path) == ["e"]


def test_an_engine_that_was_replaced_since_it_was_opened_is_not_taken_into_use(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "e", "old"))
    build(folder.path, "new")
    with pytest.raises(EngineFolderError, match="built anew"), in_use(folder):
        pass


def test_a_folder_that_cannot_be_written_to_can_be_used(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "e"))
    (folder.path / "manifest.json").chmod(0o400)
    folder.path.chmod(0o500)
    try:
        with in_use(folder), pytest.raises(EngineFolderError, match="in use"), building(folder.path, {}):
            pass
        open_folder(folder.path)
    finally:
        folder.path.chmod(0o700)


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    path = build(tmp_path / "e", "old")
    with in_use(open_folder(path)):
        build(path, "new")
    assert names(tmp_path) == ["e"] and open_folder(path).networks.joinpath("unet.bin").read_text() == "new"


@pytest.mark.parametrize("other", ["begins", "ends"])
@pytest.mark.parametrize("is_there", [True, False])
def test_two_builds_that_end_at_once_put_their_folders_in_place_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, is_there: bool
) -> None:
    """The second meets the first between its two renames, or before its one, over what is no engine that could be held."""
    path, rename, flock = tmp_path / "e", Path.rename, fcntl.flock
    go, inside, has_met, errors = threading.Event(), threading.Event(), threading.Event(), list[Exception]()
    if is_there:
        path.mkdir()
        (path / "mine").write_text("mine")

    def build_the_other() -> None:
        try:
            if other == "begins":
                go.wait(60)
            with building(path, {}, force=True) as staging:
                inside.set()
                go.wait(60)
                (staging / "unet.bin").write_text("second")
        except Exception as error:
            errors.append(error)
        has_met.set()  # it has come to its end without waiting

    def meet(source: Path, target: Path) -> Path:
        if source.suffix == ".part" and threading.current_thread() is not thread:
            go.set()
            assert has_met.wait(60)
        return rename(source, target)

    def noticed(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and go.is_set() and threading.current_thread() is thread:
            has_met.set()
        flock(descriptor, operation)

    thread = threading.Thread(target=build_the_other)
    monkeypatch.setattr(Path, "rename", meet)
    monkeypatch.setattr(fcntl, "flock", noticed)
    with building(path, {}, force=True) as staging:
        thread.start()
        assert other == "begins" or inside.wait(60)
        (staging / "unet.bin").write_text("first")
    thread.join(60)
    assert not thread.is_alive() and not errors
    assert names(tmp_path) == ["e"] and (open_folder(path).path / "unet.bin").read_text() == "second"


def test_while_a_build_looks_whether_an_engine_is_in_use_no_other_puts_its_own_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that has just been put there is in use, by its build."""
    path, flock, is_held = build(tmp_path / "e"), fcntl.flock, list[bool]()

    def look(descriptor: int, operation: int) -> None:
        if os.path.samestat(os.fstat(descriptor), os.stat(path / "manifest.json")):
            place = os.open(tmp_path, os.O_RDONLY)
            try:
                flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_held.append(False)
            except BlockingIOError:
                is_held.append(True)
            finally:
                os.close(place)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", look)
    build(path)
    assert is_held == [True, True]  # before the work, and at its end


def test_a_build_that_waits_for_another_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flock, waits = fcntl.flock, threading.Event()

    def noticed(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            waits.set()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", noticed)
    thread = threading.Thread(target=build, args=(tmp_path / "e",))
    message = f"waiting for another build: the folder {tmp_path} is locked"
    with locked(tmp_path):
        thread.start()
        assert waits.wait(60) and message in caplog.text
    thread.join(60)
    open_folder(tmp_path / "e")
    assert caplog.text.count(message) == 1


def test_a_place_that_may_not_be_read_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refused(path: Any, *arguments: Any, **named: Any) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refused)
    build(tmp_path / "e", "old")
    build(tmp_path / "e", "new")
    assert open_folder(tmp_path / "e").networks.joinpath("unet.bin").read_text() == "new"


def test_what_has_come_to_the_place_meanwhile_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "e"
    with pytest.raises(OutputExists, match="exists already"), building(path, {}):
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    assert names(tmp_path) == ["e"] and names(path) == ["mine.txt"]


def test_what_is_no_engine_needs_force(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(OutputExists):
            build(tmp_path / name)
        open_folder(build(tmp_path / name, force=True))
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize(
    "manifest", ['{"name": "a web application"}', '{"seal": "0"}', "{", "[]", r'{"name": "\ud800"}']
)
def test_not_every_folder_with_a_manifest_is_an_engine(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(manifest)
    (tmp_path / "app" / "index.js").write_text("code")
    with pytest.raises(OutputExists):
        build(tmp_path / "app")
    assert names(tmp_path / "app") == ["index.js", "manifest.json"]


def test_what_a_user_put_into_an_engine_is_not_lost_unasked(tmp_path: Path) -> None:
    path = build(tmp_path / "e", "old")
    (path / "take1.mp4").write_text("mine")
    with pytest.raises(OutputExists, match=r"take1\.mp4"):
        build(path, "new")
    assert (path / "take1.mp4").is_file()
    (path / "take1.mp4").unlink()
    (path / "networks" / "unet.bin").unlink()  # a damaged one is built again
    build(path, "new")
    assert (open_folder(path).networks / "unet.bin").read_text() == "new"


def test_the_working_directory_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "sub")
    for path in (Path("."), tmp_path / "project", Path("..")):
        with pytest.raises(OutputExists, match="working directory"):
            build(path, force=True)
    assert names(tmp_path) == ["project"]


def test_a_link_to_an_engine_is_replaced_not_what_it_points_to(tmp_path: Path) -> None:
    build(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert open_folder(tmp_path / "real").networks.joinpath("unet.bin").read_text() == "old"
