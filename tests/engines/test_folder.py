"""The engine folder: whole or absent, refused when anything is off, whoever was killed while building it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posecrafter_rt.engines import folder as folder_module
from posecrafter_rt.engines.folder import building, open_folder, read_manifest, write_manifest
from posecrafter_rt.errors import DiskFull, EngineFolderError, OutputExists


def build(path: Path, content: str = "network", force: bool = False) -> Path:
    with building(path, {"backend": "torch"}, force) as staging:
        (staging / "networks").mkdir()
        (staging / "networks" / "unet.bin").write_text(content)
        (staging / "reference.safetensors").write_text("frames")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def ended_process() -> int:
    """The number of a process that has run to its end."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


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


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema": 0}'])
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


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path, ended_process: int) -> None:
    build(tmp_path / "e")
    for name in (f".e.{ended_process}.0123abcd.part", f".e.{ended_process}.0123abcd.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    kept = [f".e.{os.getpid()}.0123abcd.part", f".e.{ended_process}.part", f".else.{ended_process}.0123abcd.part"]
    for name in kept:
        (tmp_path / name).mkdir()
    with building(tmp_path / "e", {}):
        pass
    assert names(tmp_path) == sorted(["e", *kept])


def test_a_build_killed_between_the_renames_is_undone_by_the_next(tmp_path: Path, ended_process: int) -> None:
    build(tmp_path / "e", "old").rename(tmp_path / f".e.{ended_process}.0123abcd.old")
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "e", {}):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["e"] and open_folder(tmp_path / "e").networks.joinpath("unet.bin").read_text() == "old"


def test_what_is_no_engine_needs_force(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(OutputExists):
            build(tmp_path / name)
        open_folder(build(tmp_path / name, force=True))
    assert names(tmp_path) == ["file", "folder"]


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


def test_a_running_process_is_told_from_an_ended_one(ended_process: int) -> None:
    assert folder_module._is_running(os.getpid()) and not folder_module._is_running(ended_process)
