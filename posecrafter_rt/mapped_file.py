"""A file in memory whose pages are read when they are used, and may be dropped again.

Layer 0: imports nothing of the package.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np


class MappedFile:
    """A memory-mapped file. The map lives as long as its array.

    content: uint8 (n,), page-aligned; writable, which OpenVINO requires, but the file never changes.
    Raises: OSError; ValueError for an empty file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.content = np.frombuffer(self._map, np.uint8)

    def release(self) -> None:
        """Drop its pages, which count as this process's memory. Pages that are used later are read again."""
        self._map.madvise(mmap.MADV_DONTNEED)
