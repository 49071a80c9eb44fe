"""How long each stage of a build took the last time, from which the time left of this one follows.

Layer 4: a few numbers in the user's cache for each kind of build.
"""

from __future__ import annotations

import json
import time
from typing import Any

from posecrafter_rt.blob_cache import BlobCache
from posecrafter_rt.config import cache_dir


class StageLog:
    """The stages of a build as they begin. key: JSON values that decide how long they take.

    How many blobs the user's cache lacks decides it, too. Until `set_missing` is called, none is assumed to be missing:
    a build of the same key has most likely filled the cache.
    """

    def __init__(self, key: dict[str, Any]) -> None:
        self._cache, self._kind = BlobCache(cache_dir() / "stages"), key
        self._starts: dict[str, float] = {}
        self.set_missing(0)

    def set_missing(self, number: int) -> None:
        """Use the times of builds that had to make so many blobs."""
        self._key = {**self._kind, "missing": number}
        blob = self._cache.load(self._key)
        self._earlier: dict[str, float] = json.loads(blob) if blob is not None else {}  # seconds, in stage order

    def begin(self, stage: str) -> float | None:
        """Note that a stage begins; return the seconds that it and later ones took last time, or None if unknown."""
        self._starts[stage] = time.monotonic()
        if stage not in self._earlier:
            return None
        return sum(list(self._earlier.values())[list(self._earlier).index(stage) :])

    def save(self) -> None:
        """Save what was measured in place of the last time's; call it only for builds that finished."""
        ends = [*list(self._starts.values())[1:], time.monotonic()]
        took = {stage: end - start for (stage, start), end in zip(self._starts.items(), ends, strict=True)}
        self._cache.save(self._key, json.dumps(took).encode())
