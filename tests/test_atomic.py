"""Atomic writes: whole or absent, errors of the package's own kind, stable hashes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from posecrafter_rt import atomic
from posecrafter_rt.atomic import (
    atomic_path,
    refuse_among,
    refuse_in_engine,
    refuse_overwrite,
    refuse_sources,
    sha256_file,
    sha256_json,
)
from posecrafter_rt.errors import DiskFull, OutputExists, PoseCrafterError
from posecrafter_rt.locks import locked


def test_the_file_appears_whole_under_its_name(tmp_path):
    target = tmp_path / "deep" / "er" / "clip.mp4"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.suffix == ".mp4" and temporary != target
        temporary.write_bytes(b"abc")
        assert not target.exists()
    assert target.read_bytes() == b"abc" and os.listdir(target.parent) == ["clip.mp4"]


def test_what_was_there_is_replaced(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_leaves_nothing_and_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_an_interrupt_while_the_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    close = os.close

    def interrupted(descriptor):
        close(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from posecrafter_rt.atomic import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["a.json", "clip [1]*?.final.mp4", "none"])
def test_what_a_killed_writer_left_is_cleared_by_the_next_of_the_same_file(tmp_path, name):
    for written in (name, f"other {name}"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / written], check=False)
    (tmp_path / ".a.mine.part.json").write_text("mine")
    before = set(os.listdir(tmp_path))
    assert len(before) == 3
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    kept = {entry for entry in before if entry.startswith((".other ", ".a.mine"))}
    assert len(kept) == 2 and set(os.listdir(tmp_path)) == kept | {name}


@pytest.mark.parametrize("name", ["a" * 251 + ".mp4", "字" * 83 + ".json", "b" * 255])
def test_a_stem_of_any_length_that_a_folder_takes_can_be_written(tmp_path, name):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], check=False)
    (left,) = os.listdir(tmp_path)
    assert left.endswith(f".part{Path(name).suffix}")
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == [name]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    with atomic_path(tmp_path / "a") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "a") as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_without_locks_what_may_be_anothers_stays(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".a.0123abcd.part").write_text("half")
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert sorted(os.listdir(tmp_path)) == [".a.0123abcd.part", "a"]


def test_a_file_that_is_cleared_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    """Another writer of the same file looks for leftovers just then."""
    cleared = []

    def late(path, **shared):
        if not cleared:
            cleared.append(path)
            path.unlink()
        return locked(path, **shared)

    monkeypatch.setattr(atomic, "locked", late)
    with atomic_path(tmp_path / "a") as temporary:
        assert cleared and temporary != cleared[0]
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["a"]


def test_a_writer_that_removed_its_file_gets_its_own_error(tmp_path):
    with pytest.raises(KeyError), atomic_path(tmp_path / "a") as temporary:
        temporary.unlink()
        raise KeyError("mine")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError('serializing: IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
def test_a_full_disk_is_said_plainly(tmp_path, error):
    target = tmp_path / "a.bin"
    with pytest.raises(DiskFull, match=r"no space left to write .*a\.bin") as caught, atomic_path(target):
        raise error
    assert caught.value.hint and caught.value.__cause__ is error and not os.listdir(tmp_path)


def test_another_full_disk_is_told_by_its_own_name(tmp_path):
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    full = OSError(errno.ENOSPC, "No space left on device", str(elsewhere / "b"))
    hidden = RuntimeError(f"compiling: {full}")
    hidden.__context__, hidden.__suppress_context__ = full, True  # raised from None
    for error in (full, hidden, OSError(errno.ENOSPC, "No space left on device", bytes(elsewhere / "b"))):
        with pytest.raises(DiskFull, match="left to write .*elsewhere/b$") as caught, atomic_path(folder / "a"):
            raise error
        assert str(elsewhere) in caught.value.hint and not os.listdir(folder)
    with (
        pytest.raises(DiskFull, match="no space left to write .*elsewhere/b$"),
        atomic_path(folder / "a"),
        atomic_path(elsewhere / "b"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it, without a name
    with pytest.raises(DiskFull, match="no space left to write .*mine/a$"), atomic_path(folder / "a") as part:
        raise OSError(errno.ENOSPC, "No space left on device", str(part))


def test_a_disk_that_fills_at_the_flush_is_said_plainly(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"x")
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_hold_the_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PoseCrafterError, match=r"cannot write .*file/a\.bin") as caught,
        atomic_path(tmp_path / "file" / "a.bin"),
    ):
        pytest.fail("the block must not run")
    assert caught.value.hint


def test_a_folder_in_the_files_place_is_kept(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(PoseCrafterError, match="cannot write"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["a"]


def test_other_errors_of_the_block_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), atomic_path(tmp_path / "a"):
        raise FileNotFoundError(errno.ENOENT, "no source")


def test_the_file_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_refuses_to_overwrite_unless_forced(tmp_path):
    target = tmp_path / "a"
    refuse_overwrite(target, False)
    target.write_text("mine")
    with pytest.raises(OutputExists, match="exists already") as caught:
        refuse_overwrite(target, False)
    assert "--force" in caught.value.hint
    refuse_overwrite(target, True)
    for force in (False, True):  # which would not help
        with pytest.raises(OutputExists, match="is a folder"):
            refuse_overwrite(tmp_path, force)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_regular_file_is_not_replaced_even_by_force(tmp_path, force, monkeypatch):
    """Its reader would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's name may have 107 bytes
        listening.bind("s")
        for path, kind in ((tmp_path / "pipe", "a named pipe"), (tmp_path / "link", "a named pipe"),
                           (tmp_path / "s", "a socket"), (Path(os.devnull), "a device")):  # fmt: skip
            with pytest.raises(OutputExists, match=f"{path} is {kind}, which a file would replace") as caught:
                refuse_overwrite(path, force)
            assert "--force" not in caught.value.hint


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="it lists what a process has open")
def test_a_device_that_leads_to_a_regular_file_is_not_replaced(tmp_path):
    with open(tmp_path / "redirected", "w") as file:
        for path in (Path(f"/proc/self/fd/{file.fileno()}"), Path(f"/dev/fd/{file.fileno()}")):
            with pytest.raises(OutputExists, match="is a device"):
                refuse_overwrite(path, True)
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{file.fileno()}")
        refuse_overwrite(tmp_path / "link", True)  # which would not replace the device


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refuse_overwrite(tmp_path / "new" / "folder" / "a", False)
    with pytest.raises(PoseCrafterError, match=r"cannot write .*/file/b/a: .*/file is no folder") as caught:
        refuse_overwrite(tmp_path / "file" / "b" / "a", True)
    assert caught.value.hint
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may write everywhere
    with pytest.raises(PoseCrafterError, match=rf"cannot write .*/new/a: {tmp_path} may not be written to"):
        refuse_overwrite(tmp_path / "new" / "a", True)


def test_nothing_is_written_among_the_files_that_it_is_made_from(tmp_path):
    folder, engine = tmp_path / "poses", tmp_path / "me.engine"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    for path in (folder / "a", tmp_path / "link" / "a"):
        with pytest.raises(OutputExists, match="a would lie among the poses that it is made from"):
            refuse_among(path, folder, "poses")
    refuse_among(folder / "new" / "a", folder, "poses")
    refuse_among(folder / "a", folder / "b", "poses")
    for path in (engine / "a", engine / "new" / "a"):
        with pytest.raises(OutputExists, match="a would lie in the engine"):
            refuse_in_engine(path, engine)
    refuse_in_engine(tmp_path / "a", engine)


def test_nothing_replaces_what_it_is_made_from(tmp_path):
    source, folder = tmp_path / "a", tmp_path / "folder"
    folder.mkdir()
    (folder / "b").touch()
    source.touch()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard link").hardlink_to(source)  # as `A` is, where a file system does not tell letters' cases apart
    refuse_sources(tmp_path / "new", source, folder / "b", tmp_path / "none")
    refuse_sources(folder / "c", folder / "b", folder)  # into a folder that is read
    for path in (source, tmp_path / "link", tmp_path / "hard link", folder / ".." / "a"):
        with pytest.raises(OutputExists, match="is itself what it would be made from"):
            refuse_sources(path, source)
    with pytest.raises(OutputExists, match=r"folder holds .*/folder/b, from which it is made"):
        refuse_sources(folder, source, folder / "b")


def test_a_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists):
        refuse_overwrite(tmp_path / "link", False)


def test_file_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "b").write_bytes(b"x" * (3 << 20))
    assert sha256_file(tmp_path / "b") != sha256_file(tmp_path / "a")


def test_json_hash_does_not_depend_on_key_order_but_on_values():
    assert sha256_json({"a": 1, "b": (1, 2)}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
    assert sha256_json({"ä": 1.5}) == sha256_json({"ä": 1.5})


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), ({1, 2}, TypeError)])
def test_json_hash_refuses_what_json_does_not_have(value, error):
    with pytest.raises(error):
        sha256_json(value)
