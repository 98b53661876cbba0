"""What a soak showed: faults, the slope of memory, the slope of latency, and a plot of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("agg")

import matplotlib.pyplot as plt

from benchmarks.trend import trend

ALLOWED = {"good": {"200"}, "bad": {"400", "413", "415", "422"}, "slow": {"200", "422"}, "reload": {"200"}}
"""By kind of client; a slow one's picture may be cut off."""
SETTLED = 1 / 3
"""The share of a run in which caches fill and the allocator learns; slopes are of what follows."""
GROWTH_MB, GROWTH_MB_AN_HOUR = 10.0, 15.0
"""Beyond what the scatter explains, memory may grow by no more than so much."""
RISE = 1.5
"""The last third's median latency over the first third's, at most."""
BINS = 60

Column = NDArray[np.float64]
Series = Sequence[tuple[float, float]]
"""(seconds since the start, value)."""


def summary(answers: Mapping[str, Counter[str]], vanished: int, latency_s: Series, resident_mb: Series) -> dict[str, Any]:
    """Counts, slopes and series as plain data; `faults` says in sentences what should not be."""
    memory, latency = judge_memory(resident_mb), judge_latency(latency_s)
    faults = [
        f"{kind} clients got {count} times {outcome}"
        for kind, counter in answers.items()
        for outcome, count in counter.items()
        if outcome not in ALLOWED[kind]
    ]
    if not answers["good"]:
        faults.append("no good client was answered")
    if memory["growth_mb"] - memory["uncertain_mb"] > GROWTH_MB + GROWTH_MB_AN_HOUR * memory["hours"]:
        faults.append(f"resident memory grew by {memory['growth_mb']} MB")
    if latency["last_over_first"] > RISE:
        faults.append(f"median latency rose to {latency['last_over_first']} times what it was")
    return {
        "answers": {kind: dict(counter) for kind, counter in answers.items()},
        "vanished": vanished,
        "resident_mb": memory,
        "latency_ms": latency,
        "faults": faults,
        "series": {
            "resident_mb": _rounded(resident_mb),
            "latency_p50_ms": percentiles(latency_s, 50),
            "latency_p99_ms": percentiles(latency_s, 99),
        },
    }


def judge_memory(resident_mb: Series) -> dict[str, float]:
    """The straight line through what follows the first third, and what it amounts to."""
    times, sizes = _columns(resident_mb)
    later = times >= SETTLED * times.max(initial=0.0)
    times, sizes = times[later], sizes[later]
    hours = float(np.ptp(times)) / 3600 if len(times) else 0.0
    slope, uncertain = trend(times / 3600, sizes)
    return {
        "samples": len(resident_mb),
        "median": round(float(np.median(sizes)), 1) if len(sizes) else 0.0,
        "largest": round(max((size for _, size in resident_mb), default=0.0), 1),
        "slope_mb_an_hour": round(slope, 2),
        "hours": round(hours, 4),
        "growth_mb": round(slope * hours, 2),
        "uncertain_mb": round(uncertain * hours, 2),
    }


def judge_latency(latency_s: Series) -> dict[str, float]:
    """Percentiles, and whether the end is slower than the beginning."""
    times, seconds = _columns(latency_s)
    if not len(times):
        return {"p50": 0.0, "p99": 0.0, "last_over_first": 0.0, "p50_slope_ms_an_hour": 0.0}
    third = max(1, len(seconds) // 3)
    binned = np.array(percentiles(latency_s, 50))
    slope = float(np.polyfit(binned[:, 0] / 3600, binned[:, 1], 1)[0]) if len(binned) > 2 else 0.0
    return {
        "p50": round(1e3 * float(np.median(seconds)), 1),
        "p99": round(1e3 * float(np.percentile(seconds, 99)), 1),
        "last_over_first": round(float(np.median(seconds[-third:]) / np.median(seconds[:third])), 3),
        "p50_slope_ms_an_hour": round(slope, 2),
    }


def percentiles(latency_s: Series, percentile: float) -> list[tuple[float, float]]:
    """(middle of a stretch in seconds, ms) for BINS stretches of the run; those without a request are left out."""
    times, seconds = _columns(latency_s)
    if not len(times):
        return []
    edges = np.linspace(0.0, times.max(), BINS + 1)
    places = np.clip(np.digitize(times, edges) - 1, 0, BINS - 1)
    middles = (edges[1:] + edges[:-1]) / 2
    return [
        (round(float(middles[place]), 1), round(1e3 * float(np.percentile(seconds[places == place], percentile)), 1))
        for place in np.unique(places)
    ]


def draw_report(found: Mapping[str, Any], path: Path) -> None:
    """Memory above, latency below, over the minutes of the run."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    memory, latency = found["resident_mb"], found["latency_ms"]
    above.plot(*_minutes(found["series"]["resident_mb"]), ".", markersize=3)
    above.set(ylabel="resident memory after a reload, MB", title=f"{memory['slope_mb_an_hour']:+.1f} MB an hour after the first third")
    above.set_ylim(bottom=0)
    for percentile in (50, 99):
        below.plot(*_minutes(found["series"][f"latency_p{percentile}_ms"]), label=f"p{percentile}")
    below.set(ylabel="latency, ms", xlabel="minutes", yscale="log", title=f"last third over first: {latency['last_over_first']:.2f}")
    below.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _columns(series: Series) -> tuple[Column, Column]:
    table = np.array(series, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _minutes(series: Series) -> tuple[list[float], list[float]]:
    return [moment / 60 for moment, _ in series], [value for _, value in series]


def _rounded(series: Series) -> list[tuple[float, float]]:
    return [(round(moment, 1), round(value, 1)) for moment, value in series]
