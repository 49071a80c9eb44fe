"""The server's own faults, such as a GPU that fails: logged, told to clients in general words, and counted for `/health`.

Layer 7: noted on the engine's thread.
"""

from __future__ import annotations

import logging
import time

from posecrafter_rt.errors import EngineFolderError, NotFinite, OutOfMemory, PoseCrafterError

# Of ours, those that name the server's files or other processes, and advise what only its owner can do.
_OWN = (OutOfMemory, NotFinite, EngineFolderError)
MANY = 10  # faults in a row with which a server does not count as healthy
_LOG_EVERY_S = 10.0
_log = logging.getLogger(__name__)


class ServerFault(PoseCrafterError):
    """The server failed at what a client asked for; its log says why."""


class Faults:
    """Those of one server. num_in_a_row: how many there were since a frame was last computed."""

    def __init__(self) -> None:
        self.num_in_a_row = 0
        self._logged_s: dict[str, float] = {}  # what was logged → when

    def note(self, what: str, error: Exception, *, is_counted: bool = True) -> PoseCrafterError:
        """Log an error if it is the server's own, and return the one to tell clients. what: what failed by it.

        What is logged already is logged again after ten seconds at the earliest: a fault tends to come with every pose.
        """
        if isinstance(error, PoseCrafterError) and not isinstance(error, _OWN):
            return error
        self.num_in_a_row += is_counted
        said, now_s = f"{what} failed: {type(error).__name__}", time.perf_counter()
        if now_s - self._logged_s.get(said, float("-inf")) >= _LOG_EVERY_S:
            self._logged_s[said] = now_s
            count = f"; failures in a row: {self.num_in_a_row}" if is_counted else ""
            _log.error("%s%s", said, count, exc_info=error)
        kind = OutOfMemory if isinstance(error, OutOfMemory) else ServerFault
        return kind(said, "the server's log says more")
