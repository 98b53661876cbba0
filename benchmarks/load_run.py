"""One run of load: when requests are sent, and what became of each.

Open loop: arrivals of a Poisson process, drawn before the run and independent of the answers, as strangers' requests are. A
latency counts from the moment a request was due, so that a server that stalls cannot slow down its own examination
(coordinated omission). Closed loop: N clients, each sends when its last answer came; it shows capacity, and hides tails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.load_client import TIMED_OUT, Client, Exchange, parse_target, prepare_request
from benchmarks.load_pictures import Picture

MAX_CONNECTIONS = 1024
NAP_S = 0.0005
"""Arrivals closer than this are sent together: finer timers cost the generator more than they gain."""


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    Attributes:
        rate: requests a second at the start and at the end (open loop), or None.
        clients: concurrent clients at the start and at the end (closed loop), or None.
        seconds: how long requests are sent.
        warm_up_s: at the start of these seconds; its requests are not counted.
        bad_share: fraction of requests with a picture that cannot be answered.
        timeout_s: an answer that takes longer is given up.
        seed: of arrivals and of the choice of pictures.
    """

    rate: tuple[float, float] | None = None
    clients: tuple[int, int] | None = None
    seconds: float = 20.0
    warm_up_s: float = 2.0
    bad_share: float = 0.0
    timeout_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.clients is None):
            raise ValueError("give either a rate (open loop) or a number of clients (closed loop)")
        if self.seconds <= self.warm_up_s:
            raise ValueError(f"{self.seconds} s of load leave nothing after {self.warm_up_s} s of warm-up")

    @property
    def words(self) -> str:
        """For headings."""
        name, unit, pair = ("open loop", "requests/s", self.rate) if self.rate else ("closed loop", "clients", self.clients)
        assert pair is not None
        span = f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g} to {pair[1]:g}"
        return f"{name}, {span} {unit}, {self.seconds:g} s"


@dataclass(frozen=True, slots=True)
class Records:
    """One row a request, in order of completion. Times in seconds since the start of the run."""

    scheduled: NDArray[np.float64]
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    status: NDArray[np.int64]
    retry_after: NDArray[np.bool_]
    good: NDArray[np.bool_]
    """Whether the picture was one that should be answered."""
    generator_cpu: float
    """CPU seconds a second that this process used."""


def poisson_arrivals(rate: tuple[float, float], seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Moments of arrival within `seconds`, the rate going linearly from the first to the second."""
    start, end = rate
    expected = (start + end) / 2 * seconds
    count = rng.poisson(expected)
    share = np.sort(rng.random(count))  # given their number, the arrivals are independent draws from the rate's profile
    if start == end:
        return share * seconds
    slope = (end - start) / seconds
    return (np.sqrt(start**2 + 2 * slope * share * expected) - start) / slope


async def run_load(
    url: str,
    pictures: Sequence[Picture],
    load: Load,
    *,
    headers: Sequence[str] = (),
    tick: Callable[[Sequence[Exchange]], None] | None = None,
) -> Records:
    """Send the load and wait for its answers.

    Args:
        url: http://host:port/path, which takes a picture as the body.
        pictures: chosen from at random; those that are not good only for `bad_share` of the requests.
        load: how much and how long.
        headers: further lines of the request's head.
        tick: called twice a second with the exchanges that ended so far.
    """
    target = parse_target(url)
    assert target.hostname is not None
    requests = [prepare_request(target, picture, headers) for picture in pictures]
    client = Client(target.hostname, target.port or 80, requests, max_connections=MAX_CONNECTIONS, timeout_s=load.timeout_s)
    ended: list[Exchange] = []
    ticker = asyncio.create_task(_tick(ended, tick)) if tick else None
    cpu, started = time.process_time(), time.perf_counter()
    try:
        drive = _drive_open if load.rate else _drive_closed
        await drive(client, load, _chooser(pictures, load), started, ended)
    finally:
        client.close()
        if ticker:
            ticker.cancel()
    generator_cpu = (time.process_time() - cpu) / (time.perf_counter() - started)
    return _records(ended, pictures, started, generator_cpu)


def _chooser(pictures: Sequence[Picture], load: Load) -> Callable[[], int]:
    rng = np.random.default_rng(load.seed + 1)
    good = [index for index, picture in enumerate(pictures) if picture.good]
    bad = [index for index, picture in enumerate(pictures) if not picture.good]
    if not good or (load.bad_share > 0 and not bad):
        raise ValueError("there is no picture of a kind that the load asks for")

    def choose() -> int:
        kind = bad if load.bad_share and rng.random() < load.bad_share else good
        return kind[int(rng.integers(len(kind)))]

    return choose


async def _drive_open(client: Client, load: Load, choose: Callable[[], int], started: float, ended: list[Exchange]) -> None:
    assert load.rate is not None
    arrivals = poisson_arrivals(load.rate, load.seconds, np.random.default_rng(load.seed)) + started
    for due in arrivals.tolist():
        wait_s = due - time.perf_counter()
        if wait_s > NAP_S:
            await asyncio.sleep(wait_s)
        # timers wake up to a millisecond early: what is sent before its time counts from then, or a latency could be negative
        client.fire(Exchange(choose(), min(due, time.perf_counter()), ended.append))
    await _until_ended(ended, len(arrivals), load.timeout_s)


async def _drive_closed(client: Client, load: Load, choose: Callable[[], int], started: float, ended: list[Exchange]) -> None:
    assert load.clients is not None
    first, last = load.clients
    end = started + load.seconds
    fired = 0

    def wanted() -> int:
        return round(first + (last - first) * min(1.0, (time.perf_counter() - started) / load.seconds))

    def begin() -> None:
        nonlocal fired
        fired += 1
        client.fire(Exchange(choose(), time.perf_counter(), finish))

    def finish(exchange: Exchange) -> None:
        ended.append(exchange)
        failed = exchange.status <= 0  # a dead server must not be called in a busy loop
        if exchange.done < end and not failed and fired - len(ended) < wanted():
            begin()

    while (left_s := end - time.perf_counter()) > 0:
        for _ in range(wanted() - (fired - len(ended))):
            begin()
        await asyncio.sleep(min(left_s, 0.05))
    await _until_ended(ended, fired, load.timeout_s)


async def _until_ended(ended: list[Exchange], count: int, timeout_s: float) -> None:
    patience = time.perf_counter() + timeout_s + 1
    while len(ended) < count and time.perf_counter() < patience:  # noqa: ASYNC110  # only after the last request, where nothing is measured
        await asyncio.sleep(0.01)


async def _tick(ended: list[Exchange], tick: Callable[[Sequence[Exchange]], None]) -> None:
    while True:
        await asyncio.sleep(0.5)
        tick(ended)


def _records(ended: Sequence[Exchange], pictures: Sequence[Picture], started: float, generator_cpu: float) -> Records:
    return Records(
        scheduled=np.array([exchange.scheduled - started for exchange in ended]),
        sent=np.array([exchange.sent - started for exchange in ended]),
        done=np.array([exchange.done - started for exchange in ended]),
        status=np.array([exchange.status for exchange in ended], dtype=np.int64),
        retry_after=np.array([exchange.retry_after for exchange in ended], dtype=bool),
        good=np.array([pictures[exchange.picture].good for exchange in ended], dtype=bool),
        generator_cpu=generator_cpu,
    )


__all__ = ["TIMED_OUT", "Load", "Records", "poisson_arrivals", "run_load"]
