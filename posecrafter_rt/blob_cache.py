"""A cache on disk for bytes that are costly to make: one file each, named by a hash of all that they depend on.

Layer 0: imports `atomic`, `mapped_file` and the errors only. It holds exported graphs, compiled networks, timings and how long
stages of builds take. It may be emptied at any time, and no failure to read or write it stops anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from posecrafter_rt.atomic import atomic_path, sha256_json
from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.mapped_file import MappedFile

log = logging.getLogger(__name__)
DIGEST_BYTES = 32
MAX_FILES = 64  # every new frame count of a clip adds some; those not used for the longest time go first


class MappedBlob(MappedFile):
    """A memory-mapped blob. array: uint8 (n,), of its `content`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.array, self._digest = self.content[:-DIGEST_BYTES], self.content[-DIGEST_BYTES:]

    def is_whole(self) -> bool:
        """Return whether the file holds what was written. This reads all of it."""
        is_whole = hashlib.sha256(self.array.data).digest() == self._digest.tobytes()
        self.release()
        return is_whole


class BlobCache:
    """Blobs in a folder, which the first write creates. max_bytes: in all, but the newest stays; None: no limit.

    Each file ends with the SHA-256 of its blob: OpenVINO runs a blob with altered bytes without noticing. Its time is
    that of its last use.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def path(self, key: dict[str, Any]) -> Path:
        """Return the file for a key of JSON values."""
        return self.folder / f"{sha256_json(key)}.blob"

    def holds(self, key: dict[str, Any]) -> bool:
        """Return whether there is a blob, without reading it; it may be damaged."""
        return os.path.isfile(self.path(key))  # Path.is_file raises where a folder may not be searched

    def load(self, key: dict[str, Any]) -> bytes | None:
        """Return the blob, or None if it is absent or damaged."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        blob, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if hashlib.sha256(blob).digest() != digest:
            return None
        self._use(key)
        return blob

    def map(self, key: dict[str, Any]) -> MappedBlob | None:
        """As `load`, but memory-mapped. The file may be removed or replaced meanwhile, but not written to."""
        try:
            blob = MappedBlob(self.path(key))
        except (OSError, ValueError):  # absent, or empty, which cannot be mapped
            return None
        if not blob.is_whole():
            return None
        self._use(key)
        return blob

    def save(self, key: dict[str, Any], blob: bytes | memoryview) -> bool:
        """Write a blob atomically and return whether that worked. If not, a later process makes the blob again."""
        try:
            with atomic_path(self.path(key)) as temporary, temporary.open("wb") as file:
                file.write(blob)
                file.write(hashlib.sha256(blob).digest())
        except (PoseCrafterError, OSError) as error:
            log.warning("not kept for the next time: %s", error)
            return False
        try:
            self._prune()
        except OSError as error:
            log.warning("old files are not removed: %s", error)
        return True

    def _use(self, key: dict[str, Any]) -> None:
        with suppress(OSError):  # another user's, or removed by another process
            os.utime(self.path(key))

    def _prune(self) -> None:
        facts = [(stat, path) for path in self.folder.glob("*.blob") if (stat := _stat(path)) is not None]
        by_use = sorted(facts, key=lambda fact: fact[0].st_mtime_ns, reverse=True)
        until = accumulate(stat.st_size for stat, _ in by_use)
        for count, ((_, path), num_bytes) in enumerate(zip(by_use, until, strict=True)):
            is_too_much = self.max_bytes is not None and num_bytes > self.max_bytes
            if count >= MAX_FILES or (count and is_too_much):  # the newest stays, whatever its size
                path.unlink(missing_ok=True)


def _stat(path: Path) -> os.stat_result | None:
    """Return the file's status, or None if another process has just removed it."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
