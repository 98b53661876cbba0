"""Reloads under load: `python -m benchmarks.reloads --reloads 100 --json FILE` (about five minutes on two idle cores).

The real service with the bundled model as versions 1 and 2 of one name. Clients ask without a pause while an operator loads one version
after the other; not one request may fail, and every answer must come from a version that was being served. The resident memory is read
after each reload, when the version before it has been retired, and must not grow after the first third by more than its scatter explains.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from benchmarks.figures import cpus, keep, make_parser
from benchmarks.footprint import resident_bytes
from benchmarks.incident import copy_models
from benchmarks.live import ROOT, Service
from benchmarks.load_pictures import Picture, draw_pictures
from benchmarks.trend import trend
from service.auth import make_key

VERSIONS = ("1", "2")
SETTINGS = {"drain_seconds": 0, "canary_seconds": 0}
REQUEST_TIMEOUT_S = 30.0
RELOAD_TIMEOUT_S = 120.0
LEVEL_MB = 0.05
"""Growth of so much a reload is none, however little the samples scatter."""
MODEL_SERIES = b"\ndetector_model_info{"


@dataclass
class Tally:
    """What came of the requests and the reloads."""

    answers: Counter[str] = field(default_factory=Counter)
    """By version, or by status where it is not 200, or by the kind of transport error."""
    latencies_s: list[float] = field(default_factory=list)
    reloads: Counter[int] = field(default_factory=Counter)
    reload_s: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    """After each reload, with the new version alone."""


async def ask(url: str, pictures: list[Picture], over: asyncio.Event, tally: Tally) -> None:
    """One client, until the operator is done."""
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
        while not over.is_set():
            picture = pictures[len(tally.latencies_s) % len(pictures)]
            started = time.perf_counter()
            try:
                answer = await client.post("/v1/detect", content=picture.body, headers={"content-type": picture.content_type})
            except httpx.TransportError as error:
                tally.answers[type(error).__name__] += 1
                continue
            tally.latencies_s.append(time.perf_counter() - started)
            tally.answers[f"version {answer.json()['model']['version']}" if answer.status_code == 200 else str(answer.status_code)] += 1


async def operate(service: Service, name: str, key: str, reloads: int, tally: Tally) -> None:
    """Load the versions in turns."""
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=service.url, timeout=RELOAD_TIMEOUT_S, headers=headers) as client:
        for number in range(reloads):
            started = time.perf_counter()
            answer = await client.post(f"/v1/models/{name}/load", json={"version": VERSIONS[number % len(VERSIONS)]})
            tally.reload_s.append(time.perf_counter() - started)
            tally.reloads[answer.status_code] += 1
            await retired(client)
            tally.resident_mb.append(resident_bytes(service.process.pid) / 1e6)


async def retired(client: httpx.AsyncClient) -> None:
    """Wait until one version is left: the metrics name each as long as it is in memory.

    Raises:
        TimeoutError: the old one stays.
    """
    async with asyncio.timeout(RELOAD_TIMEOUT_S):
        while (await client.get("/metrics")).content.count(MODEL_SERIES) > 1:  # noqa: ASYNC110  # another process: nothing to await
            await asyncio.sleep(0.02)


async def reload_under_load(service: Service, name: str, key: str, *, reloads: int, clients: int) -> Tally:
    """Everything at once; the clients stop after the last reload."""
    tally, over, pictures = Tally(), asyncio.Event(), draw_pictures()
    asking = [asyncio.create_task(ask(service.url, pictures, over, tally)) for _ in range(clients)]
    try:
        await operate(service, name, key, reloads, tally)
    finally:
        over.set()
        await asyncio.gather(*asking)
    return tally


@contextmanager
def two_versions(repository: Path, **settings: object) -> Iterator[tuple[Service, str, str]]:
    """The service with the repository's model as versions 1 and 2 of one name. Yields it, ready, the name, and an operator's key."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        models = copy_models(repository, folder / "models")
        name = next(models.iterdir()).name
        key, line = make_key("operator")
        (folder / "keys").write_text(line + "\n")
        with Service(folder / "log", model_repository=models, model=name, admin_keys_file=folder / "keys", **settings) as service:
            yield service.until_ready(), name, key


def measure(repository: Path, *, reloads: int, clients: int) -> dict[str, Any]:
    """The whole experiment, as plain data."""
    with two_versions(repository, **SETTINGS) as (service, name, key):
        started = time.monotonic()
        tally = asyncio.run(reload_under_load(service, name, key, reloads=reloads, clients=clients))
        seconds = time.monotonic() - started
    return summary(tally) | {"model": name, "clients": clients, "seconds": round(seconds, 1), "cpus": cpus()}


def summary(tally: Tally) -> dict[str, Any]:
    """Counts, and what a reload and a request took."""
    failed = sum(count for outcome, count in tally.answers.items() if not outcome.startswith("version "))
    latencies_ms = sorted(seconds * 1e3 for seconds in tally.latencies_s)
    return {
        "reloads": dict(tally.reloads),
        "requests": tally.answers.total(),
        "failed_requests": failed,
        "answers": dict(tally.answers),
        "reload_median_s": round(median(tally.reload_s), 2),
        "latency_ms": {"p50": round(median(latencies_ms), 1), "p99": round(latencies_ms[int(0.99 * len(latencies_ms))], 1)},
        "resident_mb": memory(tally.resident_mb),
    }


def memory(resident_mb: list[float]) -> dict[str, Any]:
    """What became of the resident memory over the reloads."""
    thirds = [float(np.median(part)) for part in np.array_split(resident_mb, 3) if len(part)]
    later = np.array(resident_mb[len(resident_mb) // 3 :])
    slope, uncertain = trend(np.arange(len(later), dtype=np.float64), later)
    return {
        "after_the_first": round(resident_mb[0]),
        "largest": round(max(resident_mb)),
        "after_the_last": round(resident_mb[-1]),
        "medians_of_thirds": [round(third) for third in thirds],
        "slope_mb_a_reload": round(slope, 2),
        "uncertain_mb_a_reload": round(uncertain, 2),
        "levels_off": slope <= uncertain + LEVEL_MB,
        "each": [round(size) for size in resident_mb],
    }


def main() -> int:
    """Measure and write. Returns 1 if a request or a reload failed, or memory grew to the end."""
    parser = make_parser("reloads", __doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="model to serve (default: the bundled demo)")
    parser.add_argument("--reloads", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--clients", type=int, default=4, help="that ask without a pause (default 4)")
    options = parser.parse_args()
    found = measure(options.repository, reloads=options.reloads, clients=options.clients)
    keep(found, options.json)
    well = found["failed_requests"] == 0 and set(found["reloads"]) == {200} and found["resident_mb"]["levels_off"]
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
