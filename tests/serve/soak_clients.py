"""Clients that come and go, as a program of its own: what it allocates and how it is held up are not the server's.

`python -m tests.serve.soak_clients URL SECONDS CLIENTS` writes what they saw as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from posecrafter_rt.serve.protocol import decode_frame
from tests.serve.drawn import pose_bytes

POSES_PER_SECOND = 25
_TICK_S, _LATE_S = 0.02, 0.03


@dataclass
class Seen:
    """What the clients saw.

    oldest_ms: from the sending of a pose to the coming of its frame, less what this program itself stood still in between;
        oldest_by_the_clock_ms: with it.
    """

    num_frames: int = 0
    num_sessions: int = 0
    num_refused: int = 0
    oldest_ms: float = 0.0
    oldest_by_the_clock_ms: float = 0.0
    problems: list[str] = field(default_factory=list)


class Standstills:
    """When this program got no time: a thread that sleeps a little sees it."""

    def __init__(self) -> None:
        self._spans_s: list[tuple[float, float]] = []
        self._tick_s = time.time()
        threading.Thread(target=self._watch, daemon=True).start()

    def within_s(self, begin_s: float, end_s: float) -> float:
        """How long it stood still between two times."""
        spans = [*self._spans_s[-100:], self._late(time.time())]
        return sum(max(0.0, min(to_s, end_s) - max(from_s, begin_s)) for from_s, to_s in spans)

    def _late(self, now_s: float) -> tuple[float, float]:
        """The span since the last tick, empty where that is not long ago."""
        return (self._tick_s + _TICK_S, now_s) if now_s - self._tick_s > _TICK_S + _LATE_S else (now_s, now_s)

    def _watch(self) -> None:
        while True:
            time.sleep(_TICK_S)
            now_s = time.time()
            span = self._late(now_s)
            if span[1] > span[0]:
                self._spans_s.append(span)
            self._tick_s = now_s


class Clients:
    """A number of clients on threads."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._until_s = url, time.monotonic() + seconds
        self._lock, self._standstills = threading.Lock(), Standstills()
        self.seen = Seen()

    def run(self, count: int) -> None:
        """Until the time is over."""
        threads = [threading.Thread(target=self._live, args=(seed,)) for seed in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _live(self, seed: int) -> None:
        """A client that comes, stays for some seconds, and goes: now with a farewell, now without."""
        rng = np.random.default_rng(seed)
        try:
            while time.monotonic() < self._until_s:
                with self._suppress_refusal():
                    self._stay(rng, min(self._until_s, time.monotonic() + rng.uniform(0.5, 4)))
                time.sleep(rng.uniform(0, 0.3))
        except BaseException as problem:
            self.seen.problems.append(repr(problem))

    @contextlib.contextmanager
    def _suppress_refusal(self) -> Iterator[None]:
        """The place of one that left without a farewell may not be free yet: then the client comes again."""
        try:
            yield
        except ConnectionClosed as closed:
            if closed.rcvd is None or closed.rcvd.code != 1013:
                raise
            self.seen.num_refused += 1

    def _stay(self, rng: np.random.Generator, until_s: float) -> None:
        with connect(self._url, compression=None) as client:
            with self._lock:
                self.seen.num_sessions += 1
            if rng.random() < 0.2:
                client.send('{"type": "record", "on": true}')
            for number in range(10**9):
                if time.monotonic() > until_s:
                    break
                client.send(pose_bytes(number, shift=number % 40 / 4, nobody=number % 100 > 90))
                try:
                    message = client.recv(timeout=1 / POSES_PER_SECOND)
                except TimeoutError:
                    continue
                if not isinstance(message, str):
                    self._see(decode_frame(message)[0].sent_ms / 1000)
            if rng.random() < 0.3:
                client.socket.close()  # as a laptop that is shut

    def _see(self, sent_s: float) -> None:
        now_s = time.time()
        age_ms = (now_s - sent_s) * 1000
        own_ms = self._standstills.within_s(sent_s, now_s) * 1000
        with self._lock:
            self.seen.num_frames += 1
            self.seen.oldest_by_the_clock_ms = max(self.seen.oldest_by_the_clock_ms, age_ms)
            self.seen.oldest_ms = max(self.seen.oldest_ms, age_ms - own_ms)


def main(url: str, seconds: float, count: int) -> None:
    """Run them, and write what they saw."""
    clients = Clients(url, seconds)
    clients.run(count)
    sys.stdout.write(json.dumps(asdict(clients.seen)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
