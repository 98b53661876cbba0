"""Our service beside other servers: the same decoding, the same simulated device, the same pictures, one machine, one run.

    python -m benchmarks.serving                       everything: about 1.5 minutes a server and round
    python -m benchmarks.serving ours fastapi --rounds 1

The device is simulated (4 ms a batch and 1.5 ms an image, no CPU); decoding, HTTP, batching and the load are real. The load generator
shares the machine with the server, so the figures are for comparison within a run. Each run waits a while for a quiet machine and
notes how many CPUs other work took meanwhile; of several rounds the least disturbed one counts.
Servers: benchmarks/peers/. A server whose package is missing is reported in a sentence and left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.load import run_on_fast_loop
from benchmarks.load_pictures import DRAWN_SIZES_HW, Picture, draw_pictures
from benchmarks.load_run import Load, run_load
from benchmarks.load_stats import summarise
from benchmarks.peers.simulated import DECODE_THREADS, MAX_BATCH_SIZE, SECONDS_A_BATCH, SECONDS_AN_IMAGE, SimulatedDevice, decode
from benchmarks.serving_process import ServerMissing, Serving, busy_cpu_seconds, serving
from benchmarks.serving_report import write_report

OURS = "ours"
OURS_BUCKETS = "ours_buckets"
PEERS = ("fastapi", "mosec", "litserve", "bentoml", "ray")
SERVERS = (OURS, OURS_BUCKETS, *PEERS)
FORM_FIELDS = {"litserve": "request", "bentoml": "images"}
"""Servers that take pictures only as a form, and the field's name."""
PACKAGES = {"fastapi": "fastapi", "mosec": "mosec", "litserve": "litserve", "bentoml": "bentoml", "ray": "ray"}
RESULTS = Path(__file__).parent / "results"
CLIENTS = 32
STEADY_SHARE = 0.8
OVERLOAD = 2.0
QUIET_CPUS = 0.2
"""Other work that is let pass as quiet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write benchmarks/results/serving.{json,md,png}."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=f"of {', '.join(SERVERS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="each server is measured so often, in alternating order (default 2)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run, warm-up included (default 8)")
    parser.add_argument(
        "--patience", type=float, default=20.0, metavar="S", help="wait so long for a quiet machine before a run (default 20)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    options = parser.parse_args(arguments)
    names = options.servers or SERVERS
    unknown = set(names) - set(SERVERS)
    if unknown:
        parser.error(f"no such server: {', '.join(sorted(unknown))}; choose of {', '.join(SERVERS)}")
    report = run_on_fast_loop(
        measure_all(names, rounds=options.rounds, seconds=options.seconds, patience_s=options.patience, console=Console())
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    Console().print(write_report(report, options.out), markup=False)
    return 0


async def measure_all(names: Sequence[str], *, rounds: int, seconds: float, patience_s: float, console: Console) -> dict[str, Any]:
    """Every server in every round, the order reversed from round to round."""
    pictures = draw_pictures()
    measured: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            if name in missing:
                continue
            try:
                result = await measure_server(name, pictures, seconds, patience_s)
            except ServerMissing as error:
                missing[name] = str(error)
                console.print(f"{name}: left out: {error}", markup=False)
                continue
            measured.append({"server": name, "round": number, **result})
            runs = result["runs"]
            console.print(
                f"round {number + 1}, {name:9} one client p50 {runs['one']['latency_ms'].get('p50', float('nan')):.1f} ms, "
                f"{CLIENTS} clients {runs['many']['answered_per_s']:.0f} images/s while others took "
                f"{runs['many']['foreign_cpus']:.1f} CPUs (decoders alone {result['decoders']['per_s']:.0f}/s)",
                highlight=False,
            )
    return {"setup": setup(pictures, seconds, rounds), "measured": measured, "missing": missing}


async def measure_server(name: str, pictures: Sequence[Picture], seconds: float, patience_s: float) -> dict[str, Any]:
    """One server: one client, many clients, steady open loop, overload; and what decoders and device do alone.

    Raises:
        ServerMissing: it does not come up.
    """
    posted = [as_form(picture, FORM_FIELDS[name]) for picture in pictures] if name in FORM_FIELDS else list(pictures)
    decoders = await _undisturbed(lambda: asyncio.to_thread(decode_limit, pictures), None, patience_s)
    with serving(name, posted[0]) as server:

        async def run(load: Load) -> dict[str, Any]:
            return await _undisturbed(lambda: _run(server, posted, load), server, patience_s)

        one = await run(Load(clients=(1, 1), seconds=seconds / 2, warm_up_s=1.0))
        many = await run(Load(clients=(CLIENTS, CLIENTS), seconds=seconds, warm_up_s=2.0))
        capacity = max(1.0, many["answered_per_s"])
        steady = await run(Load(rate=(STEADY_SHARE * capacity,) * 2, seconds=1.5 * seconds, warm_up_s=2.0, timeout_s=10.0))
        overload = await run(Load(rate=(OVERLOAD * capacity,) * 2, seconds=seconds, warm_up_s=2.0, timeout_s=5.0))
    runs = {"one": one, "many": many, "steady": steady, "overload": overload}
    return {"decoders": decoders, "device": {"per_s": device_limit(), "foreign_cpus": 0.0}, "runs": runs}


async def _run(server: Serving, pictures: Sequence[Picture], load: Load) -> dict[str, Any]:
    gc.collect()
    gc.disable()  # a pause of the generator would be taken for one of the server
    try:
        cpu = server.cpu_seconds()
        records = await run_load(server.url, pictures, load)
        cpu = server.cpu_seconds() - cpu
    finally:
        gc.enable()
    kept = asdict(summarise(records, load))
    del kept["timeline"]
    kept["curve"] = [(round(percentile, 4), round(ms, 2)) for percentile, ms in kept["curve"][::4]]
    return kept | {"cpu_ms_a_request": 1e3 * cpu / max(1, len(records.status))}


async def _undisturbed(measure: Callable[[], Awaitable[dict[str, Any]]], server: Serving | None, patience_s: float) -> dict[str, Any]:
    """Wait for a quiet machine, but not for ever, measure, and add how many CPUs were taken by what is not ours."""
    patience = time.perf_counter() + patience_s
    while time.perf_counter() < patience and await _foreign_cpus(lambda: asyncio.sleep(1.0), server) > QUIET_CPUS:
        pass
    result: dict[str, Any] = {}

    async def keep() -> None:
        result.update(await measure())

    foreign = await _foreign_cpus(keep, server)
    return result | {"foreign_cpus": foreign}


async def _foreign_cpus(work: Callable[[], Awaitable[None]], server: Serving | None) -> float:
    def ours() -> float:
        return time.process_time() + (server.cpu_seconds() if server else 0.0)

    started, busy, own = time.perf_counter(), busy_cpu_seconds(), ours()
    await work()
    return max(0.0, (busy_cpu_seconds() - busy - (ours() - own)) / (time.perf_counter() - started))


def decode_limit(pictures: Sequence[Picture], seconds: float = 2.0) -> dict[str, Any]:
    """Pictures a second that the servers' number of threads decode, nothing else of ours running, and CPU ms of one picture."""
    end = time.perf_counter() + seconds

    def work(first: int) -> int:
        done = 0
        while time.perf_counter() < end:
            decode(pictures[(first + done) % len(pictures)].body)
            done += 1
        return done

    cpu, started = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        done = sum(pool.map(work, range(DECODE_THREADS)))
    return {"per_s": done / (time.perf_counter() - started), "cpu_ms": 1e3 * (time.process_time() - cpu) / done}


def device_limit(batches: int = 20) -> float:
    """Images a second of the simulated device in full batches, as its sleeps really are on this machine."""
    device = SimulatedDevice()
    started = time.perf_counter()
    for _ in range(batches):
        device.run(MAX_BATCH_SIZE)
    device.close()
    return batches * MAX_BATCH_SIZE / (time.perf_counter() - started)


def as_form(picture: Picture, field: str) -> Picture:
    """The same picture as the one file of a multipart form."""
    boundary = "picture-boundary-7f3a"
    disposition = f'Content-Disposition: form-data; name="{field}"; filename="{picture.name}"'
    head = f"--{boundary}\r\n{disposition}\r\nContent-Type: {picture.content_type}\r\n\r\n"
    body = head.encode("ascii") + picture.body + f"\r\n--{boundary}--\r\n".encode("ascii")
    return Picture(picture.name, f"multipart/form-data; boundary={boundary}", body, picture.good)


def setup(pictures: Sequence[Picture], seconds: float, rounds: int) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    versions = {}
    for package in PACKAGES.values():
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "sizes_wh": [f"{width}x{height}" for height, width in DRAWN_SIZES_HW],
        "mean_kilobytes": sum(len(picture.body) for picture in pictures) / len(pictures) / 1e3,
        "device": f"simulated, {SECONDS_A_BATCH * 1e3:g} ms a batch + {SECONDS_AN_IMAGE * 1e3:g} ms an image, up to {MAX_BATCH_SIZE}",
        "seconds_a_run": seconds,
        "rounds": rounds,
    }


if __name__ == "__main__":
    sys.exit(main())
