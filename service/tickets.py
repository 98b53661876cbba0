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
