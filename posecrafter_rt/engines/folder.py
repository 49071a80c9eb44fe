"""The engine folder: it is built under a temporary name and renamed, and refused if any file is not as it was built.

Layer 4: knows files and hashes, not what is in the files. The manifest has a seal, which shows if it was altered.
"""

from __future__ import annotations

import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posecrafter_rt.atomic import disk_full, flush_to_disk, means_full, refuse_existing, sha256_files
from posecrafter_rt.engines.manifest import (
    MANIFEST,
    SCHEMA,
    is_sealed,
    read_manifest,
    rebuild_hint,
    sealed_manifest,
    write_manifest,
)
from posecrafter_rt.errors import DiskFull, EngineFolderError, OutputExists
from posecrafter_rt.locks import locked

MUTABLE = ("inversions", "compiled")  # caches: not hashed, may be emptied at any time
# Not hashed either: why `auto` passed over other backends, by the fingerprints that their engines would have had.
PASSED_OVER = "passed_over.json"
MAX_REPLACED = 3  # how often an engine that is replaced while it is opened is opened anew

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineFolder:
    """An engine folder; see `open_folder` for what is verified of it.

    path: without links. given: the path that the user gave, absolute; None: the same.
    """

    path: Path
    manifest: dict[str, Any]
    given: Path | None = None

    @property
    def shown(self) -> Path:
        """The path for messages: the one that the user knows."""
        return self.given or self.path

    @property
    def name(self) -> str:
        """The folder's name as the user knows it: of a link to it, the link's."""
        return Path(os.path.abspath(self.shown)).name

    @property
    def networks(self) -> Path:
        """The folder that the backend wrote."""
        return self.path / "networks"

    @property
    def inversions(self) -> Path:
        """The inversion cache."""
        return self.path / "inversions"

    @property
    def compiled(self) -> Path:
        """Compiled code that the backend may keep between processes."""
        return self.path / "compiled"


@contextmanager
def building(
    path: Path, manifest: dict[str, Any], force: bool = False, known: Mapping[str, str] = {}
) -> Iterator[Path]:
    """Yield a new folder beside `path`; if the block succeeds, the folder becomes `path`, with its manifest.

    Only then is an engine folder at `path` replaced; anything else there, or in it, is refused unless `force`. What a
    killed build left beside `path` is removed first. If several builds write one `path`, the last to end wins; each
    waits while another puts its folder in place, and logs that it waits. At the end `manifest` holds all that was
    written: what is at `path` may be another build's by then.
    known: hashes of files that need not be read for them; the block may add some: see `take_networks`.
    Raises: OutputExists; EngineFolderError while the engine at `path` is in use; DiskFull; whatever the block raises.
        None of them leaves anything behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _placing(path):  # waits: a build still holds what it has just put there
        _clear_leftovers(path)
        if not force:
            _refuse_what_is_not_ours(path)
        for outer in path.resolve().parents:
            if sealed_manifest(outer) is not None:
                raise OutputExists(
                    f"{path} would lie in the engine {outer}, which holds nothing else", "give another folder"
                )
        if path.exists() and Path.cwd().is_relative_to(path.resolve()):
            raise OutputExists(f"{path} is or holds the working directory", "give the engine a folder of its own")
        with _unused(path):
            pass  # check before the work, not only after it
    staging = _staging(path)
    with ExitStack() as alone, ExitStack() as held:  # `held` ends first: a build that waits must not find it in use
        try:
            while not _begin(staging, held):
                staging = _staging(path)
            yield staging
            written = [name for name in _file_names(staging) if name not in known]
            files = dict(sorted({**known, **_hash_files(staging, written)}.items()))
            manifest |= write_manifest(staging, {"schema": SCHEMA, **manifest, "files": files})
            for file in staging.rglob("*"):
                flush_to_disk(file)
            alone.enter_context(_placing(path))
            with _unused(path):
                if not force:
                    _refuse_what_is_not_ours(path)  # something may have come there meanwhile
                _replace(path, staging)
        except Exception as error:
            if not isinstance(error, DiskFull) and means_full(error):  # a DiskFull names its own file
                raise disk_full(path, error) from error
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _placing(path: Path) -> Iterator[None]:
    """Hold the place at `path` against other builds, whatever is there: between two renames nothing is.

    If the parent folder may not be read, nothing is held, as on a file system without locks.
    """
    with ExitStack() as held:
        with suppress(PermissionError):
            try:
                held.enter_context(locked(path.parent))
            except BlockingIOError:
                log.warning("waiting for another build: the folder %s is locked", path.parent)
                held.enter_context(locked(path.parent, wait=True))
        yield


def _refuse_what_is_not_ours(path: Path) -> None:
    """Raise OutputExists unless `path` is free, or an engine folder (perhaps damaged) without files of the user's."""
    manifest = sealed_manifest(path)
    if manifest is None:  # web applications have a manifest.json, too
        refuse_existing(path)
        return
    foreign = sorted({*_file_names(path)} - {*manifest["files"]})
    if foreign:
        raise OutputExists(f"{path} holds {foreign[0]}, which is no part of an engine",
                           "move it elsewhere, or give --force to lose it")  # fmt: skip


def _staging(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.part"


def _begin(staging: Path, held: ExitStack) -> bool:
    """Make the folder and hold its manifest until the end; false if another build took it for a leftover in between."""
    staging.mkdir()
    try:
        (staging / MANIFEST).touch()
        held.enter_context(locked(staging / MANIFEST, shared=True))  # shows that it is no leftover
    except FileNotFoundError:
        return False
    return True


@contextmanager
def in_use(folder: EngineFolder) -> Iterator[None]:
    """Keep builds from replacing an engine folder: their files would mix with those that were read before.

    Raises: EngineFolderError if it was replaced since it was opened.
    """
    with locked(folder.path / MANIFEST, shared=True):
        if read_manifest(folder.path).get("seal") != folder.manifest["seal"]:
            raise EngineFolderError(f"{folder.shown} was built anew after it had been opened", "load it again")
        yield


@contextmanager
def _unused(path: Path) -> Iterator[None]:
    """Keep the engine at `path`, if there is one, from being loaded. Raises: EngineFolderError while it is in use."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(path / MANIFEST))
        except BlockingIOError as error:
            raise EngineFolderError(f"{path} is in use by a render, a stream, a server or a refit",
                                    "wait until that has ended, or give another folder: -o FOLDER") from error  # fmt: skip
        except OSError:
            pass  # there is no engine that anybody could have loaded
        yield


def _replace(path: Path, staging: Path) -> None:
    old = staging.with_suffix(".old")
    if path.exists():
        path.rename(old)
    try:
        staging.rename(path)
    except BaseException:  # Ctrl-C included: put the old engine back
        if old.exists():
            old.rename(path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _clear_leftovers(path: Path) -> None:
    """Remove what killed builds of `path` left; if one died between its two renames, put the old folder back."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.*"):
        if leftover.suffix not in (".part", ".old"):
            continue
        with _abandoned(leftover) as is_abandoned:
            if is_abandoned and leftover.suffix == ".old" and not path.exists():
                leftover.rename(path)
            elif is_abandoned:
                _remove(leftover)


@contextmanager
def _abandoned(leftover: Path) -> Iterator[bool]:
    """Whether no build works on it any more: a build holds the manifest of its new folder, and at the end of the old.

    During the block none can start to: one that has only made its folder waits until that is gone, and makes another.
    """
    with ExitStack() as held:
        try:
            if leftover.suffix == ".part":
                (leftover / MANIFEST).touch()
            is_abandoned = held.enter_context(locked(leftover / MANIFEST))  # false without locks: it is not known then
        except (FileNotFoundError, NotADirectoryError):
            is_abandoned = True  # it was no engine, or it is gone by now
        except OSError:
            is_abandoned = False
        yield is_abandoned


def _hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {path.relative_to(folder).as_posix(): digest
            for path, digest in sha256_files(folder / name for name in names).items()}  # fmt: skip


def _file_names(folder: Path) -> list[str]:
    """Return the relative names of all files that are hashed, in a fixed order."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if name.parts[0] not in (*MUTABLE, PASSED_OVER, MANIFEST))


def open_folder(path: str | Path, *, verify: bool = True) -> EngineFolder:
    """Open an engine folder: verify the manifest's seal, and every file against the manifest.

    If a build replaces the engine meanwhile, the new one is opened.
    verify: else files need only be there; `verify_files` reads them.
    Raises: EngineFolderError, which names the first file that is missing, altered or too many.
    """
    # Resolved before anything is read: a link may lead to another engine while files are hashed. And networks are read
    # when they are first called, perhaps from another working directory.
    given, path = Path(path), Path(os.path.realpath(path))
    for _ in range(MAX_REPLACED):
        before = _seal(path)
        try:
            return _open(path, given, verify)
        except (EngineFolderError, OSError):  # while one folder takes the other's place, nothing is there
            if _seal(path) == before:
                raise
    return _open(path, given, verify)


def _seal(path: Path) -> str | None:
    return (sealed_manifest(path) or {}).get("seal")


def _open(path: Path, given: Path, verify: bool) -> EngineFolder:
    manifest = read_manifest(path, given)
    if not is_sealed(manifest):
        raise EngineFolderError(
            f"{given} was altered: {MANIFEST} is not the file that was built", rebuild_hint(given, {})
        )
    files: dict[str, str] = manifest["files"]
    present, rebuild = _file_names(path), rebuild_hint(given, manifest)
    for name in sorted({*files} ^ {*present}):
        if name in files:
            raise EngineFolderError(f"{given} is incomplete: {name} is missing", rebuild)
        raise EngineFolderError(f"{given} holds {name}, which was not built with it",
                                f"remove {given / name}, or {rebuild}")  # fmt: skip
    if verify:
        _compare(path, present, manifest, given)
    return EngineFolder(path, manifest, given.absolute())


def verify_files(folder: EngineFolder, *suffixes: str) -> None:
    """Verify those files of an engine whose names end in one of these; without any, all.

    Raises: EngineFolderError, which names the first file that is altered.
    """
    names = [name for name in folder.manifest["files"] if name.endswith(suffixes or "")]
    _compare(folder.path, names, folder.manifest, folder.shown)


def _compare(path: Path, names: Iterable[str], manifest: Mapping[str, Any], shown: Path) -> None:
    """Raise EngineFolderError about the engine `shown` if one of these files, which lie in `path`, is not as built."""
    for name, digest in _hash_files(path, names).items():
        if digest != manifest["files"][name]:
            is_shared = (path / name).stat().st_nlink > 1
            sharing = "other engines share this file; with one built anew, --refit mends the others; " * is_shared
            raise EngineFolderError(f"{shown} was altered: {name} is not the file that was built",
                                    sharing + rebuild_hint(shown, manifest))  # fmt: skip


def take_networks(source: EngineFolder, folder: Path) -> dict[str, str]:
    """Give those files of an engine's networks that `folder`, a new engine, lacks a second name there: none is read.

    As nothing writes to an engine's files, the two are independent. Where files cannot be linked, such as on another
    file system, they are copied and verified, and the log says so.
    Returns: the files' names and their hashes, as `source` has them.
    Raises: EngineFolderError if one that is copied was altered.
    """
    taken = {name: digest for name, digest in source.manifest["files"].items()
             if (source.path / name).parent == source.networks and not (folder / name).exists()}  # fmt: skip
    copied: list[str] = []
    for name in taken:
        given, target = source.path / name, folder / name
        try:
            os.link(os.path.realpath(given), target)  # of a symbolic link, what it leads to
        except OSError as error:
            if not copied:
                log.warning("the networks of %s cannot be shared (%s): they are copied", source.shown, error.strerror)
            target.unlink(missing_ok=True)  # a network's file system may have made the link that it says it has not
            shutil.copyfile(given, target)
            copied.append(name)
    _compare(folder, copied, source.manifest, source.shown)
    return taken


def shared_bytes(path: Path, names: Iterable[str]) -> int:
    """Return the bytes of those files of an engine that have further names: other engines share them."""
    found = (file.stat() for name in names if (file := path / name).is_file())
    return sum(status.st_size for status in found if status.st_nlink > 1)
