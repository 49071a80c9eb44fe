"""The backends that `auto` passed over, and why: they run here, but failed to build an engine.

Layer 6: what `building` remembers of them, also for the next build of the same engine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from posecrafter_rt.engines import LAST_RESORT, Backend
from posecrafter_rt.engines.folder import PASSED_OVER, EngineFolder
from posecrafter_rt.errors import DiskFull, is_out_of_memory, last_line

OF_THE_MACHINE = (OSError, MemoryError, DiskFull)  # errors that would end any backend's build

log = logging.getLogger(__name__)


class PassedOver(Exception):
    """The reason, in one line, why a backend that `auto` chose did not build an engine.

    fingerprint: the engine's. is_lasting: whether the backend would fail the next time, too.
    """

    def __init__(self, backend: str, fingerprint: str, reason: str, is_lasting: bool = True) -> None:
        super().__init__(reason)
        self.backend, self.fingerprint, self.is_lasting = backend, fingerprint, is_lasting


class Failures:
    """The backends that `auto` has passed over.

    why: reasons by backend. before: reasons by fingerprint from an earlier build; these are not tried again.
    """

    def __init__(self, before: Mapping[str, str]) -> None:
        self.before, self.why = before, dict[str, str]()
        self._reasons: dict[str, str | None] = {}  # by fingerprint; None: the failure may not happen the next time

    def add(self, error: PassedOver) -> None:
        if error.fingerprint in self.before:
            again = f"build-engine with --backend {error.backend} or --force tries it again"
            self.why[error.backend] = f"it failed at this engine before: {error}; {again}"
        else:
            self.why[error.backend] = f"it failed at this engine: {error}"
        self._reasons[error.fingerprint] = str(error) if error.is_lasting else None
        log.warning("%s is passed over, %s", error.backend, self.why[error.backend])

    def save(self, folder: EngineFolder) -> None:
        """Store the reasons in the engine that was built instead, for `read_passed_over`; failing to is harmless."""
        held = read_passed_over(folder.path)  # empty in a new folder
        kept = {key: reason for key, reason in {**self.before, **held, **self._reasons}.items() if reason is not None}
        if kept != held:
            with suppress(OSError):  # no temporary name: left behind, it would be no part of an engine
                (folder.path / PASSED_OVER).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def read_passed_over(engine: Path) -> dict[str, str]:
    """Return what `Failures.save` stored in an engine folder; empty if there is nothing or it is damaged."""
    try:
        reasons = json.loads((engine / PASSED_OVER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return reasons if isinstance(reasons, dict) else {}


@contextmanager
def passing_over(backend: Backend, fingerprint: str, is_auto: bool) -> Iterator[None]:
    """Turn a failure of a backend that `auto` chose into PassedOver, if there is another backend to try."""
    try:
        yield
    except Exception as error:
        if not is_auto or backend.name == LAST_RESORT or isinstance(error, OF_THE_MACHINE):
            raise
        is_lasting = not is_out_of_memory(error)  # other processes may have held the memory
        raise PassedOver(backend.name, fingerprint, last_line(error), is_lasting) from error
