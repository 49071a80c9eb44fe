"""One client's avatar: the newest pose in, frames and messages out.

Layer 7: `render` runs on the engine's thread, everything else on the event loop; both count what they drop.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from posecrafter_rt.errors import PoseCrafterError
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.poses.fit import PersonFit
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve.faults import Faults
from posecrafter_rt.serve.metrics import Metrics
from posecrafter_rt.serve.options import MAX_AGE_S
from posecrafter_rt.serve.protocol import HELD, JPEG, REPEAT, RESET, Configure, FrameHeader, PoseMessage, error_message
from posecrafter_rt.serve.slots import Slots

if TYPE_CHECKING:
    from posecrafter_rt.runtime.stream import StepInfo
    from posecrafter_rt.runtime.stream_options import StreamOptions

_KEPT_TIMES = 256
_KEPT_TEXTS = 32
_ERROR_EVERY_S = 1.0


class Stream(Protocol):
    """What a session needs of an avatar's stream."""

    @property
    def last(self) -> StepInfo: ...
    @property
    def options(self) -> StreamOptions: ...
    @property
    def is_closed(self) -> bool: ...
    def step(self, pose: np.ndarray | None) -> np.ndarray: ...
    def reset(self) -> None: ...


@dataclass(eq=False)
class Waiting:
    """A pose, and when it came by `time.perf_counter`; if that is not known, when it may have come at the earliest.

    num_resets: of its session, when it came. is_stepped: the stream has had it; if pipelined, its frame may still come.
    fitted: the pose that the stream then had, (134, 3) on the avatar's canvas; None if nobody is seen.
    """

    pose: PoseMessage
    arrived_s: float
    num_resets: int
    is_stepped: bool = False
    fitted: np.ndarray | None = None


class PendingFrame(NamedTuple):
    """A step whose frame is still to come. flags, wait_ms: for its FrameHeader. is_again: the pose was given before."""

    waiting: Waiting
    flags: int
    wait_ms: float
    is_again: bool


@dataclass(frozen=True, eq=False)
class Shown:
    """A frame for the client, uint8 (H, W, 3) RGB, its header, and when its pose arrived. has_left: it was sent."""

    frame: np.ndarray
    header: FrameHeader
    arrived_s: float
    has_left: threading.Event = field(default_factory=threading.Event)

    @property
    def age_s(self) -> float:
        """Seconds since its pose arrived."""
        return time.perf_counter() - self.arrived_s


class Session:
    """The state of one client.

    latest: the newest frame made for it, (H, W, 3) uint8. format, quality: of the pictures that it wants.
    frames, texts: what goes to it. Whoever talks to the client takes from both, and sends each frame within `sending`.
    failures: why the stream has closed itself, if it has. No frame comes after that, so the client must go.
    num_resets: how many the client asked for. num_dropped: poses so far that no frame was shown for.
    """

    def __init__(
        self, stream: Stream, reference: np.ndarray, reference_pose: np.ndarray, metrics: Metrics, faults: Faults
    ) -> None:
        self.id = secrets.token_urlsafe(9)
        self.latest = reference
        self.format, self.quality = JPEG, 85
        self.frames: Slots[Shown] = Slots(1, self.count_overtaken)
        self.texts: Slots[dict[str, Any]] = Slots(_KEPT_TEXTS)
        self.failures: Slots[PoseCrafterError] = Slots(1)
        self._fits_person = True
        self._stream = stream
        self._size: tuple[int, int] = reference.shape[:2]
        self._person = PersonFit(reference_pose)
        self._metrics, self._faults = metrics, faults
        self._delay, self._pending = steps_in_flight(stream.options) - 1, deque[PendingFrame]()
        self._num_resets_done = self.num_resets = 0
        self._is_broken = self.is_closed = False
        self.num_dropped = self.num_shown = 0
        self._newest: Shown | None = None
        self._count_lock = threading.Lock()
        self._render_ms: deque[float] = deque(maxlen=_KEPT_TIMES)
        self._last_error_s = float("-inf")

    def count_overtaken(self) -> None:
        """A pose was overtaken by a newer one or by a reset, or its stream went on in float32, before its frame was sent."""
        self._count_dropped("overtaken")

    def count_limited(self) -> None:
        """A pose came faster than the rate limit allows."""
        self._count_dropped("limited")

    def count_stale(self) -> None:
        """A pose, or its frame, grew too old to be shown."""
        self._count_dropped("stale")

    def _count_dropped(self, reason: str) -> None:
        """May be called from any thread."""
        with self._count_lock:
            self.num_dropped += 1
        self._metrics.dropped.labels(reason).inc()

    @contextmanager
    def sending(self, shown: Shown) -> Iterator[None]:
        """Count a frame as shown; the block sends it."""
        self.num_shown += 1
        self._metrics.age.observe(shown.age_s)
        try:
            yield
        finally:
            shown.has_left.set()

    def wait_until_left(self, most_s: float) -> None:
        """Wait until the newest frame is sent, for `most_s` at most."""
        if self._newest is not None:
            self._newest.has_left.wait(most_s)

    def configure(self, wish: Configure) -> None:
        """Follow what the client wants from the next frame on."""
        self.format, self.quality = wish.format or self.format, wish.quality or self.quality
        if wish.fit is not None:
            self._fits_person = wish.fit == "person"

    def reset(self) -> None:
        """Forget the past frames and the person before the next pose that comes; poses that wait are dropped."""
        self.num_resets += 1

    def stats(self, seconds: float, num_before: int) -> dict[str, Any]:
        """Return the message about the last `seconds`, at whose start `num_shown` was `num_before`."""
        times = np.array(self._render_ms or [0.0])
        p50, p95 = np.percentile(times, [50, 95])
        return {"type": "stats", "fps": round((self.num_shown - num_before) / seconds, 2),
                "render_ms_p50": round(float(p50), 2), "render_ms_p95": round(float(p95), 2),
                "dropped": self.num_dropped}  # fmt: skip

    def render(self, waiting: Waiting) -> bool:
        """Take a turn: show the frame of a pose, or tell the client what went wrong.

        Returns: whether a frame is still to come from a pipelined stream. It comes with the next turns, which repeat
            the pose if there is no other. One pose takes steps - 1 more turns; then the stream rests.
        """
        if self.is_closed:
            return False
        is_again = waiting.is_stepped
        started_s = time.perf_counter()
        wait_s = started_s - waiting.arrived_s
        if not is_again:
            if waiting.num_resets < self.num_resets:
                self.count_overtaken()
                return False
            self._metrics.wait.observe(wait_s)
            if wait_s > MAX_AGE_S:
                self._drop_stale(f"a pose waited {wait_s:.1f} s for its turn")
                return False
        try:
            frame = self._step(waiting)
        except Exception as error:  # one client's failing step must not end the service of the others
            self._fail(waiting, error)
            return False
        render_ms = (time.perf_counter() - started_s) * 1000
        last = self._stream.last
        if not is_again:
            self._count_step(last, render_ms)
        flags = HELD * last.held | REPEAT * last.is_repeat | RESET * last.reset
        self._pending.append(PendingFrame(waiting, flags, wait_s * 1000, is_again and not last.lost))
        if len(self._pending) > self._delay:
            finished = self._pending.popleft()
            if not finished.is_again:
                self._show(frame, finished, render_ms)
        return any(not pending.is_again for pending in self._pending)

    def _step(self, waiting: Waiting) -> np.ndarray:
        """Give a pose to the stream. Only a new pose resets it first, never one that was given before."""
        if waiting.num_resets > self._num_resets_done or self._is_broken:
            self._num_resets_done, self._is_broken = waiting.num_resets, False
            self._stream.reset()
            self._person.reset()
            self._forget_pending()
        if not waiting.is_stepped:
            waiting.fitted = self._fit(waiting)
        frame = self._stream.step(waiting.fitted)
        waiting.is_stepped = True
        if self._stream.last.lost:
            self._forget_pending(but=waiting)
        return frame

    def _count_step(self, last: StepInfo, render_ms: float) -> None:
        if not last.is_repeat:
            self._faults.num_in_a_row = 0
        self._render_ms.append(render_ms)
        self._metrics.render.observe(render_ms / 1000)
        self._metrics.frames.labels("repeat" if last.is_repeat else "held" if last.held else "rendered").inc()

    def _forget_pending(self, but: Waiting | None = None, why: str = "overtaken") -> None:
        """Drop the frames that are still to come. but: a pose that is being stepped again, so its frame comes later."""
        for pending in self._pending:
            if not pending.is_again and pending.waiting is not but:
                self._count_dropped(why)
        self._pending.clear()

    def _fit(self, waiting: Waiting) -> np.ndarray | None:
        """Return the pose on the avatar's canvas, float32 (134, 3), or None."""
        pose = waiting.pose
        if pose.keypoints is None:
            return None
        if self._fits_person:
            similarity = self._person.similarity(pose.keypoints, pose.canvas, waiting.arrived_s)
            if similarity is not None:
                return similarity.apply(pose.keypoints)
        return transform_keypoints(PoseSequence(pose.keypoints[np.newaxis], pose.canvas), self._size).keypoints[0]

    def _show(self, frame: np.ndarray, finished: PendingFrame, render_ms: float) -> None:
        arrived_s, pose = finished.waiting.arrived_s, finished.waiting.pose
        age_s = time.perf_counter() - arrived_s
        if age_s > MAX_AGE_S:
            turns = f"{self._delay + 1} turns of " if self._delay else ""
            self._drop_stale(f"a frame took {turns}{render_ms / 1000:.1f} s and came {age_s:.1f} s after its pose")
            return
        self.latest = frame
        header = FrameHeader(self.format, finished.flags, pose.sequence, pose.sent_ms, frame.shape[:2],
                             self.num_dropped, finished.wait_ms, render_ms)  # fmt: skip
        self._newest = Shown(frame, header, arrived_s)
        self.frames.put(self._newest)

    def _drop_stale(self, why: str) -> None:
        self.count_stale()
        self._tell(PoseCrafterError(f"{why}; frames older than {MAX_AGE_S:g} s are not shown",
                                    f"{faster_hint(self._stream.options)}, or for fewer sessions"))  # fmt: skip

    def _fail(self, waiting: Waiting, error: Exception) -> None:
        self._metrics.errors.inc()
        self._is_broken = True  # a step that was broken off may have left the past frames half changed
        if not waiting.is_stepped:  # else its frame is among those that are still to come
            self._count_dropped("failed")
        self._forget_pending(why="failed")
        told = self._faults.note("the step", error)
        if self._stream.is_closed:
            self.is_closed = True
            self.failures.put(told)
        else:
            self._tell(told)

    def _tell(self, error: PoseCrafterError) -> None:
        """Tell the client, at most once per second: a fault tends to come with every pose."""
        now_s = time.perf_counter()
        if now_s - self._last_error_s >= _ERROR_EVERY_S:
            self._last_error_s = now_s
            self.texts.put(error_message(error))


def steps_in_flight(options: StreamOptions) -> int:
    """Return how many calls of the stream's `step` a pose's frame takes, its own included."""
    return options.steps if options.is_pipelined else 1


def faster_hint(options: StreamOptions) -> str:
    """Return what helps if frames come too late."""
    if options.steps == 1:
        return "build the engine for a smaller --size"
    return "serve without --pipelined, or with fewer --steps" if options.is_pipelined else "serve with fewer --steps"
