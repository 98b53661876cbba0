"""Work for a device's own thread that is no batch, done between two batches: CUDA graphs belong to the thread that recorded them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from service.device_errors import DeviceLost

T = TypeVar("T")


class Place(Protocol):
    """A thread to do work on: gives what the work gives, raises what it raises, and returns when it is done."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def here(work: Callable[[], T]) -> T:
    """On the caller's thread."""
    return work()


class Call:
    """One piece of work and who waits for it."""

    def __init__(self, work: Callable[[], Any], started: float = 0.0) -> None:
        self.future: Future[Any] = Future()
        self.started = started
        self._work = work

    def run(self) -> None:
        """Do it. DeviceLost is raised, with the future left open: whoever buries the device tells those that wait."""
        try:
            result = self._work()
        except DeviceLost:
            raise
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class DeviceCalls:
    """What waits for each device and what runs there. Not thread-safe: the scheduler holds its lock around each call."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Call]] = {}
        self._running: dict[int, Call] = {}
        self._closed: dict[int, Callable[[], BaseException]] = {}

    def add(self, device: int, work: Callable[[], Any]) -> Future[Any]:
        """Let work wait for its device. Raises what the device was closed with."""
        if device in self._closed:
            raise self._closed[device]()
        call = Call(work)
        self._waiting.setdefault(device, deque()).append(call)
        return call.future

    def take(self, device: int, now: float) -> Call | None:
        """The next call for a device that is free."""
        self._running.pop(device, None)
        if not self._waiting.get(device):
            return None
        call = self._running[device] = self._waiting[device].popleft()
        call.started = now
        return call

    def longest_s(self, now: float) -> float:
        """How long the oldest running call has been on its device."""
        return max((now - call.started for call in self._running.values()), default=0.0)

    def close(self, device: int, error: Callable[[], BaseException], *, running: bool) -> None:
        """Take no more for the device; what waits there gets the error, and with `running` also what it was at."""
        self._closed.setdefault(device, error)
        calls = list(self._waiting.pop(device, ()))
        if running and device in self._running:
            calls.append(self._running.pop(device))
        for call in calls:
            call.future.set_exception(error())
