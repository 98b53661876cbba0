"""Claims on answers whose items are still being made ready: decoded on a thread while a request awaits the end of it all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.batch_queue import Entry
from service.batch_runner import Answer


@dataclass(slots=True, eq=False)
class Ticket:
    """A claim on an answer, made before its item is ready: awaited on the event loop, while the item comes from any thread."""

    future: asyncio.Future[Answer]
    deadline: float | None
    entry: Entry | None = None
    """In the queue, once the item was delivered."""


class Expected:
    """The tickets that nobody has delivered for. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._tickets: set[Ticket] = set()

    def add(self, ticket: Ticket) -> None:
        self._tickets.add(ticket)
        ticket.future.add_done_callback(lambda _: self._tickets.discard(ticket))

    def refuse(self, error: Callable[[], Exception], *, before: float | None = None) -> None:
        """Let every ticket raise, or only those whose deadline lies before a moment."""
        refuse(
            [
                ticket
                for ticket in self._tickets
                if ticket.entry is None and (before is None or (ticket.deadline is not None and ticket.deadline < before))
            ],
            error,
        )

    def next_deadline(self) -> float | None:
        """The earliest deadline of all; what was delivered has the queue to watch it."""
        pending = (ticket for ticket in self._tickets if ticket.entry is None and not ticket.future.done())
        return min((ticket.deadline for ticket in pending if ticket.deadline is not None), default=None)


def refuse(tickets: Iterable[Ticket], error: Callable[[], Exception]) -> None:
    """Let the tickets' futures raise, each an error of its own; those that are done stay as they are."""
    for ticket in tickets:
        if not ticket.future.done():
            ticket.future.set_exception(error())


class DeadlineTimer:
    """One timer for all deadlines: it stands at the earliest one it was told of. Belongs to the event loop's thread."""

    def __init__(self, clock: Callable[[], float], expire: Callable[[], None]) -> None:
        """Take the clock of the deadlines, in seconds, and what is called when the earliest has passed."""
        self._clock = clock
        self._expire = expire
        self._handle: asyncio.Handle | None = None
        self._stands_at = 0.0
        """The deadline that the handle waits for. The handle cannot tell: uvloop gives one without a time for what is due at once."""

    def arm(self, deadline: float) -> None:
        """See that `expire` is called no later than soon after this deadline."""
        if self._handle is not None:
            if self._stands_at <= deadline:
                return
            self._handle.cancel()
        self._stands_at = deadline
        self._handle = asyncio.get_running_loop().call_later(max(0.0, deadline - self._clock()), self._ring)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _ring(self) -> None:
        self._handle = None
        self._expire()
