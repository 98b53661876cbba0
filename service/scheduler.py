"""Many requests, few devices: images wait in one bounded queue and whichever device is free takes the best batch at once.

Nothing here knows HTTP, images or ONNX: an item is whatever the lane's `run` callable takes. Used from one event loop:

    scheduler = Scheduler(devices=1, max_queue_images=128, max_queue_bytes=256 << 20)
    scheduler.start()
    scheduler.add_lane(key, run, costs={1: 0.012, 8: 0.05}, max_batch_size=16, group="blood-cells")
    answer = await scheduler.submit(key, item, nbytes=item.nbytes, deadline=time.monotonic() + 2.0)

To give an answer up, cancel the future: a waiting image is taken out of the queue, the result of a running one is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from service.batch_costs import BatchCosts
from service.batch_queue import Batch, BatchQueue, LaneKey, Phase, Priority, Snapshot
from service.batch_runner import Answer, Assemble, BatchRunner, Observer, Outcome, Run
from service.conditions import Conditions
from service.device_calls import Call, DeviceCalls, Place, T
from service.device_errors import DeviceLost, DeviceOutOfMemory
from service.errors import DetectorError
from service.refusals import batch_lost, device_lost, draining, not_started, too_late
from service.tickets import DeadlineTimer, Expected, Ticket, refuse

__all__ = [
    "Answer",
    "Assemble",
    "DeviceLost",
    "DeviceOutOfMemory",
    "LaneKey",
    "Observer",
    "Phase",
    "Priority",
    "Run",
    "Scheduler",
    "Snapshot",
    "Ticket",
]

log = logging.getLogger(__name__)


OnDeviceLost = Callable[[int, BaseException, int], None]
"""(device index, what it died of, how many devices are left)."""


class Scheduler:
    """One queue, one thread a device. `start`, `submit` and the coroutines belong to one event loop's thread."""

    def __init__(
        self,
        *,
        devices: int = 1,
        max_queue_images: int,
        max_queue_bytes: int,
        low_priority_handicap_s: float = 1.0,
        observer: Observer | None = None,
        on_device_lost: OnDeviceLost | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            devices: how many threads call `run`, with 0..devices-1 as its first argument.
            max_queue_images: images that may wait; running ones do not count.
            max_queue_bytes: memory that waiting images may hold, by the `nbytes` of submit.
            low_priority_handicap_s: HIGH images that arrive up to this much later than a LOW one still go before it.
            observer: gets the events that metrics count.
            on_device_lost: called on the event loop when a device is gone for good. The others go on; after the last one nothing is served.
            clock: monotonic seconds; deadlines are on the same clock.
        """
        self._queue = BatchQueue(
            devices=devices, max_images=max_queue_images, max_bytes=max_queue_bytes, low_priority_handicap_s=low_priority_handicap_s
        )
        self._observer = observer or Observer()
        self._on_device_lost = on_device_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._runner = BatchRunner(self._queue, self._lock, self._observer, clock, self._post)
        self._calls = DeviceCalls()
        self._idle_threads = 0
        self._refusal: Callable[[], DetectorError] | None = not_started
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._serve, args=(device,), name=f"device-{device}", daemon=True) for device in range(devices)
        ]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer = DeadlineTimer(clock, self._expire)
        self._expected = Expected()
        self._conditions = Conditions(self._lock)

    # Life

    def start(self) -> None:
        """Start the device threads and accept images. Call on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._refusal = None
        for thread in self._threads:
            thread.start()

    def add_lane(
        self,
        key: LaneKey,
        run: Run,
        *,
        costs: Mapping[int, float],
        max_batch_size: int,
        group: Hashable | None = None,
        assemble: Assemble | None = None,
        known_good: Any = None,
    ) -> None:
        """Open a lane, also while others are served.

        Args:
            key: what submit names; a new version of a model needs new keys.
            run: computes a batch of this lane.
            costs: batch size -> seconds from the warm-up, at least one size.
            max_batch_size: no batch is larger.
            group: lanes of one group are served oldest first; groups get equal device time. Name the served model, and let a
                shadow share its model's group with Priority.LOW. Default: the key itself.
            assemble: makes of the items what `run` takes, before the answers of the batch before are handed out: a step of its own keeps
                the device's idle time short. Default: the items themselves.
            known_good: an item that a well device can run. When many images fail in a row it tells a lost device from bad images.

        Raises:
            ValueError: the key is in use, or the costs are not usable.
        """
        with self._lock:
            self._queue.add_lane(key, key if group is None else group, BatchCosts(costs, max_batch_size), run, assemble, known_good)

    async def remove_lanes(self, keys: Iterable[LaneKey]) -> None:
        """Close lanes, wait until what was accepted into them is answered, and forget them. Their runtime may be closed then."""
        keys = list(keys)
        with self._lock:
            for key in keys:
                self._queue.close_lane(key)
        await self._conditions.until(lambda: self._stopped or all(self._queue.lane_idle(key) for key in keys))
        with self._lock:
            for key in keys:
                if self._queue.lane_idle(key):
                    self._queue.remove_lane(key)

    async def drain(self) -> None:
        """Accept nothing more (submit raises Draining) and wait until everything accepted is answered."""
        with self._lock:
            self._refusal = self._refusal or draining
        await self._conditions.until(lambda: self._stopped or self._queue.idle())

    async def close(self, *, grace_s: float = 10.0) -> bool:
        """Stop: what waits is refused with Draining, what runs may finish within `grace_s`. Returns whether every thread ended.

        A thread that hangs in its device is left behind; it does not keep the process alive.
        """
        with self._lock:
            self._refusal = self._refusal or draining
            self._stopped = True
            waiting = self._queue.clear(running=False)
            for device in range(len(self._threads)):
                self._calls.close(device, draining, running=False)
            self._work.notify_all()
        self._settle([(entry, draining()) for entry in waiting])
        self._expected.refuse(draining)
        end = time.monotonic() + grace_s
        started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            await asyncio.to_thread(thread.join, max(0.0, end - time.monotonic()))
        await asyncio.sleep(0)  # results that the threads posted last are delivered before this returns
        self._timer.cancel()
        return not any(thread.is_alive() for thread in started)

    # Work between batches

    def place(self, device: int) -> Place:
        """A device's own thread, for work that must not run beside its batches or on another thread. It waits for the batch that runs."""

        def on_device(work: Callable[[], T], /) -> T:
            with self._lock:
                if self._refusal is not None:
                    raise self._refusal()
                future = self._calls.add(device, work)
                self._work.notify_all()
            result: T = future.result()
            return result

        return on_device

    # Requests

    def submit(
        self, key: LaneKey, item: Any, *, nbytes: int = 0, deadline: float | None = None, priority: Priority = Priority.HIGH
    ) -> asyncio.Future[Answer]:
        """Let one item wait for a device, or refuse it at once.

        Args:
            key: the lane.
            item: passed to the lane's run callable.
            nbytes: memory that it holds while it waits.
            deadline: latest useful moment of the answer, on the scheduler's clock.
            priority: HIGH, or LOW for what may wait.

        Returns:
            A future with the Answer; it raises InferenceFailed, DeadlineExceeded, NotReady or Draining. Cancel it to withdraw.

        Raises:
            QueueFull, WouldMissDeadline: with retry_after_s from the measured costs of what waits.
            NotReady: the lane is unknown or closing, or the device is lost. Draining: after drain or close.
        """
        ticket = self._make_ticket(deadline)
        self.deliver(ticket, key, item, nbytes=nbytes, priority=priority)
        self._watch(ticket)
        return ticket.future

    def expect(self, deadline: float | None = None) -> Ticket:
        """Await an item that another thread makes ready and delivers.

        Returns:
            A ticket whose future behaves as the one of submit. What `deliver` raises is to be passed on with `refuse`.

        Raises:
            NotReady, Draining: as submit.
        """
        ticket = self._make_ticket(deadline)
        self._expected.add(ticket)
        self._watch(ticket)
        return ticket

    def deliver(self, ticket: Ticket, key: LaneKey, item: Any, *, nbytes: int = 0, priority: Priority = Priority.HIGH) -> None:
        """Let the ticket's item wait for a device, from any thread; nothing happens if its future is done.

        Raises:
            QueueFull, WouldMissDeadline, NotReady, Draining: as submit.
        """
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            if ticket.future.done():
                return
            entry = self._queue.admit(key, item, nbytes=nbytes, deadline=ticket.deadline, priority=priority, now=self._clock())
            entry.owner = ticket.future
            ticket.entry = entry
            if self._idle_threads:
                self._work.notify()

    def refuse(self, ticket: Ticket, error: Exception) -> None:
        """Let the ticket's future raise the error, from any thread: its item will not come."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has closed: nobody waits
            self._loop.call_soon_threadsafe(refuse, [ticket], lambda: error)

    def estimate_s(self, key: LaneKey, priority: Priority = Priority.HIGH) -> float:
        """Seconds until an item submitted now would be answered, by measured costs."""
        with self._lock:
            return self._queue.estimate_s(key, priority, self._clock())

    @property
    def devices(self) -> int:
        """How many devices are left."""
        with self._lock:
            return self._queue.devices

    def snapshot(self) -> Snapshot:
        """Depth, ages and running batches of this moment."""
        with self._lock:
            now = self._clock()
            snapshot = self._queue.snapshot(now)
            return replace(snapshot, longest_run_s=max(snapshot.longest_run_s, self._calls.longest_s(now)))

    # On the event loop

    def _make_ticket(self, deadline: float | None) -> Ticket:
        if self._refusal is not None or self._loop is None:
            raise (self._refusal or not_started)()
        return Ticket(self._loop.create_future(), deadline)

    def _watch(self, ticket: Ticket) -> None:
        ticket.future.add_done_callback(partial(self._on_done, ticket))
        if ticket.deadline is not None:
            self._timer.arm(ticket.deadline)

    def _on_done(self, ticket: Ticket, future: asyncio.Future[Answer]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            phase = self._queue.withdraw(ticket.entry) if ticket.entry is not None else "queued"
        if phase != "done":
            self._observer.cancelled(phase)
        self._conditions.look()

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        """Deliver a batch: the only way by which answers reach their futures."""
        for entry, outcome in outcomes:
            future = entry.owner
            if future.done():
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        self._conditions.look()

    def _expire(self) -> None:
        now = self._clock()
        self._expected.refuse(lambda: too_late("before the image was ready"), before=now)
        expected = self._expected.next_deadline()  # before the queue's: what a thread delivers just now is in one of the two or in both
        with self._lock:
            late = self._queue.expire(now)
            following = self._queue.next_deadline()
        self._settle([(entry, too_late("while it waited")) for entry in late])
        deadlines = [deadline for deadline in (following, expected) if deadline is not None]
        if deadlines:
            self._timer.arm(min(deadlines))

    # On a device's thread

    def _serve(self, device: int) -> None:
        try:
            while (work := self._next_work(device)) is not None:
                if isinstance(work, Call):
                    self._runner.answer(device)
                    work.run()
                    continue
                self._post([(entry, too_late("before a device was free")) for entry in work.late])
                if work.entries:
                    self._runner.run(work)
        except BaseException as error:  # a lost device, or a fault of ours: either way nobody may wait for this thread
            self._lose(device, error)
        finally:
            self._runner.answer(device)

    def _next_work(self, device: int) -> Batch | Call | None:
        with self._work:
            while not self._stopped:
                work = self._calls.take(device, self._clock()) or self._queue.take(device, self._clock())
                if work is not None:
                    return work
                self._runner.answer(device)
                self._idle_threads += 1
                self._work.wait()
                self._idle_threads -= 1
            return None

    def _post(self, outcomes: list[Outcome]) -> None:
        """Hand outcomes to the event loop, all in one call."""
        if not outcomes and not self._conditions:
            return
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._settle, outcomes)
        except RuntimeError:
            log.warning("%d answers came after the event loop had closed", len(outcomes))

    def _lose(self, device: int, error: BaseException) -> None:
        """This thread ends. The images that it held are refused, not given to another device: one of them may be what it died of."""
        with self._lock:
            entries = self._queue.lose(device)
            left = self._queue.devices
            refusal = batch_lost if left else device_lost
            if not left:
                self._refusal = device_lost
                self._stopped = True
                entries += self._queue.clear(running=True)
                self._work.notify_all()
        log.critical("device %d is lost, %s", device, f"{left} go on" if left else "nothing more is served", exc_info=error)
        self._post([(entry, refusal()) for entry in entries])
        if self._on_device_lost is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_device_lost, device, error, left)
        with self._lock:
            self._calls.close(device, lambda: error, running=True)
