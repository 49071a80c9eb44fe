"""Write files so that they are whole or absent (temporary name, flush, rename), hash their contents, and order them.

Layer 0: imports the errors and locks only.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from posecrafter_rt.errors import DiskFull, OutputExists, PoseCrafterError
from posecrafter_rt.locks import locked

_CHUNK_BYTES = 1 << 18
_MAX_NAME_BYTES = 255
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all.

    Yields the path of an empty temporary file in the same folder, with the same suffix. When the block ends, that file
    is flushed to the disk and renamed to `path`, replacing what was there. If the block fails or is interrupted, the
    temporary file is removed and `path` is left as it was. Missing folders are made. Files that a killed writer of
    `path` left are removed first. If the file may be the user's, call `refuse_overwrite` before.
    Args: path: the final name.
    Raises:
        DiskFull: no space is left, as reported by the system or by a library in the block. It names `path`, unless the
            error names a file elsewhere.
        PoseCrafterError: the folder or file cannot be written; the message holds the system's reason.
    """
    path = Path(path)
    temporary = _temporary(path)
    with ExitStack() as held:
        try:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _clear_leftovers(path)
                while not _begin(temporary, held):
                    temporary = _temporary(path)
            yield temporary
            with writing(path):
                flush_to_disk(temporary)
                os.replace(temporary, path)
                flush_to_disk(path.parent)
        except BaseException as error:
            with suppress(OSError):  # it may never have been made; the error itself says why
                temporary.unlink()
            # A DiskFull already names its own file.
            if isinstance(error, Exception) and not isinstance(error, DiskFull) and means_full(error):
                raise disk_full(path, error) from error
            raise


def _temporary(path: Path) -> Path:
    # The suffix stays last because encoders choose their format by it. The dot hides the file from listings.
    return path.parent / f".{_short_stem(path)}.{secrets.token_hex(4)}.part{path.suffix}"


def _short_stem(path: Path) -> str:
    """Return the stem, shortened so that the temporary name fits into the 255 bytes that file systems allow.

    A suffix of hundreds of bytes is not handled.
    """
    room = _MAX_NAME_BYTES - len(os.fsencode(f"..{'0' * 8}.part{path.suffix}"))
    stem = path.stem
    while stem and len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return stem


def _begin(temporary: Path, held: ExitStack) -> bool:
    """Make an empty file and lock it until `held` closes; False if it was removed as a leftover before the lock."""
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        held.enter_context(locked(temporary, shared=True))
    except FileNotFoundError:
        return False
    return True


def _clear_leftovers(path: Path) -> None:
    """Remove unlocked temporary files of killed writers of this file; without file locks nothing is removed."""
    pattern = f".{glob.escape(_short_stem(path))}.{'[0-9a-f]' * 8}.part{glob.escape(path.suffix)}"
    for leftover in path.parent.glob(pattern):
        with suppress(OSError), locked(leftover) as is_held:
            if is_held:
                leftover.unlink()


def refuse_overwrite(path: str | os.PathLike[str], force: bool) -> None:
    """Raise unless a file may be written at `path`: it is called before the work, not after it.

    Raises:
        OutputExists: a folder, a pipe, a socket or a device is there, or `force` is false and a file or link is there.
        PoseCrafterError: the folder cannot be made or written to.
    """
    if os.path.isdir(path):
        raise OutputExists(f"{path} is a folder", hint="give the name of a file, such as one in it")
    if (kind := _kind_of_special(Path(path))) is not None:
        raise OutputExists(f"{path} is {kind}, which a file would replace", hint="give the name of a file")
    if not force:
        refuse_existing(path)
    place = next(parent for parent in Path(path).absolute().parents if os.path.lexists(parent))
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        reason = "may not be written to" if os.path.isdir(place) else "is no folder"
        raise PoseCrafterError(f"cannot write {path}: {place} {reason}", "choose a folder that you may write to")


def _kind_of_special(path: Path) -> str | None:
    """Return what is at `path`, if it is no regular file; None if it is one, or if nothing is there."""
    folder = Path(os.path.realpath(path.parent))
    if os.path.lexists(path) and (folder == Path("/dev") or folder.is_relative_to("/proc")):
        return "a device"  # by its place: /dev/stdout leads to a regular file where the output is redirected
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    kinds = {stat.S_IFREG: None, stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def partial_path(path: Path) -> Path:
    """Return the file or folder that holds the state of an interrupted run whose result will be at `path`."""
    return path.with_name(f"{path.name}.partial")


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise OutputExists if something is at `path`: a file, a folder or a link."""
    if os.path.lexists(path):
        raise OutputExists(f"{path} exists already", hint="give --force to replace it, or another name")


def refuse_sources(path: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Raise if `path` is, or contains, a file or folder that it is made from: not even `force` may lose those.

    Raises: OutputExists.
    """
    place = Path(path).resolve()
    for source in sources:
        given = Path(source).resolve()
        is_itself = given == place or _is_same(given, place)
        if is_itself or given.is_relative_to(place):
            what = "is itself what it would be made from" if is_itself else f"holds {source}, from which it is made"
            raise OutputExists(f"{path} {what}", hint="give the output another name")


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names are of one file: of a hard link, or in other letters where a file system does not tell apart."""
    try:
        return path.samefile(other)
    except OSError:  # one of them does not exist
        return False


def refuse_among(path: Path, sources: Path, what: str) -> None:
    """Raise OutputExists if `path` would lie in the folder `sources`, of which it is made: the next command would take
    it for one of its files. sources: a file holds none. what: those files, for the message.
    """
    if path.parent.resolve() == sources.resolve():
        raise OutputExists(f"{path} would lie among the {what} that it is made from", "give another folder")


def refuse_in_engine(path: Path, engine: Path) -> None:
    """Raise OutputExists if `path` would lie in an engine folder, which would then count as altered."""
    if path.resolve().is_relative_to(engine.resolve()):
        raise OutputExists(f"{path} would lie in the engine, which holds nothing else", "give another folder")


def natural_key(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key by which frame_2 comes before frame_10: runs of digits in the stem compare as numbers.

    Frames and poses are paired by this order, so their suffixes do not count, but for files that differ in nothing else.
    """
    runs = re.split(r"(\d+)", path.stem)
    return [(int(run), "") if run.isdecimal() else (-1, run) for run in runs], path.name


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's contents, 64 hexadecimal digits. Raises: OSError if it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))  # reused, because memory that a thread frees is not given back
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, see `sha256_file`; several are hashed at a time."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(sha256_file, paths), strict=True))


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON (sorted keys, no spaces, UTF-8), 64 hexadecimal digits.

    Equal values have equal hashes, whatever the order of their keys; tuples count as lists.
    Raises: TypeError for types that JSON does not have; ValueError for NaN and infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError from writing into an error of the package; BlockingIOError (a file is locked) passes through."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if means_full(error):
            raise disk_full(path) from error
        reason = error.strerror or str(error)
        raise PoseCrafterError(
            f"cannot write {path}: {reason[:1].lower()}{reason[1:]}", hint="choose a folder that you may write to"
        ) from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk.

    Not every file system can flush a folder. There it is skipped; a rename in the folder is atomic all the same.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def means_full(error: BaseException) -> bool:
    """Return whether the error, or its cause, says that no space is left."""
    # Writers in other languages pass the system's message on as text, without its error number.
    is_full = getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)
    return is_full or (error.__cause__ is not None and means_full(error.__cause__))


def disk_full(path: Path, error: BaseException | None = None) -> DiskFull:
    """Return the error for a path that could not be written for lack of space.

    If `error` names a file outside the path's folder, that file is reported instead.
    """
    named = None if error is None else _file_without_space(error)
    if named is not None and not named.resolve().is_relative_to(path.parent.resolve()):
        path = named
    return DiskFull(f"no space left to write {path}", hint=f"free some space in {path.parent}, or write elsewhere")


def _file_without_space(error: BaseException) -> Path | None:
    """Return the file that a "no space" error names: the system names a file it cannot make, not one it cannot grow."""
    name = getattr(error, "filename", None)
    if getattr(error, "errno", None) in _FULL and isinstance(name, (str, bytes)):
        return Path(os.fsdecode(name))
    before = error.__cause__ or error.__context__  # a library may wrap the system's error in its own
    return None if before is None else _file_without_space(before)
