"""The engine folder: whole or absent, refused when anything is off, whoever was killed while building it."""

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

import pytest

from posecrafter_rt.engines.folder import (
    building,
    in_use,
    open_folder,
    read_manifest,
    rebuild_command,
    rebuild_networks_hint,
    write_manifest,
)
from posecrafter_rt.errors import DiskFull, EngineFolderError, OutputExists


def build(path: Path, content: str = "network", force: bool = False) -> Path:
    with building(path, {"backend": "torch"}, force) as staging:
        (staging / "networks").mkdir()
        (staging / "networks" / "unet.bin").write_text(content)
        (staging / "reference.safetensors").write_text("frames")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_built_opens_and_knows_its_places(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "deep" / "me.engine"))
    assert folder.manifest["backend"] == "torch"
    assert set(folder.manifest["files"]) == {"networks/unet.bin", "reference.safetensors"}
    assert (folder.networks / "unet.bin").is_file() and names(tmp_path / "deep") == ["me.engine"]


def test_caches_lie_outside_the_hashes(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "e"))
    for cache in (folder.inversions, folder.compiled):
        cache.mkdir()
        (cache / "anything").write_text("anything")
    open_folder(tmp_path / "e")


@pytest.mark.parametrize("name", ["networks/unet.bin", "reference.safetensors"])
def test_one_byte_changed_names_the_file(tmp_path: Path, name: str) -> None:
    file = build(tmp_path / "e") / name
    content = bytearray(file.read_bytes())
    content[2] ^= 1
    file.write_bytes(content)
    with pytest.raises(EngineFolderError, match=f"altered: {name}") as caught:
        open_folder(tmp_path / "e")
    assert caught.value.hint and "build-engine" in caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [(b"torch", b"torcg"), (b'"seal": "', b'"seal": "0')])
def test_a_changed_manifest_is_refused(tmp_path: Path, before: bytes, after: bytes) -> None:
    manifest = build(tmp_path / "e") / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(before, after, 1))
    with pytest.raises(EngineFolderError, match="manifest.json"):
        open_folder(tmp_path / "e")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        r'{"schema": 0, "name": "\ud800"}',
        '{"schema": 0}',
        '{"schema": 0, "size": NaN}',
        '{"schema": 6, "size": NaN}',
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (build(tmp_path / "e") / "manifest.json").write_text(content)
    with pytest.raises(EngineFolderError):
        open_folder(tmp_path / "e")


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = build(tmp_path / "e")
    (path / "networks" / "more").write_text("x")
    with pytest.raises(EngineFolderError, match="holds networks/more"):
        open_folder(path)
    (path / "networks" / "more").unlink()
    (path / "reference.safetensors").unlink()
    with pytest.raises(EngineFolderError, match="reference.safetensors is missing"):
        open_folder(path)
    with pytest.raises(EngineFolderError, match="not an engine folder"):
        open_folder(tmp_path / "nothing")


def test_a_changed_manifest_can_be_sealed_again(tmp_path: Path) -> None:
    path = build(tmp_path / "e")
    write_manifest(path, {**read_manifest(path), "backend": "openvino"})
    assert open_folder(path).manifest["backend"] == "openvino"


def test_what_mends_an_engine_says_what_its_manifest_says() -> None:
    path, command = Path("me.engine"), "posecrafter-rt build-engine tuned.ckpt -o me.engine"
    assert rebuild_command(path, {"device": {"type": "cpu"}, "feature_reuse": True}) == command
    manifest = {
        "backend": "tensorrt", "precision": "fp16", "size": [512, 384], "max_frames": 48, "feature_reuse": False,
        "loras": [{"file": "a style.safetensors", "sha256": "0", "scale": 0.5}, {"file": "b", "sha256": "1", "scale": 1.0}],
        "small_decoder": "2",
    }  # fmt: skip
    options = "--backend tensorrt --precision fp16 --size 512x384 --max-frames 48 --lora 'a style.safetensors':0.5 --lora b:1.0"
    assert rebuild_command(path, manifest) == f"{command} {options} --small-decoder FOLDER --no-feature-reuse"


@pytest.mark.parametrize("is_sealed", [True, False])
def test_an_engine_of_another_version_is_built_again_as_it_was_unless_somebody_has_altered_it(
    tmp_path: Path, is_sealed: bool
) -> None:
    path = build(tmp_path / "e")
    write_manifest(path, {**read_manifest(path), "schema": 2, "precision": "bf16"})
    if not is_sealed:
        file = path / "manifest.json"
        file.write_text(file.read_text().replace("bf16", "bf17"))
    with pytest.raises(EngineFolderError, match="another version") as caught:
        open_folder(path)
    options = " --backend torch --precision bf16" if is_sealed else ""
    assert caught.value.hint == f"build it again: posecrafter-rt build-engine tuned.ckpt -o {path}{options} --force"


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
        refused = pytest.raises(EngineFolderError, match="e is in use by a render, a stream or a server")
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


def test_what_has_come_to_the_place_meanwhile_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "e"
    with pytest.raises(OutputExists, match="exists already"), building(path, {}):
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    assert names(tmp_path) == ["e"] and names(path) == ["mine.txt"]


def test_what_mends_networks_is_said_in_full_where_their_manifest_is_there(tmp_path: Path) -> None:
    folder = open_folder(build(tmp_path / "e"))
    command = f"posecrafter-rt build-engine tuned.ckpt -o {folder.path} --backend torch --force"
    assert rebuild_networks_hint(folder.networks) == f"build it again: {command}"
    (folder.path / "manifest.json").write_text("{}")
    for networks in (folder.networks, tmp_path):
        assert rebuild_networks_hint(networks) == "build it again: posecrafter-rt build-engine ... --force"


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
