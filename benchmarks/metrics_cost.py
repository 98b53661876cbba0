"""What scrapes take from a busy service: `python -m benchmarks.metrics_cost --json FILE` (about five minutes).

Blocks of a closed loop without and with scrapes alternate in one run, so that what else the machine does falls on both, and each pair
gives one difference. One scrape a second is too little to be seen in a block's noise, so a block has twenty a second; what one costs is
a twentieth. Throughput and the service's CPU time a request are both looked at: the CPU time hardly depends on what else runs here.
The service is the real one on the simulated device of benchmarks.serving.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

import httpx

from benchmarks.figures import cpus, keep, make_parser
from benchmarks.live import beside
from benchmarks.load_pictures import Picture, draw_pictures
from benchmarks.load_run import Load, run_load
from benchmarks.load_stats import summarise
from benchmarks.serving_process import Serving, serving

CLIENTS = 8
WARM_UP_S = 0.5
SCRAPES_A_SECOND = 20
T_95 = {4: 2.78, 9: 2.26, 14: 2.14, 19: 2.09, 29: 2.05}
"""Student's t for a two-sided 95 % by degrees of freedom; between them the wider one is taken."""


@dataclass(frozen=True)
class Block:
    """A few seconds of load."""

    answered_per_s: float
    cpu_ms_a_request: float
    scrapes: int


class Scraper:
    """Asks for /metrics at a steady rate while `running`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.scrapes = 0

    @contextmanager
    def running(self, each_second: int) -> Iterator[None]:
        """Scrape in a thread until the end of the block."""

        def scrape(over: threading.Event) -> None:
            due = time.monotonic()
            with httpx.Client() as client:
                while not over.wait(max(0.0, due - time.monotonic())):
                    client.get(self._url).raise_for_status()
                    self.scrapes += 1
                    due += 1 / each_second

        with beside(scrape):
            yield


def run_block(server: Serving, pictures: list[Picture], seconds: float, *, scraped: bool) -> Block:
    """One block of the closed loop."""
    load = Load(clients=(CLIENTS, CLIENTS), seconds=seconds + WARM_UP_S, warm_up_s=WARM_UP_S)
    scraper = Scraper(server.url.replace("/v1/detect", "/metrics"))
    before_s = server.cpu_seconds()
    if scraped:
        with scraper.running(SCRAPES_A_SECOND):
            records = asyncio.run(run_load(server.url, pictures, load))
    else:
        records = asyncio.run(run_load(server.url, pictures, load))
    cpu_s = server.cpu_seconds() - before_s
    return Block(summarise(records, load).answered_per_s, cpu_s / len(records.done) * 1e3, scraper.scrapes)


def interval(differences: list[float]) -> dict[str, float]:
    """Mean of paired differences with its 95 % confidence interval."""
    freedom = len(differences) - 1
    t = T_95[max((known for known in T_95 if known <= freedom), default=4)]
    half = t * stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean(differences), "low": mean(differences) - half, "high": mean(differences) + half}


def evaluate(pairs: list[tuple[Block, Block]], seconds: float) -> dict[str, Any]:
    """From pairs (without, with) to what one scrape a second takes."""
    a_second = [with_.scrapes / (seconds + WARM_UP_S) for _, with_ in pairs]
    lost = [(1 - with_.answered_per_s / without.answered_per_s) / rate for (without, with_), rate in zip(pairs, a_second, strict=True)]
    cpu_ms = [
        (with_.cpu_ms_a_request - without.cpu_ms_a_request) * with_.answered_per_s / rate
        for (without, with_), rate in zip(pairs, a_second, strict=True)
    ]
    return {
        "pairs": len(pairs),
        "scrapes_a_second_in_a_block": mean(a_second),
        "answered_per_s": {"without": median(a.answered_per_s for a, _ in pairs), "with": median(b.answered_per_s for _, b in pairs)},
        "cpu_ms_a_request": {"without": median(a.cpu_ms_a_request for a, _ in pairs), "with": median(b.cpu_ms_a_request for _, b in pairs)},
        "one_scrape_cpu_ms": interval(cpu_ms),
        "throughput_lost_to_one_scrape_a_second": interval(lost),
    }


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Alternating blocks; which of a pair comes first alternates too."""
    pictures = draw_pictures()
    pairs = []
    with serving("ours", pictures[0]) as server:
        run_block(server, pictures, seconds, scraped=False)
        for number in range(rounds):
            order = (False, True) if number % 2 == 0 else (True, False)
            blocks = {scraped: run_block(server, pictures, seconds, scraped=scraped) for scraped in order}
            pairs.append((blocks[False], blocks[True]))
        text_bytes = len(httpx.get(server.url.replace("/v1/detect", "/metrics")).content)
    return {
        **evaluate(pairs, seconds),
        "metrics_bytes": text_bytes,
        "cpus": cpus(),
        "load_average_at_the_end": os.getloadavg()[0],
    }


def main() -> int:
    """Measure and write."""
    parser = make_parser("metrics_cost", __doc__)
    parser.add_argument("--rounds", type=int, default=30, help="pairs of blocks, at least 5 (default 30)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a block (default 4)")
    options = parser.parse_args()
    keep(measure(options.rounds, options.seconds), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
