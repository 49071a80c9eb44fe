"""Bytes that are costly to make, kept between processes: one file each, under a hash of all that they depend on.

Layer 4: exported graphs and compiled networks. It may be emptied at any time, so no failure to read or write it stops
anything.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from posecrafter_rt.atomic import atomic_path, sha256_json
from posecrafter_rt.config import cache_dir
from posecrafter_rt.errors import PoseCrafterError

log = logging.getLogger(__name__)
DIGEST_BYTES = 32
MAX_FILES = 64  # every new frame count of a clip adds some; the oldest go first


class MappedBlob:
    """A blob read where it lies in its file, page by page as it is asked for; alive as long as its array is used.

    array: uint8 (n,), begins with a page; as if it could be written, which OpenVINO asks for.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        content = np.frombuffer(self._map, np.uint8)
        self.array, self._digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]

    def is_whole(self) -> bool:
        """Whether the file holds what was written; all of it is read."""
        is_whole = hashlib.sha256(self.array.data).digest() == self._digest.tobytes()
        self.release()
        return is_whole

    def release(self) -> None:
        """Let go of its pages, which count as this process's memory; those that are asked for again are read again."""
        self._map.madvise(mmap.MADV_DONTNEED)


class BlobCache:
    """Blobs in a folder, which is made when first written to. max_bytes: of all but the newest; None: any number.

    Each file ends with the SHA-256 of its blob: OpenVINO runs a blob with altered bytes without noticing.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def path(self, key: dict[str, Any]) -> Path:
        """The file for a key of JSON values."""
        return self.folder / f"{sha256_json(key)}.blob"

    def holds(self, key: dict[str, Any]) -> bool:
        """Whether there is a blob, which may be damaged: without reading it."""
        return self.path(key).is_file()

    def load(self, key: dict[str, Any]) -> bytes | None:
        """The blob, or None when absent or damaged."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        blob, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        return blob if hashlib.sha256(blob).digest() == digest else None

    def map(self, key: dict[str, Any]) -> MappedBlob | None:
        """The same, read where it lies: the file may be removed meanwhile, or replaced by another, but not written to."""
        try:
            blob = MappedBlob(self.path(key))
        except (OSError, ValueError):  # it is not there; or empty, which cannot be mapped
            return None
        return blob if blob.is_whole() else None

    def save(self, key: dict[str, Any], blob: bytes | memoryview) -> bool:
        """Write a blob atomically; returns whether it is there. Where that fails, a later process makes it again."""
        try:
            with atomic_path(self.path(key)) as temporary, temporary.open("wb") as file:
                file.write(blob)
                file.write(hashlib.sha256(blob).digest())
            self._prune()
        except (PoseCrafterError, OSError) as error:
            log.warning("not kept for the next time: %s", error)
            return False
        return True

    def _prune(self) -> None:
        facts = [(stat, path) for path in self.folder.glob("*.blob") if (stat := _stat(path)) is not None]
        by_age = sorted(facts, key=lambda fact: fact[0].st_mtime_ns, reverse=True)
        until = accumulate(stat.st_size for stat, _ in by_age)
        for count, ((_, path), num_bytes) in enumerate(zip(by_age, until, strict=True)):
            is_too_much = self.max_bytes is not None and num_bytes > self.max_bytes
            if count >= MAX_FILES or (count and is_too_much):  # the newest stays, whatever its size
                path.unlink(missing_ok=True)


def graph_cache() -> BlobCache:
    """The networks that this user has traced, for whatever engine."""
    return BlobCache(cache_dir() / "graphs")


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that another process has just removed."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
