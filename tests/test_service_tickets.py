"""Items that another thread makes ready: delivered, refused, too late, or no longer wanted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any

import pytest
import uvloop

from service.errors import BadImage, DeadlineExceeded, Draining, QueueFull
from service.scheduler import Observer, Scheduler, Ticket
from service.tickets import DeadlineTimer, Expected

COSTS = {1: 0.001}


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


class Leavers(Observer):
    """Counts who left in which phase."""

    def __init__(self) -> None:
        self.phases: Counter[str] = Counter()

    def cancelled(self, phase: str) -> None:
        self.phases[phase] += 1


class Setting:
    """A scheduler whose one device notes what it ran."""

    def __init__(self, max_queue_images: int = 8) -> None:
        self.ran: list[Any] = []
        self.leavers = Leavers()
        self.on_run: Callable[[], Any] = lambda: None
        self.scheduler = Scheduler(max_queue_images=max_queue_images, max_queue_bytes=1 << 20, observer=self.leavers)

    async def __aenter__(self) -> Setting:
        self.scheduler.start()
        self.scheduler.add_lane("lane", self.run, costs=COSTS, max_batch_size=4)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.scheduler.close()

    def run(self, _device: int, items: Sequence[Any]) -> list[Any]:
        self.on_run()
        self.ran += items
        return [2 * item for item in items]

    def bring(self, ticket: Ticket, item: int) -> None:
        """As a decoding thread does."""
        try:
            self.scheduler.deliver(ticket, "lane", item)
        except QueueFull as error:
            self.scheduler.refuse(ticket, error)


@on_a_loop
async def test_what_a_thread_delivers_is_answered() -> None:
    async with Setting() as setting:
        tickets = [setting.scheduler.expect(time.monotonic() + 30) for _ in range(5)]
        for number, ticket in enumerate(tickets):
            await asyncio.to_thread(setting.bring, ticket, number)
        assert [(await ticket.future).result for ticket in tickets] == [0, 2, 4, 6, 8]


@on_a_loop
async def test_a_thread_passes_its_error_on() -> None:
    async with Setting() as setting:
        ticket = setting.scheduler.expect()
        await asyncio.to_thread(setting.scheduler.refuse, ticket, BadImage("broken"))
        with pytest.raises(BadImage, match="broken"):
            await ticket.future


@on_a_loop
async def test_who_left_before_the_delivery_costs_no_device_time() -> None:
    async with Setting() as setting:
        left, stayed = setting.scheduler.expect(time.monotonic() + 30), setting.scheduler.expect()
        left.future.cancel()
        await asyncio.to_thread(setting.bring, left, 1)
        await asyncio.to_thread(setting.bring, stayed, 2)
        assert (await stayed.future).result == 4
        assert setting.ran == [2]
        assert setting.leavers.phases == {"queued": 1}


@on_a_loop
async def test_deadlines_hold_before_the_delivery_and_each_in_its_turn() -> None:
    async with Setting() as setting:
        now = time.monotonic()
        tickets = [setting.scheduler.expect(now + seconds) for seconds in (0.15, 0.05, 60.0)]
        for ticket in (tickets[1], tickets[0]):
            with pytest.raises(DeadlineExceeded, match="before the image was ready"):
                await ticket.future
        assert time.monotonic() >= now + 0.15
        await asyncio.to_thread(setting.bring, tickets[0], 1)
        await asyncio.to_thread(setting.bring, tickets[2], 3)
        assert (await tickets[2].future).result == 6
        assert setting.ran == [3], "what came too late was not run"


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_deadline_that_is_due_at_once_is_in_nobodys_way(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def scenario() -> None:
        async with Setting() as setting:
            due, coming = time.monotonic() - 1.0, time.monotonic() + 30.0
            late = [setting.scheduler.expect(due) for _ in range(2)]
            stays = setting.scheduler.expect(coming)
            for ticket in late:
                with pytest.raises(DeadlineExceeded):
                    await asyncio.wait_for(ticket.future, 20.0)
            await asyncio.to_thread(setting.bring, stays, 1)
            assert (await stays.future).result == 2

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_timer_stands_at_the_earliest_deadline_it_was_told_of(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def scenario() -> None:
        rang = asyncio.Event()
        timer = DeadlineTimer(time.monotonic, rang.set)
        for seconds in (60.0, 0.02, 30.0):
            timer.arm(time.monotonic() + seconds)
        await asyncio.wait_for(rang.wait(), 20.0)
        rang.clear()
        timer.arm(time.monotonic() + 60.0)  # the one that rang is no longer in its way
        timer.arm(time.monotonic())
        await asyncio.wait_for(rang.wait(), 20.0)
        timer.arm(time.monotonic() + 60.0)
        timer.cancel()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scenario())


class Interrupted:
    """The scheduler's expected tickets: whenever all are looked through, a decoding thread gets its turn before and after."""

    def __init__(self, expected: Expected, turn: Callable[[], None]) -> None:
        self._expected, self._turn = expected, turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._expected, name)

    def next_deadline(self) -> float | None:
        self._turn()
        found = self._expected.next_deadline()
        self._turn()
        return found


@pytest.mark.parametrize("turn", [1, 2])
def test_a_deadline_holds_for_what_is_delivered_while_others_expire(turn: int) -> None:
    @on_a_loop
    async def scenario() -> None:
        async with Setting() as setting:
            scheduler, gate, held, now = setting.scheduler, threading.Event(), threading.Event(), time.monotonic()
            setting.on_run = lambda: (held.set(), gate.wait(20.0))
            first = scheduler.submit("lane", 1)
            await asyncio.to_thread(held.wait, 20.0)
            early, late = (scheduler.expect(now + seconds) for seconds in (0.05, 0.3))
            turns = iter(range(1, 100))

            def take_turn() -> None:
                if next(turns) == turn:
                    thread = threading.Thread(target=setting.bring, args=(late, 2))
                    thread.start()
                    thread.join()

            scheduler._expected = Interrupted(scheduler._expected, take_turn)  # type: ignore[assignment]
            try:
                for ticket in (early, late):  # the device is busy all the time: only the timer can tell them
                    with pytest.raises(DeadlineExceeded):
                        await asyncio.wait_for(ticket.future, 5.0)
            finally:
                gate.set()
            await first

    scenario()


@on_a_loop
async def test_closing_and_draining_reach_those_who_wait_for_a_thread() -> None:
    async with Setting() as setting:
        early = setting.scheduler.expect()
        await setting.scheduler.drain()
        with pytest.raises(Draining):
            setting.scheduler.expect()
        with pytest.raises(Draining):
            await asyncio.to_thread(setting.scheduler.deliver, early, "lane", 1)
        await setting.scheduler.close()
        with pytest.raises(Draining):
            await early.future


@on_a_loop
async def test_an_error_after_the_loop_closed_is_nobodys() -> None:
    scheduler = Scheduler(max_queue_images=1, max_queue_bytes=1)

    async def begin() -> Ticket:
        scheduler.start()
        ticket = scheduler.expect()
        ticket.future.cancel()
        return ticket

    ticket = await asyncio.to_thread(asyncio.run, begin())
    scheduler.refuse(ticket, BadImage("late"))
    assert ticket.future.cancelled()
