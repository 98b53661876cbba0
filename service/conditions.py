"""Coroutines that wait until something is true of what a lock guards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable


class Conditions:
    """Conditions that are awaited; true as long as there is one. Belongs to the event loop's thread."""

    def __init__(self, lock: threading.Lock) -> None:
        """Take the lock that is held while a condition is looked at."""
        self._lock = lock
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def __bool__(self) -> bool:
        return bool(self._waiters)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds: it is looked at now and at each `look`."""
        with self._lock:
            if condition():
                return
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append((condition, waiter))
        await waiter

    def look(self) -> None:
        """Wake whose condition holds now."""
        if not self._waiters:
            return
        with self._lock:
            met = [waiter for condition, waiter in self._waiters if waiter.done() or condition()]
            self._waiters = [pair for pair in self._waiters if pair[1] not in met]
        for waiter in met:
            if not waiter.done():
                waiter.set_result(None)
