"""What Ray Serve costs and gives: `python -m benchmarks.ray_serve --json FILE` on this machine, with simulated devices.

Overhead: p50 of single requests through one replica against the same service as one process, with Ray's switches as deploy/ray/serve.env
sets them, and with Ray's default proxy. Scaling: throughput of two replicas against one, on a device slow enough that the CPU is not the
limit. Loss: one of two replicas is killed under load; which requests fail?
A simulated device takes time and no CPU, as a GPU does; everything else is real. About nine minutes with the default --seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.figures import cpus, keep, make_parser
from benchmarks.live import ROOT, free_port
from benchmarks.load_pictures import Picture, draw_pictures
from benchmarks.load_run import Load, run_load
from benchmarks.load_stats import Summary, summarise
from benchmarks.peers.ours import SimulatedRuntime
from benchmarks.serving_process import serving
from service.settings import Settings

SLOW_BATCH_S, SLOW_IMAGE_S = 0.04, 0.01
MAX_BATCH_SIZE = 4
OVERHEAD_RATE = 10.0
ROUNDS = 5
CLIENTS = 32
ONGOING = 8
"""max_ongoing_requests of the replicas in the experiment with the kill, so that their share in flight is bounded."""
RECOVERY_S = 90.0
STARTS = 3
"""Ray gives its own processes 30 s to start; on a machine with much else to do that may take more than one attempt."""
SWITCHES = ROOT / "deploy" / "ray" / "serve.env"
WORKERS = {
    "PYTHONPATH": str(ROOT),  # Ray's workers import from here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # workers that nobody asked for, while Ray itself has to start in time
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts processes slowly
}


class SlowRuntime(SimulatedRuntime):
    """A device of its own for each replica, slow enough to be the limit."""

    class _Device:
        def run(self, images: int) -> None:
            time.sleep(SLOW_BATCH_S + SLOW_IMAGE_S * images)

    def __init__(self) -> None:
        super().__init__()
        self._device = self._Device()


@dataclass(frozen=True)
class Loss:
    """What a killed replica cost. `later` counts requests that failed though they were sent after the kill."""

    in_flight: int
    failed_in_flight: int
    failed_later: int
    answered_before: int
    answered_after: int
    replaced_after_s: float


@dataclass
class Sent:
    """One request of the experiment with the kill, in time.monotonic() seconds."""

    at: float
    done: float = 0.0
    status: int = 0


def measure(url: str, pictures: list[Picture], **load: Any) -> Summary:
    """One run of load."""
    chosen = Load(**load)
    return summarise(asyncio.run(run_load(url, pictures, chosen)), chosen)


def run_application(replicas: int, open_runtime: Callable[[], SimulatedRuntime], **options: Any) -> Any:
    """Deploy and wait until every replica is ready. Returns Ray's handle."""
    from ray import serve

    from deploy.ray.app import make_application

    settings = Settings(decode_threads=1, max_batch_size=MAX_BATCH_SIZE, canary_seconds=0, log_level="warning", request_timeout_ms=20_000)
    app = make_application(settings, min_replicas=replicas, max_replicas=replicas, open_runtime=open_runtime, **options)
    return serve.run(app)


async def kill_under_load(url: str, handle: Any, picture: Picture, seconds: float) -> Loss:
    """Two replicas under a closed loop; one gets SIGKILL after a third of the time."""
    sent: list[Sent] = []
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=CLIENTS)) as client:
        clients = [asyncio.create_task(_ask_until(client, url, picture, end, sent)) for _ in range(2 * ONGOING)]
        await asyncio.sleep(seconds / 3)
        victim = (await handle.describe.remote())["pid"]
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        in_flight = [one for one in sent if not one.done]
        replaced = asyncio.create_task(_until_replaced(handle, victim, killed))
        await asyncio.gather(*clients)
    failed = [one for one in sent if one.status != 200]
    return Loss(
        in_flight=len(in_flight),
        failed_in_flight=sum(one.at <= killed for one in failed),
        failed_later=sum(one.at > killed for one in failed),
        answered_before=sum(one.status == 200 and one.done <= killed for one in sent),
        answered_after=sum(one.status == 200 and one.done > killed for one in sent),
        replaced_after_s=await replaced,
    )


async def _ask_until(client: httpx.AsyncClient, url: str, picture: Picture, end: float, sent: list[Sent]) -> None:
    while time.monotonic() < end:
        sent.append(one := Sent(time.monotonic()))
        try:
            one.status = (await client.post(url, content=picture.body, headers={"content-type": picture.content_type})).status_code
        except httpx.TransportError:
            one.status = -1
        one.done = time.monotonic()


async def _until_replaced(handle: Any, victim: int, killed: float) -> float:
    """Seconds until two other processes answer."""
    seen: set[int] = set()
    while len(seen - {victim}) < 2:
        if time.monotonic() > killed + RECOVERY_S:
            raise RuntimeError(f"the killed replica was not replaced within {RECOVERY_S:g} s")
        await asyncio.sleep(0.05)
        try:
            seen.add((await handle.describe.remote())["pid"])
        except Exception:  # noqa: S112  # the victim's own error while Ray notices
            continue
    return time.monotonic() - killed


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Ray on this machine with its HTTP front on a free port. Yields the address of /v1/detect."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    port = free_port()
    for attempt in range(STARTS):
        try:
            ray.init(num_cpus=4, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
            break
        except Exception:
            ray.shutdown()
            if attempt + 1 == STARTS:
                raise
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        yield f"http://127.0.0.1:{port}/v1/detect"
    finally:
        serve.shutdown()
        ray.shutdown()


def experiment(seconds: float) -> dict[str, Any]:
    """All three measurements with the switches of this process, as plain data."""
    import ray

    pictures = draw_pictures()
    with ray_cluster() as url:
        overhead = measure_overhead(url, pictures, seconds)
        throughput = {}
        for replicas in (1, 2):
            run_application(replicas, SlowRuntime)
            throughput[replicas] = measure(url, pictures, clients=(CLIENTS, CLIENTS), seconds=seconds).answered_per_s
        handle = run_application(2, partial(SlowRuntime), max_ongoing_requests=ONGOING)
        loss = asyncio.run(kill_under_load(url, handle, pictures[0], seconds))
    return {
        "ray": ray.__version__,
        "cpus": cpus(),
        "load_average_at_the_end": os.getloadavg()[0],
        "overhead": overhead,
        "answered_per_s": {str(replicas): rate for replicas, rate in throughput.items()},
        "speed_up_of_two": throughput[2] / throughput[1],
        "kill": {**asdict(loss), "max_ongoing_requests": ONGOING},
    }


def measure_overhead(url: str, pictures: list[Picture], seconds: float) -> dict[str, Any]:
    """One replica beside one process; and how often an answer carries a request's id."""
    run_application(1, SimulatedRuntime)
    answer = httpx.post(url, content=pictures[0].body, headers={"content-type": pictures[0].content_type}, timeout=30)
    with serving("ours", pictures[0]) as single:
        p50_ms = compare({"one process": single.url, "ray": url}, pictures, seconds)
    return {
        "p50_ms": p50_ms,
        "added_p50_ms": median(p50_ms["ray"]) - median(p50_ms["one process"]),
        "request_ids_in_an_answer": len(answer.headers.get_list("x-request-id")),
    }


def overhead_of_the_default_proxy(seconds: float) -> dict[str, Any]:
    """The same overhead with Ray as it comes, in a process of its own: Ray reads its switches when it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "overhead.json")
        command = [sys.executable, "-m", "benchmarks.ray_serve", "--seconds", str(seconds), "--json", str(file), "--default-proxy"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def switches() -> dict[str, str]:
    """What deploy/ray/serve.env sets."""
    lines = [line for line in SWITCHES.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def compare(urls: dict[str, str], pictures: list[Picture], seconds: float) -> dict[str, list[float]]:
    """p50 in ms of each server, in turns, so that what else the machine does falls on both."""
    p50_ms: dict[str, list[float]] = {name: [] for name in urls}
    for _ in range(ROUNDS):
        for name, url in urls.items():
            summary = measure(url, pictures, rate=(OVERHEAD_RATE, OVERHEAD_RATE), seconds=seconds / 2, warm_up_s=1.0)
            p50_ms[name].append(summary.latency_ms["p50"])
    return p50_ms


def main() -> int:
    """Measure and write."""
    parser = make_parser("ray_serve", __doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each run (default 20)")
    parser.add_argument("--default-proxy", action="store_true", help="only the overhead, without the switches of deploy/ray/serve.env")
    options = parser.parse_args()
    os.environ |= WORKERS
    if options.default_proxy:
        with ray_cluster() as url:
            found = measure_overhead(url, draw_pictures(), options.seconds)
    else:
        default = overhead_of_the_default_proxy(options.seconds)
        os.environ |= switches()
        found = {**experiment(options.seconds), "overhead_of_the_default_proxy": default}
    keep(found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
