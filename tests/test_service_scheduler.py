"""The scheduler on real threads and a real event loop with devices that tests hold by events, and device errors at every point."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import DeadlineExceeded, DetectorError, Draining, InferenceFailed, NotReady, QueueFull, WouldMissDeadline
from service.scheduler import Answer, DeviceLost, DeviceOutOfMemory, Observer, Scheduler

COSTS = {1: 0.001, 2: 0.0012, 4: 0.0016, 8: 0.0024}
PATIENCE_S = 30.0


class Recorder(Observer):
    """Remembers every event."""

    def __init__(self) -> None:
        self.formed: list[tuple[Any, int, Sequence[float]]] = []
        self.ran: list[tuple[Any, int]] = []
        self.failed: list[int] = []
        self.memory: list[tuple[int, int]] = []
        self.left: Counter[str] = Counter()

    def batch_formed(self, lane: Any, size: int, queue_s: Sequence[float]) -> None:
        self.formed.append((lane, size, queue_s))

    def batch_ran(self, lane: Any, size: int, seconds: float) -> None:
        self.ran.append((lane, size))

    def batch_failed(self, lane: Any, size: int, error: Exception) -> None:
        self.failed.append(size)

    def out_of_memory(self, lane: Any, size: int, limit: int) -> None:
        self.memory.append((size, limit))

    def cancelled(self, phase: str) -> None:
        self.left[phase] += 1


class HeldDevice:
    """Doubles numbers, but only when the test lets it; says when a batch has begun."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[list[Any]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.permits = threading.Semaphore(0)
        self.devices: list[int] = []

    def run(self, device: int, items: Sequence[Any]) -> list[Any]:
        self.devices.append(device)
        self.loop.call_soon_threadsafe(self.begun.put_nowait, list(items))
        assert self.permits.acquire(timeout=PATIENCE_S)
        return [2 * item for item in items]

    def let(self, batches: int = 1) -> None:
        self.permits.release(batches)


def double(_device: int, items: Sequence[Any]) -> list[Any]:
    return [2 * item for item in items]


def scheduled(test: Callable[[Scheduler, Recorder], Awaitable[None]], **options: Any) -> Recorder:
    """Run a test coroutine with a started scheduler, and stop it afterwards whatever happened."""
    recorder = Recorder()

    async def main() -> None:
        scheduler = Scheduler(**({"max_queue_images": 64, "max_queue_bytes": 1 << 20, "observer": recorder} | options))
        scheduler.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await test(scheduler, recorder)
        finally:
            assert await scheduler.close(grace_s=PATIENCE_S)

    asyncio.run(main())
    return recorder


async def outcomes(futures: Sequence[asyncio.Future[Answer]]) -> list[Any]:
    """Results, or the classes of the errors."""
    ended = await asyncio.gather(*futures, return_exceptions=True)
    return [type(end) if isinstance(end, BaseException) else end.result for end in ended]


def test_what_arrives_while_the_device_runs_forms_the_next_batch() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=8)
        first = scheduler.submit("a", 1)
        assert await device.begun.get() == [1]
        rest = [scheduler.submit("a", item) for item in range(2, 12)]
        assert scheduler.snapshot().waiting_images == 10
        device.let(3)
        assert await outcomes([first, *rest]) == [2 * item for item in range(1, 12)]
        assert [size for _, size, _ in recorder.formed] == [1, 8, 2]
        answer = await first
        assert answer.batch_size == 1
        assert answer.run_s > 0
        assert all(len(queue_s) == size for _, size, queue_s in recorder.formed)

    scheduled(test)


def test_answers_of_a_batch_take_one_call_of_the_event_loop() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=8)
        first = scheduler.submit("a", 0)
        await device.begun.get()
        futures = [scheduler.submit("a", item) for item in range(8)]
        device.let()
        await first
        loop, posted = asyncio.get_running_loop(), []
        direct = loop.call_soon_threadsafe

        def counted(callback: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
            posted.append(callback)
            return direct(callback, *args, **keywords)

        await device.begun.get()
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        device.let()
        await asyncio.gather(*futures)
        assert len(posted) == 1

    scheduled(test)


def test_several_devices_share_one_queue() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=8)
        futures = []
        for item in range(3):
            futures.append(scheduler.submit("a", item))
            assert await device.begun.get() == [item], "each free device takes at once what is there"
        assert sorted(device.devices) == [0, 1, 2]
        futures += [scheduler.submit("a", item) for item in range(3, 6)]
        device.let(4)
        assert await outcomes(futures) == [0, 2, 4, 6, 8, 10]

    scheduled(test, devices=3)


def test_a_full_queue_refuses_and_takes_again_when_drained() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=8)
        futures = [scheduler.submit("a", 0)]
        await device.begun.get()
        futures += [scheduler.submit("a", item) for item in range(4)]
        with pytest.raises(QueueFull) as caught:
            scheduler.submit("a", 9)
        assert caught.value.retry_after_s == pytest.approx(COSTS[4])
        device.let(2)
        await asyncio.gather(*futures)
        device.let()
        assert (await scheduler.submit("a", 9)).result == 18

    scheduled(test, max_queue_images=4)


def test_cancelled_while_queued_or_running_is_counted_and_spares_neighbours() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=8)
        running = scheduler.submit("a", 1)
        await device.begun.get()
        queued = [scheduler.submit("a", item) for item in (2, 3, 4)]
        running.cancel()
        queued[1].cancel()
        await asyncio.sleep(0)
        assert recorder.left == {"running": 1, "queued": 1}
        assert scheduler.snapshot().waiting_images == 2
        device.let()
        assert await device.begun.get() == [2, 4]
        device.let()
        assert await outcomes([queued[0], queued[2]]) == [4, 8]
        done = scheduler.submit("a", 5)
        device.let()
        await done
        done.cancel()
        await asyncio.sleep(0)
        assert recorder.left == {"running": 1, "queued": 1}

    scheduled(test)


def test_deadline_is_told_on_time_though_the_device_hangs() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=8)
        soon = time.monotonic() + 0.05
        running = scheduler.submit("a", 1, deadline=soon)
        await device.begun.get()
        waiting = scheduler.submit("a", 2, deadline=soon)
        patient = scheduler.submit("a", 3, deadline=soon + PATIENCE_S)
        assert await outcomes([running, waiting]) == [DeadlineExceeded, DeadlineExceeded]
        assert scheduler.snapshot().running_images == 1
        device.let(2)
        assert (await patient).result == 6

    recorder = scheduled(test)
    assert not recorder.left


def test_each_of_several_deadlines_is_told_in_its_turn() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=8)
        held = scheduler.submit("a", 1)
        await device.begun.get()
        soon = time.monotonic() + 0.03
        waiting = [scheduler.submit("a", item, deadline=soon + 0.02 * item) for item in (2, 0, 1)]
        assert await outcomes(waiting) == [DeadlineExceeded] * 3
        device.let()
        await held

    scheduled(test)


def test_deadline_is_checked_on_entry_against_the_estimate() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs={1: 100.0}, max_batch_size=1)
        first = scheduler.submit("a", 1)
        await device.begun.get()
        with pytest.raises(WouldMissDeadline) as caught:
            scheduler.submit("a", 2, deadline=time.monotonic() + 50)
        assert caught.value.retry_after_s == pytest.approx(150, abs=5)
        assert scheduler.estimate_s("a") == pytest.approx(200, abs=5)
        device.let()
        await first

    scheduled(test)


def test_deadline_is_checked_when_taken_and_before_the_answer() -> None:
    """With a clock that the test sets, so that the loop's timer does not interfere."""
    clock = [0.0]

    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=1)
        running = scheduler.submit("a", 1, deadline=60.0)
        await device.begun.get()
        waiting = scheduler.submit("a", 2, deadline=60.0)
        clock[0] = 61.0
        device.let()
        with pytest.raises(DeadlineExceeded, match="while it ran"):
            await running
        with pytest.raises(DeadlineExceeded, match="before a device was free"):
            await waiting

    assert len(scheduled(test, clock=lambda: clock[0]).ran) == 1


@pytest.mark.parametrize("guilty", [0, 3, 6])
def test_a_failing_batch_is_split_until_only_the_guilty_image_fails(guilty: int) -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        gate = HeldDevice()

        def run(device: int, items: Sequence[int]) -> list[int]:
            if items[0] == -1:
                return gate.run(device, items)
            if guilty in items:
                raise ValueError("bad pixels")
            return double(device, items)

        scheduler.add_lane("a", run, costs=COSTS, max_batch_size=8)
        held = scheduler.submit("a", -1)
        await gate.begun.get()
        futures = [scheduler.submit("a", item) for item in range(7)]
        gate.let()
        await held
        assert await outcomes(futures) == [InferenceFailed if item == guilty else 2 * item for item in range(7)]
        with pytest.raises(InferenceFailed) as caught:
            await futures[guilty]
        assert isinstance(caught.value.__cause__, ValueError)
        half = 4 if guilty < 4 else 3
        assert recorder.failed == [7, half, 1]

    scheduled(test)


def test_a_client_that_left_is_not_run_again_when_its_batch_is_split() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        gate = HeldDevice()
        calls: list[list[int]] = []

        def run(device: int, items: Sequence[int]) -> list[int]:
            calls.append(list(items))
            gate.run(device, items)
            if len(items) > 2:
                raise ValueError("bad pixels")
            return double(device, items)

        scheduler.add_lane("a", run, costs=COSTS, max_batch_size=8)
        held = scheduler.submit("a", -1)
        await gate.begun.get()
        futures = [scheduler.submit("a", item) for item in range(4)]
        gate.let()
        await held
        await gate.begun.get()
        futures[1].cancel()
        await asyncio.sleep(0)
        gate.let(3)
        assert await outcomes([futures[0], *futures[2:]]) == [0, 4, 6]
        assert calls == [[-1], [0, 1, 2, 3], [0], [2, 3]]
        assert recorder.left == {"running": 1}

    scheduled(test)


def test_a_wrong_number_of_results_is_a_failure() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        scheduler.add_lane("a", lambda _device, items: [*items, 0], costs=COSTS, max_batch_size=8)
        with pytest.raises(InferenceFailed):
            await scheduler.submit("a", 1)

    scheduled(test)


def test_out_of_memory_halves_the_batch_for_the_time_being() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        gate = HeldDevice()

        def run(device: int, items: Sequence[int]) -> list[int]:
            if items[0] == -1:
                return gate.run(device, items)
            if len(items) > 4:
                raise DeviceOutOfMemory("8 images of 800 x 1333")
            return double(device, items)

        scheduler.add_lane("a", run, costs=COSTS, max_batch_size=8)
        held = scheduler.submit("a", -1)
        await gate.begun.get()
        futures = [scheduler.submit("a", item) for item in range(16)]
        gate.let()
        await held
        assert await outcomes(futures) == [2 * item for item in range(16)]
        assert recorder.memory == [(8, 4)]
        assert [size for _, size in recorder.ran] == [1, 4, 4, 4, 4]

    scheduled(test)


def test_a_lost_device_answers_everyone_and_tells_the_app() -> None:
    told: asyncio.Queue[tuple[int, str, int]] = asyncio.Queue()

    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        gate = HeldDevice()

        def run(device: int, items: Sequence[int]) -> list[int]:
            gate.run(device, items)
            raise DeviceLost("the card fell off the bus")

        scheduler.add_lane("a", run, costs=COSTS, max_batch_size=2)
        futures = [scheduler.submit("a", 0)]
        await gate.begun.get()
        futures += [scheduler.submit("a", item) for item in range(5)]
        gate.let()
        assert await outcomes(futures) == [NotReady] * 6
        assert await told.get() == (0, "the card fell off the bus", 0)
        assert told.empty()
        with pytest.raises(NotReady, match="device of this replica is lost"):
            scheduler.submit("a", 1)
        await scheduler.drain()

    scheduled(test, on_device_lost=lambda *lost: told.put_nowait((lost[0], str(lost[1]), lost[2])))


def test_the_other_devices_go_on_without_a_lost_one() -> None:
    told: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        gates = [HeldDevice(), HeldDevice()]

        def run(device: int, items: Sequence[int]) -> list[int]:
            answers = gates[device].run(device, items)
            if device == victim:
                raise DeviceLost("the card fell off the bus")
            return answers

        victim = -1
        scheduler.add_lane("a", run, costs=COSTS, max_batch_size=2)
        assert scheduler.devices == 2
        begun = [asyncio.ensure_future(gate.begun.get()) for gate in gates]
        first = scheduler.submit("a", 1)
        await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
        second = scheduler.submit("a", 2)  # for the other device: the first is held
        await asyncio.wait(begun)
        waiting = [scheduler.submit("a", item) for item in range(3, 8)]
        victim = 0
        gates[0].let()
        assert (await told.get()) == (0, 1)
        gates[1].let(8)
        assert await outcomes([first, second]) in ([NotReady, 4], [2, NotReady])  # whichever the lost device held
        assert await outcomes(waiting) == [2 * item for item in range(3, 8)]
        assert scheduler.devices == 1
        assert (await scheduler.submit("a", 9)).result == 18
        await scheduler.remove_lanes(["a"])  # the lost device holds nothing any more
        assert scheduler.snapshot().depths == {}

    scheduled(test, devices=2, on_device_lost=lambda device, error, left: told.put_nowait((device, left)))


def test_an_observer_that_fails_stops_nothing() -> None:
    class Broken(Observer):
        def batch_formed(self, lane: Any, size: int, queue_s: Sequence[float]) -> None:
            raise OSError("no space left on device")

    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        scheduler.add_lane("a", double, costs=COSTS, max_batch_size=8)
        assert (await scheduler.submit("a", 4)).result == 8

    scheduled(test, observer=Broken())


def test_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=2)
        futures = [scheduler.submit("a", item) for item in range(5)]
        draining = asyncio.create_task(scheduler.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            scheduler.submit("a", 9)
        assert not draining.done()
        device.let(5)
        await draining
        assert all(future.done() for future in futures)
        assert await outcomes(futures) == [0, 2, 4, 6, 8]

    scheduled(test)


def test_drain_ends_when_the_last_waiting_client_leaves() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=2)
        running = scheduler.submit("a", 1)
        await device.begun.get()
        waiting = scheduler.submit("a", 2)
        draining = asyncio.create_task(scheduler.drain())
        device.let()
        await running
        waiting.cancel()
        device.let()  # whichever came first, the device or the cancellation
        await draining

    scheduled(test)


def test_a_lane_whose_last_client_left_is_removed_though_the_device_is_busy() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=2)
        scheduler.add_lane("b", device.run, costs=COSTS, max_batch_size=2)
        running = scheduler.submit("a", 1)
        await device.begun.get()
        waiting = scheduler.submit("b", 2)
        removing = asyncio.create_task(scheduler.remove_lanes(["b"]))
        await asyncio.sleep(0)
        waiting.cancel()
        await removing
        assert not running.done()
        assert not scheduler._conditions
        device.let()
        await running

    scheduled(test)


def test_a_client_that_leaves_after_the_result_was_posted_is_not_counted() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=2)
        future = scheduler.submit("a", 1)
        await device.begun.get()
        device.let()
        while scheduler.snapshot().running_images:  # the event loop stands still meanwhile, so nothing is delivered
            time.sleep(0.001)  # noqa: ASYNC251
        future.cancel()
        await asyncio.sleep(0)
        assert not recorder.left

    scheduled(test)


def test_close_refuses_what_waits_and_lets_the_running_batch_finish() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=2)
        running = scheduler.submit("a", 1)
        await device.begun.get()
        waiting = scheduler.submit("a", 2)
        closing = asyncio.create_task(scheduler.close(grace_s=PATIENCE_S))
        assert await outcomes([waiting]) == [Draining]
        device.let()
        assert (await running).result == 2
        assert await closing

    scheduled(test)


def test_close_leaves_a_hung_device_behind() -> None:
    async def main() -> None:
        scheduler = Scheduler(max_queue_images=4, max_queue_bytes=100)
        scheduler.start()
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=2)
        running = scheduler.submit("a", 1)
        await device.begun.get()
        assert scheduler.snapshot().longest_run_s > 0
        assert not await scheduler.close(grace_s=0.01)
        device.let()
        await running

    asyncio.run(main())


def test_a_removed_lane_finishes_on_its_own_runtime_beside_the_new_one() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        scheduler.add_lane(("m", 1), device.run, costs=COSTS, max_batch_size=2, group="m")
        old = [scheduler.submit(("m", 1), item) for item in range(3)]
        await device.begun.get()
        scheduler.add_lane(("m", 2), lambda _device, items: [-item for item in items], costs=COSTS, max_batch_size=2, group="m")
        removing = asyncio.create_task(scheduler.remove_lanes([("m", 1)]))
        await asyncio.sleep(0)
        with pytest.raises(NotReady, match="no longer loaded"):
            scheduler.submit(("m", 1), 9)
        new = scheduler.submit(("m", 2), 7)
        assert not removing.done()
        device.let(3)
        assert await outcomes([*old, new]) == [0, 2, 4, -7]
        await removing
        scheduler.add_lane(("m", 1), double, costs=COSTS, max_batch_size=2, group="m")
        assert (await scheduler.submit(("m", 1), 4)).result == 8

    scheduled(test)


def test_nothing_is_accepted_before_start() -> None:
    scheduler = Scheduler(max_queue_images=4, max_queue_bytes=100)
    scheduler.add_lane("a", double, costs=COSTS, max_batch_size=2)
    with pytest.raises(NotReady, match="not started"):
        scheduler.submit("a", 1)


def test_answers_after_the_event_loop_closed_do_not_kill_the_thread() -> None:
    async def main() -> tuple[Scheduler, HeldDevice]:
        scheduler = Scheduler(max_queue_images=4, max_queue_bytes=100)
        scheduler.start()
        device = HeldDevice()
        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=2)
        scheduler.submit("a", 1)
        await device.begun.get()
        return scheduler, device

    scheduler, device = asyncio.run(main())
    device.let()
    with scheduler._lock:
        scheduler._stopped = True
        scheduler._work.notify_all()
    scheduler._threads[0].join(PATIENCE_S)
    assert not scheduler._threads[0].is_alive()


class ScriptedDevice:
    """Fails as the script says, one word a call, and always on poisoned items; afterwards it is well."""

    def __init__(self, script: Sequence[str], poisoned: set[int]) -> None:
        self.script = list(script)
        self.poisoned = poisoned
        self.lock = threading.Lock()
        self.answered: Counter[int] = Counter()

    def run(self, _device: int, items: Sequence[int]) -> list[int]:
        with self.lock:
            word = self.script.pop(0) if self.script else "ok"
        if word == "lost":
            raise DeviceLost("gone")
        if word == "memory":
            raise DeviceOutOfMemory("full")
        if word == "error" or self.poisoned.intersection(items):
            raise ValueError("bad")
        with self.lock:
            self.answered.update(items)
        return [2 * item for item in items]


@settings(max_examples=150, deadline=None)
@given(
    script=st.lists(st.sampled_from(["ok", "error", "memory", "lost"]), max_size=12),
    poisoned=st.sets(st.integers(0, 19), max_size=3),
    lanes=st.lists(st.sampled_from("abc"), min_size=1, max_size=20),
    cancel=st.sets(st.integers(0, 19), max_size=5),
    cancel_after=st.integers(0, 4),
    devices=st.integers(1, 3),
)
def test_device_errors_and_cancellations_at_any_point_lose_and_repeat_nothing(
    script: list[str], poisoned: set[int], lanes: list[str], cancel: set[int], cancel_after: int, devices: int
) -> None:
    device = ScriptedDevice(script, poisoned)

    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        for lane in "abc":
            scheduler.add_lane(lane, device.run, costs=COSTS, max_batch_size=8, group="one" if lane == "c" else "two")
        futures: dict[int, asyncio.Future[Answer]] = {}
        settled: Counter[int] = Counter()
        for item, lane in enumerate(lanes):
            try:
                futures[item] = scheduler.submit(lane, item)
            except DetectorError as error:  # a device was lost already
                assert isinstance(error, NotReady)  # noqa: PT017
                continue
            futures[item].add_done_callback(lambda _future, item=item: settled.update([item]))
        for _ in range(cancel_after):
            await asyncio.sleep(0)
        for item in cancel.intersection(futures):
            futures[item].cancel()
        ended = dict(zip(futures, await asyncio.gather(*futures.values(), return_exceptions=True), strict=True))
        await scheduler.drain()
        for item, end in ended.items():
            if isinstance(end, Answer):
                assert end.result == 2 * item
                assert item not in poisoned
            elif isinstance(end, asyncio.CancelledError):
                assert item in cancel
            elif isinstance(end, NotReady):
                assert "lost" in script
            else:
                assert isinstance(end, InferenceFailed)
                assert item in poisoned or "error" in script or "memory" in script
        await asyncio.sleep(0)
        assert settled == Counter(list(futures)), "each accepted item ends exactly once"
        assert all(count == 1 for count in device.answered.values()), "no item runs again once it was answered"
        assert sum(recorder.left.values()) <= len(cancel)

    scheduled(test, devices=devices)


def test_the_next_batch_is_assembled_before_the_last_one_is_answered() -> None:
    """And answered before it runs: who asked must not wait for a neighbour's batch."""

    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        steps: list[Any] = []
        direct = scheduler._loop.call_soon_threadsafe

        def noted(callback: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
            if callback == scheduler._settle:
                steps.append(("answered", [outcome.result for _, outcome in args[0]]))
            return direct(callback, *args, **keywords)

        def assemble(_device: int, items: Sequence[Any]) -> list[Any]:
            steps.append(("assembled", list(items)))
            return [item + 100 for item in items]

        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=1, assemble=assemble)
        scheduler._loop.call_soon_threadsafe = noted
        futures = [scheduler.submit("a", item) for item in (1, 2)]
        assert await device.begun.get() == [101]
        device.let()
        assert await device.begun.get() == [102]
        assert (await futures[0]).result == 202  # while the second one runs
        device.let()
        assert await outcomes(futures) == [202, 204]
        assert steps == [("assembled", [1]), ("assembled", [2]), ("answered", [202]), ("answered", [204])]

    scheduled(test)


@pytest.mark.parametrize("fault", [ValueError("bad"), DeviceLost("gone")])
def test_a_fault_while_assembling_loses_no_answer_of_the_batch_before(fault: Exception) -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()

        def assemble(_device: int, items: Sequence[Any]) -> list[Any]:
            if 2 in items:
                raise fault
            return list(items)

        scheduler.add_lane("a", device.run, costs=COSTS, max_batch_size=1, assemble=assemble)
        futures = [scheduler.submit("a", item) for item in (1, 2)]
        assert await device.begun.get() == [1]
        device.let()
        expected = NotReady if isinstance(fault, DeviceLost) else InferenceFailed
        assert await outcomes(futures) == [2, expected]

    scheduled(test)


def test_an_image_that_cannot_be_assembled_spares_its_neighbours() -> None:
    async def test(scheduler: Scheduler, recorder: Recorder) -> None:
        device = HeldDevice()
        device.let(20)

        def assemble(_device: int, items: Sequence[Any]) -> list[Any]:
            if 3 in items:
                raise ValueError("bad")
            return list(items)

        held = threading.Event()
        scheduler.add_lane(
            "a", lambda _device, items: held.wait(PATIENCE_S) and device.run(0, items), costs=COSTS, max_batch_size=8, assemble=assemble
        )
        futures = [scheduler.submit("a", item) for item in range(6)]
        held.set()
        assert await outcomes(futures) == [0, 2, 4, InferenceFailed, 8, 10]

    scheduled(test)
