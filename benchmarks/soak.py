"""A long run with every kind of client and a reload every few seconds: `python -m benchmarks.soak --minutes 30 --json FILE --plot FILE`.

The real service with default settings and the bundled model, as versions 1 and 2 of one name. Good clients post pictures of all sizes and
kinds, one by one and in batches, plain and compressed; bad ones post what is no picture; slow ones send a piece at a time; vanishing ones
hang up. Nothing may fail that is not the client's fault, resident memory must not grow and latency must not rise. Clients pause between
requests: it is endurance that is looked at, not throughput. Ctrl-C ends early, with the report.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.figures import cpus, make_parser
from benchmarks.footprint import resident_bytes
from benchmarks.live import ROOT, Service
from benchmarks.reloads import VERSIONS, retired, two_versions
from benchmarks.soak_report import draw_report, summary

SETTINGS = {"drain_seconds": 0}
TIMEOUT_S = 60.0
RELOAD_EVERY_S = 5.0
PROGRESS_EVERY_S = 30.0
GOOD_CLIENTS = 3
PICTURES = 40
GOOD_PAUSE_S, BAD_PAUSE_S, VANISHED_PAUSE_S = 0.05, 0.1, 0.2
SIDES = (20, 1200)
"""Shortest and longest side of a good picture."""
PIECES, PIECE_BYTES, PIECE_PAUSE_S = 40, 1000, 0.05
OCTETS = {"content-type": "application/octet-stream"}


@dataclass
class Tally:
    """What came of a run. Moments are seconds since its start."""

    answers: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in ("good", "bad", "slow", "reload")})
    """Statuses, or the kind of transport error, by kind of client."""
    vanished: int = 0
    latency_s: list[tuple[float, float]] = field(default_factory=list)
    """(moment, seconds) of every good client's single picture."""
    resident_mb: list[tuple[float, float]] = field(default_factory=list)
    """(moment, MB) after each reload, with the new version alone."""


@dataclass
class Run:
    """One soak: whom it is for, and when it ends."""

    service: Service
    name: str
    key: str
    seconds: float
    pictures: Sequence[bytes]
    """What good clients post."""
    tally: Tally = field(default_factory=Tally)
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False

    @property
    def moment(self) -> float:
        return time.monotonic() - self.started

    @property
    def over(self) -> bool:
        return self.stopped or self.moment >= self.seconds

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.service.url, timeout=TIMEOUT_S, **options)

    async def post(self, kind: str, client: httpx.AsyncClient, path: str = "/v1/detect", **request: Any) -> None:
        """One request whose outcome is counted."""
        try:
            self.tally.answers[kind][str((await client.post(path, **request)).status_code)] += 1
        except httpx.TransportError as error:
            self.tally.answers[kind][type(error).__name__] += 1
            await asyncio.sleep(BAD_PAUSE_S)  # a dead service must not be called in a busy loop


def encode_picture(chance: random.Random) -> bytes:
    """A picture of any size, JPEG, PNG or WebP."""
    height, width = (chance.randint(*SIDES) for _ in range(2))
    coarse = np.random.default_rng(chance.getrandbits(32)).integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(buffer, chance.choice(["JPEG", "PNG", "WEBP"]))
    return buffer.getvalue()


async def good_client(run: Run, seed: int) -> None:
    """Pictures that must be answered: mostly one by one, at times compressed or as a batch."""
    chance, pictures = random.Random(seed), run.pictures
    async with run.client() as client:
        while not run.over:
            data, way = chance.choice(pictures), chance.random()
            started = time.monotonic()
            if way < 0.1:
                await run.post("good", client, "/v1/detect/batch", files=[("images", picture) for picture in chance.sample(pictures, 3)])
            elif way < 0.2:
                await run.post("good", client, content=gzip.compress(data), headers={**OCTETS, "content-encoding": "gzip"})
            else:
                await run.post("good", client, content=data, headers=OCTETS)
                run.tally.latency_s.append((run.moment, time.monotonic() - started))
            await asyncio.sleep(GOOD_PAUSE_S)


async def bad_client(run: Run) -> None:
    """What is no picture, or not all of one."""
    chance = random.Random(1)
    picture = encode_picture(chance)
    async with run.client() as client:
        while not run.over:
            data = chance.choice([b"", b"text", picture[: chance.randrange(1, 90)], chance.randbytes(500)])
            await run.post("bad", client, content=data, headers=OCTETS)
            await asyncio.sleep(BAD_PAUSE_S)


async def slow_client(run: Run) -> None:
    """A good picture, a piece at a time."""
    data = encode_picture(random.Random(2))[: PIECE_BYTES * PIECES]

    async def pieces() -> Any:
        for at in range(0, len(data), PIECE_BYTES):
            yield data[at : at + PIECE_BYTES]
            await asyncio.sleep(PIECE_PAUSE_S)

    async with run.client() as client:
        while not run.over:
            await run.post("slow", client, content=pieces(), headers=OCTETS)


async def vanishing_client(run: Run) -> None:
    """Hangs up in the middle of its body, or while it is answered."""
    chance = random.Random(3)
    data = encode_picture(chance)
    head = f"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    while not run.over:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", run.service.port)
            writer.write(head + (data[: chance.randrange(len(data))] if run.tally.vanished % 2 else data))
            await writer.drain()
            writer.close()
            run.tally.vanished += 1
        except OSError:
            pass  # the good clients will say that nobody answers
        await asyncio.sleep(VANISHED_PAUSE_S)


async def operator(run: Run) -> None:
    """Loads the versions in turns, and looks at the memory when the old one is gone."""
    number = 0
    async with run.client(headers={"x-api-key": run.key}) as client:
        while not run.over:
            await run.post("reload", client, f"/v1/models/{run.name}/load", json={"version": VERSIONS[number % len(VERSIONS)]})
            await retired(client)
            run.tally.resident_mb.append((run.moment, resident_bytes(run.service.process.pid) / 1e6))
            number += 1
            await asyncio.sleep(min(RELOAD_EVERY_S, max(0.0, run.seconds - run.moment)))


async def report_progress(run: Run, write: Callable[[str], None]) -> None:
    """A line now and then, so that nobody has to wait for the end to see a fault."""
    while not run.over:
        await asyncio.sleep(min(PROGRESS_EVERY_S, max(0.0, run.seconds - run.moment)))
        tally = run.tally
        recent = [seconds for moment, seconds in tally.latency_s if moment > run.moment - PROGRESS_EVERY_S]
        p50 = f"{np.median(recent) * 1e3:.0f} ms" if recent else "-"
        resident = f"{tally.resident_mb[-1][1]:.0f} MB" if tally.resident_mb else "-"
        counts = ", ".join(f"{kind} {dict(counter)}" for kind, counter in tally.answers.items())
        write(f"{run.moment / 60:5.1f} of {run.seconds / 60:g} min: p50 {p50}, resident {resident}, {counts}, vanished {tally.vanished}")


async def soak(run: Run, write: Callable[[str], None]) -> None:
    """All clients at once, to the end of the run."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: setattr(run, "stopped", True))
    async with asyncio.TaskGroup() as group:
        for seed in range(GOOD_CLIENTS):
            group.create_task(good_client(run, seed))
        for work in (bad_client(run), slow_client(run), vanishing_client(run), operator(run)):
            group.create_task(work)
        progress = asyncio.create_task(report_progress(run, write))
    progress.cancel()


def measure(repository: Path, minutes: float, write: Callable[[str], None] = print) -> dict[str, Any]:
    """The whole experiment, as plain data."""
    chance = random.Random(0)
    pictures = [encode_picture(chance) for _ in range(PICTURES)]
    with two_versions(repository, **SETTINGS) as (service, name, key):
        run = Run(service, name, key, minutes * 60, pictures)
        asyncio.run(soak(run, write))
        seconds, exit_code = run.moment, service.stop()
    tally = run.tally
    setup = {"model": name, "minutes": round(seconds / 60, 2), "cpus": cpus(), "exit_code": exit_code}
    return setup | summary(tally.answers, tally.vanished, tally.latency_s, tally.resident_mb)


def main() -> int:
    """Measure and write. Returns 1 if anything failed, grew or slowed down."""
    parser = make_parser("soak", __doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", help="model to serve (default: the bundled demo)")
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    parser.add_argument("--minutes", type=float, default=minutes, help="how long (default SOAK_MINUTES, else 30)")
    parser.add_argument("--plot", type=Path, help="where to draw memory and latency over the run")
    options = parser.parse_args()
    found = measure(options.repository, options.minutes, lambda line: print(line, flush=True))
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")
    if options.plot:
        draw_report(found, options.plot)
    print(json.dumps({key: value for key, value in found.items() if key != "series"}, indent=1))
    return 0 if not found["faults"] and found["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
