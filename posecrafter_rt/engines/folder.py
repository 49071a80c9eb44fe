"""The engine folder: built under a temporary name and renamed, every file hashed, refused when anything is off.

Layer 4: knows files and hashes, not what is in them.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posecrafter_rt.atomic import refuse_overwrite, sha256_file
from posecrafter_rt.errors import EngineFolderError

SCHEMA = 1
MANIFEST = "manifest.json"
MUTABLE = ("inversions", "compiled")  # caches: outside the hashes, may be emptied at any time


@dataclass(frozen=True)
class EngineFolder:
    """An engine folder whose every file was found to be the one that was built."""

    path: Path
    manifest: dict[str, Any]

    @property
    def networks(self) -> Path:
        """What the backend wrote."""
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
def building(path: Path, manifest: dict[str, Any], force: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path`; when the block ends well it becomes `path`, with its manifest.

    An engine folder at `path` is replaced only then; anything else there is kept unless `force`.
    Raises: OutputExists; DiskFull and others from the block, which leave nothing behind.
    """
    if not (path / MANIFEST).is_file():
        refuse_overwrite(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    staging.mkdir()
    try:
        yield staging
        files = {name: sha256_file(staging / name) for name in _file_names(staging)}
        text = json.dumps({"schema": SCHEMA, **manifest, "files": files}, indent=2)
        (staging / MANIFEST).write_text(text, encoding="utf-8")
        _replace(path, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(path: Path, staging: Path) -> None:
    old = staging.with_suffix(".old")
    if path.exists():
        path.rename(old)
    staging.rename(path)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _file_names(folder: Path) -> list[str]:
    """Every hashed file, relative, in a fixed order."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if name.parts[0] not in (*MUTABLE, MANIFEST))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, unverified. Raises: EngineFolderError when absent, not JSON, or of another schema."""
    file = path / MANIFEST
    if not file.is_file():
        raise EngineFolderError(f"{path} is not an engine folder", f"posecrafter-rt build-engine tuned.ckpt -o {path}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineFolderError(f"{file} is damaged", rebuild_hint(path)) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise EngineFolderError(f"{file} is of another version of this package", rebuild_hint(path))
    return manifest


def rebuild_hint(path: Path) -> str:
    """The command that mends an engine folder."""
    return f"build it again: posecrafter-rt build-engine tuned.ckpt -o {path} --force"


def open_folder(path: str | Path) -> EngineFolder:
    """Verify every file against the manifest.

    Raises: EngineFolderError, naming the first file that is missing, altered or too many.
    """
    path = Path(path)
    manifest = read_manifest(path)
    files: dict[str, str] = manifest["files"]
    present = _file_names(path)
    for name in sorted({*files, *present}):
        if name not in present:
            raise EngineFolderError(f"{path} is incomplete: {name} is missing", rebuild_hint(path))
        if name not in files:
            raise EngineFolderError(f"{path} holds {name}, which was not built with it",
                                    f"remove {path / name}, or {rebuild_hint(path)}")  # fmt: skip
        if sha256_file(path / name) != files[name]:
            raise EngineFolderError(f"{path} was altered: {name} is not the file that was built", rebuild_hint(path))
    return EngineFolder(path, manifest)
