"""A session's turns: fits, flags, what is too old, what fails; and its counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posecrafter_rt.errors import OutOfMemory, PoseError
from posecrafter_rt.framing import transform_keypoints
from posecrafter_rt.poses.draw import draw_pose
from posecrafter_rt.poses.fit import median_pose
from posecrafter_rt.poses.keypoints import PoseSequence
from posecrafter_rt.serve import faults as faults_module
from posecrafter_rt.serve import service as service_module
from posecrafter_rt.serve import session as session_module
from posecrafter_rt.serve.faults import Faults
from posecrafter_rt.serve.metrics import Metrics
from posecrafter_rt.serve.options import ServeOptions
from posecrafter_rt.serve.protocol import HELD, REPEAT, RGB, Configure, PoseMessage
from posecrafter_rt.serve.scheduler import Scheduler
from posecrafter_rt.serve.service import Service
from posecrafter_rt.serve.session import Session, Waiting
from tests.render_scripts import run_script
from tests.serve import drawn
from tests.serve.drawn import SIZE, DrawnAvatar, DrawnStream, make_pose


@pytest.fixture(autouse=True)
def shows_old_frames() -> None:
    """Here their age counts."""


class Clock:
    """A clock that only sleeping moves on."""

    now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of sessions and avatars: nothing takes time but a step, so on no machine does a pose grow old by itself."""
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    monkeypatch.setattr(faults_module, "time", clock)
    monkeypatch.setattr(drawn, "time", clock)
    return clock


class LateStream(DrawnStream):
    """Gives the frame of a pose before, as a pipelined stream does, and calls `in_step` meanwhile."""

    in_step: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, owner: DrawnAvatar, steps: int = 2) -> None:
        super().__init__(owner, SimpleNamespace(steps=steps, window=1, is_pipelined=True))

    def step(self, pose: np.ndarray | None) -> np.ndarray:
        self.in_step()
        return super().step(pose)


class Client:
    """A session and what it was sent so far."""

    def __init__(self, stream: Callable[[DrawnAvatar], DrawnStream] = DrawnStream) -> None:
        self.avatar = DrawnAvatar()
        self.stream = stream(self.avatar)
        self.metrics, self.faults = Metrics(lambda: 1), Faults()
        reference_pose = median_pose(self.avatar.poses.keypoints)
        self.session = Session(self.stream, self.avatar.frames[0], reference_pose, self.metrics, self.faults)

    async def render(self, pose: np.ndarray | None, age_s: float = 0.0, canvas: tuple[int, int] = SIZE) -> None:
        """A turn of a pose that has just come."""
        await self.turn(self.waiting(pose, age_s, canvas))

    def waiting(self, pose: np.ndarray | None, age_s: float = 0.0, canvas: tuple[int, int] = SIZE) -> Waiting:
        return Waiting(
            PoseMessage(3, 99.5, canvas, pose), session_module.time.perf_counter() - age_s, self.session.num_resets
        )

    async def turn(self, waiting: Waiting) -> bool:
        """On another thread, as the engine's."""
        return await asyncio.to_thread(self.session.render, waiting)

    async def frame(self) -> Any:
        return await asyncio.wait_for(self.session.frames.take(), 5)

    async def text(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.session.texts.take(), 5)

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


Test = Callable[[Client], Awaitable[None]]


def on_loop(test: Test, stream: Callable[[DrawnAvatar], DrawnStream] = DrawnStream) -> Callable[[], None]:
    """Runs a test of a client on an event loop."""

    async def with_client() -> None:
        await test(Client(stream))

    def run() -> None:
        asyncio.run(with_client())

    run.__name__ = test.__name__  # type: ignore[attr-defined]
    return run


def pipelined(test: Test) -> Callable[[], None]:
    """The same with a stream that gives the frame of the pose before."""
    return on_loop(test, LateStream)


@on_loop
async def test_a_pose_becomes_a_frame_that_names_it(client: Client) -> None:
    client.session.configure(Configure(fit="canvas"))
    client.avatar.seconds = 0.01
    await client.render(make_pose(), age_s=0.25)
    shown = await client.frame()
    assert np.array_equal(shown.frame, draw_pose(make_pose(), SIZE))
    header = shown.header
    assert (header.sequence, header.sent_ms, header.size, header.flags, header.dropped) == (3, 99.5, SIZE, 0, 0)
    assert (header.wait_ms, header.render_ms, shown.age_s) == pytest.approx((250, 10, 0.26))
    assert client.session.latest is shown.frame and client.count("posecrafter_frames_total", kind="rendered") == 1


@on_loop
async def test_flags_tell_a_lost_person_and_a_repeat(client: Client) -> None:
    flags = []
    for pose in (make_pose(), make_pose(), None):
        await client.render(pose)
        flags.append((await client.frame()).header.flags)
    assert flags == [0, REPEAT, HELD]
    assert (
        client.count("posecrafter_frames_total", kind="repeat")
        == client.count("posecrafter_frames_total", kind="held")
        == 1
    )


@on_loop
async def test_a_canvas_of_another_size_is_carried_over(client: Client) -> None:
    client.session.configure(Configure(fit="canvas"))
    canvas, pose = (640, 640), make_pose() * (10, 10, 1)
    await client.render(pose.astype(np.float32), canvas=canvas)
    expected = transform_keypoints(PoseSequence(pose[np.newaxis], canvas), SIZE).keypoints[0]
    assert np.array_equal((await client.frame()).frame, draw_pose(expected, SIZE))


@on_loop
async def test_a_person_elsewhere_and_of_another_size_is_fitted(client: Client) -> None:
    far = make_pose() * (7, 7, 1) + (300, 100, 0)
    await client.render(far.astype(np.float32), canvas=(720, 1280))
    drawn = (await client.frame()).frame.astype(float)
    usual = draw_pose(median_pose(client.avatar.poses.keypoints), SIZE).astype(float)
    assert np.abs(drawn - usual).mean() < 0.02 * 255  # rounding moves edges a little


@on_loop
async def test_an_old_pose_is_not_rendered(client: Client) -> None:
    await client.render(make_pose(), age_s=1.2)
    assert client.stream.past is None and client.session.num_dropped == 1
    assert "waited 1.2 s" in (await client.text())["message"]
    assert client.count("posecrafter_poses_dropped_total", reason="stale") == 1


@on_loop
async def test_a_frame_that_took_too_long_is_not_shown(client: Client) -> None:
    client.avatar.seconds = 0.3
    before = client.session.latest
    await client.render(make_pose(), age_s=0.9)
    message = await client.text()
    assert message["type"] == "error" and "took 0.3 s" in message["message"] and message["hint"]
    assert client.session.latest is before and client.session.num_shown == 0
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(client.session.frames.take(), 0.1)


@pipelined
async def test_a_frame_whose_turns_took_too_long_says_how_many_there_were(client: Client) -> None:
    waiting, before = client.waiting(make_pose(), age_s=0.9), client.session.latest
    client.avatar.seconds = 0.2
    assert await client.turn(waiting) and not await client.turn(waiting)
    message = await client.text()
    assert "2 turns of 0.2 s" in message["message"] and "without --pipelined" in message["hint"]
    assert client.session.num_dropped == 1 and client.session.latest is before


@on_loop
async def test_a_failing_step_is_told_once_a_second_and_resets(client: Client) -> None:
    client.session.configure(Configure(fit="canvas"))
    await client.render(make_pose(-1000))
    await client.render(make_pose(-1000))
    message = await client.text()
    assert message["type"] == "error" and "RuntimeError" in message["message"]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(client.session.texts.take(), 0.1)
    session_module.time.sleep(1.0)
    await client.render(make_pose(-1000))
    assert await client.text() == message
    assert client.count("posecrafter_step_errors_total") == 3
    assert client.session.num_dropped == client.count("posecrafter_poses_dropped_total", reason="failed") == 3
    await client.render(make_pose())
    await client.frame()
    assert client.avatar.num_resets == 3  # before each step but the first


@pipelined
async def test_a_step_that_fails_drops_its_pose_and_those_on_their_way_once(client: Client) -> None:
    """In a step of the next pose, and in one that repeats the pose itself."""

    def fail() -> None:
        raise RuntimeError

    first = client.waiting(make_pose())
    assert await client.turn(first)
    client.stream.in_step = fail
    await client.render(make_pose(1))
    assert client.session.num_dropped == 2
    client.stream.in_step = lambda: None
    second = client.waiting(make_pose(2))
    assert await client.turn(second)
    client.stream.in_step = fail
    assert not await client.turn(second) and client.session.num_dropped == 3
    client.stream.in_step = lambda: None
    third = client.waiting(make_pose(3))
    assert await client.turn(third) and not await client.turn(third)
    assert (await client.frame()).header.dropped == 3


@on_loop
async def test_an_error_of_ours_keeps_its_words(client: Client) -> None:
    def step(pose: np.ndarray | None) -> np.ndarray:
        raise PoseError("a bad pose", "a better one")

    client.stream.step = step  # type: ignore[method-assign]
    await client.render(make_pose())
    assert await client.text() == {"type": "error", "message": "a bad pose", "hint": "a better one"}
    assert client.faults.num_in_a_row == 0


def test_a_step_that_fails_each_time_is_logged_once_in_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        client = Client()
        client.session.configure(Configure(fit="canvas"))
        for _ in range(30):
            await client.render(make_pose(-1000))
        session_module.time.sleep(10.0)
        await client.render(make_pose(-1000))

    asyncio.run(check())
    assert [record.getMessage() for record in caplog.records] == [
        f"the step failed: RuntimeError; failures in a row: {number}" for number in (1, 31)]  # fmt: skip
    assert caplog.text.count("RuntimeError: a step that fails") == 2


def test_memory_that_runs_out_is_told_in_general_words_and_logged_in_full(caplog: pytest.LogCaptureFixture) -> None:
    def step(pose: np.ndarray | None) -> np.ndarray:
        raise OutOfMemory("memory ran out: process 4711 has 80 GiB", "open the stream with fewer steps")

    async def check() -> None:
        client = Client()
        client.stream.step = step  # type: ignore[method-assign]
        await client.render(make_pose())
        said = {"message": "the step failed: OutOfMemory", "hint": "the server's log says more"}
        assert await client.text() == {"type": "error", **said} and client.faults.num_in_a_row == 1

    asyncio.run(check())
    assert "process 4711 has 80 GiB" in caplog.text


@on_loop
async def test_only_a_frame_that_is_computed_ends_a_row_of_failures(client: Client) -> None:
    await client.render(make_pose())
    client.faults.num_in_a_row = 3
    await client.render(make_pose())  # a repeat, for which the engine does nothing
    assert client.faults.num_in_a_row == 3
    await client.render(make_pose(1))
    assert client.faults.num_in_a_row == 0


@on_loop
async def test_a_closed_session_renders_nothing(client: Client) -> None:
    client.session.is_closed = True
    await client.render(make_pose())
    assert not client.avatar.steps


@on_loop
async def test_reset_comes_before_the_next_frame(client: Client) -> None:
    await client.render(make_pose())
    client.session.reset()
    assert client.avatar.num_resets == 0
    await client.render(make_pose())
    assert client.avatar.num_resets == 1 and (await client.frame()).header.flags == 0


@on_loop
async def test_a_reset_does_not_begin_anew_with_a_pose_from_before_it(client: Client) -> None:
    late = client.waiting(make_pose())
    client.session.reset()
    assert not await client.turn(late)
    assert client.session.num_dropped == 1 and not client.avatar.steps and client.avatar.num_resets == 0
    await client.render(make_pose(1))
    assert client.avatar.num_resets == 1 and len(client.avatar.steps) == 1 and client.session.num_dropped == 1


@pipelined
async def test_a_pose_is_counted_once_however_many_turns_its_frame_takes(client: Client) -> None:
    waiting = client.waiting(make_pose())
    assert [await client.turn(waiting), await client.turn(waiting)] == [True, False]
    assert np.array_equal((await client.frame()).frame, client.session.latest)
    for name in ("posecrafter_wait_seconds_count", "posecrafter_render_seconds_count"):
        assert client.count(name) == 1
    assert client.count("posecrafter_frames_total", kind="rendered") == 1


@pipelined
async def test_a_pose_whose_frame_comes_is_not_overtaken_by_the_next(client: Client) -> None:
    service = Service(client.avatar, ServeOptions())  # its thread does not run
    first = client.waiting(make_pose())
    assert await client.turn(first)
    service._scheduler._mailbox.put_if_free(client.session, first)
    service.offer(client.session, client.waiting(make_pose(1)))
    assert client.session.num_dropped == 0
    service.offer(client.session, client.waiting(make_pose(2)))
    assert client.session.num_dropped == 1


@pipelined
async def test_a_reset_during_a_step_does_not_lose_its_frame(client: Client) -> None:
    client.session.configure(Configure(fit="canvas"))
    waiting = client.waiting(make_pose())
    client.stream.in_step = client.session.reset
    assert await client.turn(waiting)
    client.stream.in_step = lambda: None
    assert not await client.turn(waiting) and client.avatar.num_resets == 0
    assert np.array_equal((await client.frame()).frame, draw_pose(make_pose(), SIZE))
    await client.render(make_pose(1))
    assert client.avatar.num_resets == 1 and client.session.num_dropped == 0


@pipelined
async def test_what_is_on_its_way_when_a_pose_begins_anew_is_dropped(client: Client) -> None:
    await client.render(make_pose())
    client.session.reset()
    next_pose = client.waiting(make_pose(1))
    assert await client.turn(next_pose) and client.session.num_dropped == 1
    assert not await client.turn(next_pose) and (await client.frame()).header.dropped == 1


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_last_poses_of_a_pipelined_stream_come_out_and_then_it_rests(steps: int) -> None:
    async def check() -> None:
        client = Client(partial(LateStream, steps=steps))
        client.session.configure(Configure(fit="canvas"))
        poses = [client.waiting(make_pose(shift)) for shift in range(3)]
        shown = []
        for waiting in (*poses, *[poses[-1]] * (steps - 1)):
            is_more = await client.turn(waiting)
            with suppress(asyncio.TimeoutError):
                shown.append(await asyncio.wait_for(client.session.frames.take(), 0.01))
        assert not is_more and client.session.num_dropped == 0
        assert np.array_equal([each.frame for each in shown], [draw_pose(make_pose(shift), SIZE) for shift in range(3)])

    asyncio.run(check())


def test_a_client_who_sends_no_more_takes_no_more_turns_than_its_last_frame_needs() -> None:
    async def check() -> None:
        client = Client(partial(LateStream, steps=4))
        scheduler: Scheduler[Session, Waiting] = Scheduler(lambda session, waiting: session.render(waiting))
        scheduler.start()
        for num_steps in (4, 8):
            scheduler.put(client.session, client.waiting(make_pose(num_steps)))
            await client.frame()
            for _ in range(2):  # a turn that were still wanted would come between two jobs
                await asyncio.wrap_future(scheduler.call(lambda: None))
            assert len(client.avatar.steps) == num_steps
        await asyncio.to_thread(scheduler.stop)

    asyncio.run(check())


@pipelined
async def test_a_pose_that_is_given_again_counts_once_for_the_person(client: Client) -> None:
    waiting, counts = client.waiting(make_pose()), []
    for _ in range(2):
        await client.turn(waiting)
        counts.append(len(client.session._person._samples))
    assert counts == [1, 1]


class LosingStream(LateStream):
    """Of three steps; goes on in float32 in the step for which `is_losing` is set."""

    is_losing = False

    def __init__(self, owner: DrawnAvatar) -> None:
        super().__init__(owner, steps=3)

    def step(self, pose: np.ndarray | None) -> np.ndarray:
        if self.is_losing:
            self.pending.clear()
        frame = super().step(pose)
        self.last.lost, self.is_losing = self.is_losing, False
        return frame


@pytest.mark.parametrize("lost_at", [2, 3])
def test_frames_that_a_stream_has_lost_are_not_shown(lost_at: int) -> None:
    """But that of the newest pose is, whether the stream lost it or never had it before."""

    async def check() -> None:
        client = Client(LosingStream)
        client.session.configure(Configure(fit="canvas"))
        poses = [client.waiting(make_pose(shift)) for shift in range(3)]
        turns, is_more = [*poses, *[poses[-1]] * 10], True
        for number, waiting in enumerate(turns):
            client.stream.is_losing = number == lost_at
            is_more = await client.turn(waiting)
            if number >= lost_at and not is_more:
                break
        await asyncio.sleep(0)
        assert not is_more and client.session.num_dropped == 2
        assert np.array_equal((await client.frame()).frame, draw_pose(make_pose(2), SIZE))

    asyncio.run(check())


def service_turn(client: Client, device: str, shift: float = 0.0) -> asyncio.Future[bool]:
    """A turn of a service whose engine is for a device; it must end."""
    client.avatar.folder.manifest["device"]["type"] = device
    service = Service(client.avatar, ServeOptions())  # its thread does not run
    turn = asyncio.to_thread(service._turn, client.session, client.waiting(make_pose(shift)))
    return asyncio.ensure_future(asyncio.wait_for(turn, 100))


# In a process of its own, which a signal may end: it interrupts itself in the first step, and prints what was said.
INTERRUPTED = """
import json, signal, threading
from posecrafter_rt.serve import service
from posecrafter_rt.serve.options import ServeOptions
from tests.serve.drawn import DrawnAvatar

said, is_said = [], threading.Event()
service._log.warning = lambda text: (said.append(text), is_said.set())

class Interrupted(DrawnAvatar):
    def stream(self, **options):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        is_said.wait(60)
        return super().stream(**options)

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where this is started
served = service.Service(Interrupted(), ServeOptions())
try:
    served.start()
except KeyboardInterrupt:
    print(json.dumps([said, served.is_running]))
"""


def test_an_interruption_of_the_first_step_says_that_the_server_ends_after_it() -> None:
    said, is_running = run_script(INTERRUPTED)
    assert said == ["interrupted; the server ends after its first step"] and not is_running


@pytest.fixture
def waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "LEAVING_SHARE", 1e9)


def test_on_a_cpu_the_next_turn_waits_until_a_frame_is_sent(waits_for_long: None) -> None:
    async def check() -> None:
        client = Client()
        turn = service_turn(client, "cpu")
        with client.session.sending(await client.frame()):
            await asyncio.sleep(0.05)
            assert not turn.done()
        assert not await turn
        client.session.is_closed = True  # then there is no frame to wait for
        assert not await service_turn(client, "cpu", 1)

    asyncio.run(check())


def test_on_a_gpu_it_does_not(waits_for_long: None) -> None:
    async def check() -> None:
        assert not await service_turn(Client(), "cuda")

    asyncio.run(check())


def test_a_frame_on_a_slow_line_is_not_taken_for_the_one_after_it(waits_for_long: None) -> None:
    async def check() -> None:
        client = Client()
        await client.render(make_pose())
        with client.session.sending(await client.frame()):
            turn = service_turn(client, "cpu", 1)
            newer = await client.frame()
        await asyncio.sleep(0.05)
        assert not turn.done()
        with client.session.sending(newer):
            pass
        assert not await turn

    asyncio.run(check())


@on_loop
async def test_a_frame_that_nobody_sends_holds_up_the_next_turn_for_a_short_while(client: Client) -> None:
    assert not await service_turn(client, "cpu")
    await client.frame()


@on_loop
async def test_counts_from_two_threads_are_all_kept(client: Client) -> None:
    class Interrupted(int):
        """A count that another thread takes up while it is being raised, if that is let."""

        def __add__(self, other: int) -> int:
            if loop_counts.ident is None:
                loop_counts.start()
                loop_counts.join(timeout=0.3)
            return int(self) + other

    loop_counts = threading.Thread(target=client.session.count_stale)
    client.session.num_dropped = Interrupted(0)
    client.session.count_overtaken()
    loop_counts.join()
    assert client.session.num_dropped == 2


@on_loop
async def test_a_frame_that_nobody_takes_is_overtaken(client: Client) -> None:
    for shift in range(4):
        await client.render(make_pose(shift))
    await asyncio.sleep(0)
    assert client.session.num_dropped == client.count("posecrafter_poses_dropped_total", reason="overtaken") == 3
    assert np.array_equal((await client.frame()).frame, client.session.latest)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(client.session.frames.take(), 0.1)


@on_loop
async def test_counts_and_wishes(client: Client) -> None:
    session, client.avatar.seconds = client.session, 0.01
    session.count_overtaken()
    session.count_limited()
    session.configure(Configure(format=RGB))
    session.configure(Configure(quality=40))
    assert (session.format, session.quality, session.num_dropped) == (RGB, 40, 2)
    for shift in range(5):
        await client.render(make_pose(shift))
        with session.sending(await client.frame()):
            pass
    stats = session.stats(0.5, 1)
    assert stats["fps"] == 8 and stats["dropped"] == 2 and stats["render_ms_p50"] == stats["render_ms_p95"] == 10
    assert session.stats(1.0, 5)["fps"] == 0


@on_loop
async def test_a_line_of_messages_is_bounded(client: Client) -> None:
    for number in range(100):
        client.session.texts.put({"number": number})
    await asyncio.sleep(0)
    assert [(await client.text())["number"] for _ in range(32)] == list(range(68, 100))
