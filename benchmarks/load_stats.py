"""What a run of load showed: counts, percentiles and a line through time, as plain data that JSON holds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load_client import CONNECTION_FAILED, TIMED_OUT
from benchmarks.load_run import Load, Records

PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
CURVE_POINTS = 400
SLOW_SEND_S = 0.010
"""A request sent this late means that the generator, not the service, had too little CPU; its latency still counts from when it was due."""
STATUS_NAMES = {CONNECTION_FAILED: "connection failed", TIMED_OUT: "timed out"}
REFUSALS = (429, 503)


@dataclass(frozen=True)
class Summary:
    """One run. Latencies are milliseconds from the moment a request was due; throughput counts good pictures answered with 200."""

    title: str
    load: dict[str, Any]
    seconds: float
    offered_per_s: float
    answered_per_s: float
    requests: int
    statuses: dict[str, int]
    latency_ms: dict[str, float]
    """p50 ... p99.9, mean and max of answered good pictures."""
    refusal_ms: dict[str, float]
    """The same of 429 and 503."""
    refusals_with_retry_after: float
    """Fraction of 429 and 503 that carried Retry-After; 1 where there was no refusal."""
    errors: int
    """Connection failures, timeouts, statuses of 500 and up but 503, good pictures with 4xx but 429, and bad ones answered with 200."""
    bad_pictures: int
    late_sends: float
    """Fraction of requests that the generator sent too late."""
    generator_cpu: float
    curve: list[tuple[float, float]] = field(repr=False)
    """(percentile, ms), dense towards 100."""
    timeline: list[dict[str, float]] = field(repr=False)
    """Per second: second, offered, answered, refused, p50 and p99 in ms."""

    @property
    def generator_limited(self) -> bool:
        """Whether the load tool itself was short of CPU, so that the figures flatter nobody and prove little."""
        return self.generator_cpu > 0.8 or self.late_sends > 0.01


def summarise(records: Records, load: Load, *, title: str = "") -> Summary:
    """Count what came after the warm-up."""
    counted = records.scheduled >= load.warm_up_s
    seconds = load.seconds - load.warm_up_s
    status, good = records.status[counted], records.good[counted]
    latency_ms = (records.done - records.scheduled)[counted] * 1e3
    answered = good & (status == 200)
    refused = np.isin(status, REFUSALS)
    # Throughput: what was answered within the window, whenever it was asked for; the backlog answered after the end is nobody's second.
    answered_in_window = (records.status == 200) & records.good & (records.done >= load.warm_up_s) & (records.done < load.seconds)
    return Summary(
        title=title or load.words,
        load=asdict(load),
        seconds=seconds,
        offered_per_s=float(counted.sum() / seconds),
        answered_per_s=float(answered_in_window.sum() / seconds),
        requests=int(counted.sum()),
        statuses=dict(sorted(Counter(STATUS_NAMES.get(code, str(code)) for code in status.tolist()).items())),
        latency_ms=percentiles(latency_ms[answered]),
        refusal_ms=percentiles(latency_ms[refused]),
        refusals_with_retry_after=float(records.retry_after[counted][refused].mean()) if refused.any() else 1.0,
        errors=_count_errors(status, good),
        bad_pictures=int((~good).sum()),
        late_sends=float(((records.sent - records.scheduled)[counted] > SLOW_SEND_S).mean()) if counted.any() else 0.0,
        generator_cpu=records.generator_cpu,
        curve=_curve(latency_ms[answered]),
        timeline=_timeline(records, load.seconds),
    )


def percentiles(values_ms: NDArray[np.float64]) -> dict[str, float]:
    """p50 ... p99.9, mean and max; empty for no values. A percentile is a value that occurred, never between two."""
    if values_ms.size == 0:
        return {}
    named = {f"p{p:g}": float(np.percentile(values_ms, p, method="higher")) for p in PERCENTILES}
    return named | {"mean": float(values_ms.mean()), "max": float(values_ms.max())}


def _count_errors(status: NDArray[np.int64], good: NDArray[np.bool_]) -> int:
    broken = (status <= 0) | ((status >= 500) & (status != 503))
    refused_good = good & (status >= 400) & (status < 500) & (status != 429)
    accepted_bad = ~good & (status == 200)
    return int((broken | refused_good | accepted_bad).sum())


def _curve(values_ms: NDArray[np.float64]) -> list[tuple[float, float]]:
    if values_ms.size == 0:
        return []
    ordered = np.sort(values_ms)
    tail = np.logspace(0, -np.log10(values_ms.size), CURVE_POINTS)  # 1 - quantile, from 1 to that of the last value
    index = np.minimum(((1 - tail) * ordered.size).astype(int), ordered.size - 1)
    return [(float(100 * (1 - t)), float(ordered[i])) for t, i in zip(tail, index, strict=True)]


def _timeline(records: Records, seconds: float) -> list[dict[str, float]]:
    rows = []
    latency_ms = (records.done - records.scheduled) * 1e3
    for second in range(int(np.ceil(seconds))):
        due = (records.scheduled >= second) & (records.scheduled < second + 1)
        ended = (records.done >= second) & (records.done < second + 1)
        answered = ended & (records.status == 200) & records.good
        row = {
            "second": float(second),
            "offered": float(due.sum()),
            "answered": float(answered.sum()),
            "refused": float((ended & np.isin(records.status, REFUSALS)).sum()),
        }
        if answered.any():
            row |= {f"p{p}": float(np.percentile(latency_ms[answered], p, method="higher")) for p in (50, 99)}
        rows.append(row)
    return rows


def write_summary(summary: Summary, path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")


def read_summary(path: Path) -> Summary:
    """What write_summary wrote.

    Raises:
        ValueError: another kind of file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["curve"] = [(percentile, ms) for percentile, ms in fields["curve"]]
        return Summary(**fields)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a report of this load tool ({error}); make one with --json {path}") from error
