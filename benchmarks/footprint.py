"""What a replica takes before it does any work: `python -m benchmarks.footprint --json FILE`.

Cold start: from the process's birth to the first 200 of /readyz. Memory: resident, idle after the start, and after some load. /metrics:
its time on an idle service (what scrapes take from a busy one: benchmarks.metrics_cost). CPU times stand beside the times on the wall,
for machines that do other work too. The service is the real one with the model repository that it is given. About a minute.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.figures import cpus, keep, make_parser
from benchmarks.live import ROOT, Service
from benchmarks.load_pictures import draw_pictures
from benchmarks.load_run import Load, run_load

IDLE_S = 3.0
SCRAPES = 200
CLIENTS = 8
SETTINGS = {"drain_seconds": 0, "canary_seconds": 0}


def cold_starts(repository: Path, log: Path, times: int) -> list[dict[str, float]]:
    """Start, wait until ready, idle, look at the memory, stop: several times."""
    found = []
    for _ in range(times):
        started = time.monotonic()
        with Service(log, model_repository=repository, **SETTINGS) as service:
            service.until_ready()
            ready_s, ready_cpu_s = time.monotonic() - started, cpu_seconds(service.process.pid)
            time.sleep(IDLE_S)
            found.append({"ready_s": ready_s, "ready_cpu_s": ready_cpu_s, "idle_rss_mb": resident_bytes(service.process.pid) / 1e6})
    return found


def resident_bytes(pid: int) -> int:
    """VmRSS of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def scrape_ms(url: str) -> list[float]:
    """Times of many GET /metrics over one connection, in ms."""
    with httpx.Client(base_url=url) as client:
        client.get("/metrics").raise_for_status()
        times = []
        for _ in range(SCRAPES):
            started = time.perf_counter()
            client.get("/metrics").raise_for_status()
            times.append((time.perf_counter() - started) * 1e3)
    return times


def measure(repository: Path, *, times: int, seconds: float) -> dict[str, Any]:
    """Everything, as plain data."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        starts = cold_starts(repository, log, times)
        with Service(log, model_repository=repository, **SETTINGS) as service:
            service.until_ready()
            before_s = cpu_seconds(service.process.pid)
            idle_ms = scrape_ms(service.url)
            scrape_cpu_ms = (cpu_seconds(service.process.pid) - before_s) / len(idle_ms) * 1e3
            load = Load(clients=(CLIENTS, CLIENTS), seconds=seconds, warm_up_s=1.0)
            asyncio.run(run_load(f"{service.url}/v1/detect", draw_pictures(), load))
            busy_rss = resident_bytes(service.process.pid) / 1e6
    scraped_ms = sorted(idle_ms)
    return {
        "models": sorted(path.parent.parent.name for path in repository.glob("*/*/model.onnx")),
        "cpus": cpus(),
        "load_average_at_the_end": os.getloadavg()[0],
        "cold_start_s": [round(start["ready_s"], 3) for start in starts],
        "cold_start_median_s": median(start["ready_s"] for start in starts),
        "cold_start_cpu_s": median(start["ready_cpu_s"] for start in starts),
        "idle_rss_mb": median(start["idle_rss_mb"] for start in starts),
        "rss_after_load_mb": busy_rss,
        "metrics_ms": {"cpu": scrape_cpu_ms, "p50": median(scraped_ms), "p99": scraped_ms[int(0.99 * len(scraped_ms))]},
    }


def main() -> int:
    """Measure and write."""
    parser = make_parser("footprint", __doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="models to serve (default: the bundled demo)")
    parser.add_argument("--starts", type=int, default=5, help="cold starts (default 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load before the last look at the memory (default 10)")
    options = parser.parse_args()
    keep(measure(options.repository, times=options.starts, seconds=options.seconds), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
