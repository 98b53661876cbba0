"""The highest rate that a service holds within a latency objective, found by doubling and then halving the interval."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.load_stats import PERCENTILES, Summary

MAX_FAILED_SHARE = 0.001
"""Refusals and errors that a rate may have and still count as held."""
MAX_DOUBLINGS = 14


@dataclass(frozen=True, slots=True)
class Objective:
    """A percentile of the latency and its bound, `p99=100` for 100 ms."""

    percentile: str
    bound_ms: float

    def holds(self, summary: Summary) -> bool:
        """Whether a run met it, nearly without refusals and errors."""
        failed = sum(count for status, count in summary.statuses.items() if status in ("429", "503")) + summary.errors
        if not summary.latency_ms or failed > MAX_FAILED_SHARE * summary.requests:
            return False
        return summary.latency_ms[self.percentile] <= self.bound_ms


def parse_objective(text: str) -> Objective:
    """Read `p99=100`.

    Raises:
        ValueError: another form, or a percentile that is not measured.
    """
    match = re.fullmatch(r"(p[\d.]+)=([\d.]+)(?:ms)?", text)
    known = [f"p{p:g}" for p in PERCENTILES]
    if match is None or match[1] not in known:
        raise ValueError(f"objective {text!r}: expected a percentile of {', '.join(known)} and milliseconds, such as p99=100")
    return Objective(match[1], float(match[2]))


@dataclass(frozen=True, slots=True)
class Found:
    """The highest rate held (0 if none), and every rate tried with whether it held."""

    rate: float
    tried: list[tuple[float, Summary, bool]]


async def find_rate(
    measure: Callable[[float], Awaitable[Summary]], objective: Objective, *, start: float, resolution: float = 0.05
) -> Found:
    """Search the highest rate within the objective.

    Args:
        measure: runs the load at a rate.
        objective: what has to hold.
        start: the first rate tried, requests a second.
        resolution: stop when the interval is this fraction of the rate. A single run that fails by chance ends the climb, so take
            runs long enough for the percentile: p99 needs a thousand requests.
    """
    tried: list[tuple[float, Summary, bool]] = []

    async def held(rate: float) -> bool:
        summary = await measure(rate)
        tried.append((rate, summary, objective.holds(summary)))
        return tried[-1][2]

    low, high = 0.0, start
    for _ in range(MAX_DOUBLINGS):
        if not await held(high):
            break
        low, high = high, 2 * high
    else:
        return Found(low, tried)
    while high - low > resolution * high and high > 0.5:
        middle = (low + high) / 2
        if await held(middle):
            low = middle
        else:
            high = middle
    return Found(low, tried)
