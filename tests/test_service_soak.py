"""A long run with every kind of client and a reload every few seconds. SOAK_MINUTES sets its length, 30 by default."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
from service_fakes import picture
from service_onnx import write_model
from test_service_server import Process, service

from service.auth import make_key

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
RELOAD_EVERY_S = 3.0
PNG = {"content-type": "image/png"}
CLIENT_ERRORS = {400, 413, 415, 422}
MAX_GROWTH_MIB_PER_MINUTE = 0.5
ALLOCATOR_SLACK_MIB = 10.0


@dataclass
class Tally:
    """What came of a run."""

    good: Counter[int] = field(default_factory=Counter)
    bad: Counter[int] = field(default_factory=Counter)
    slow: Counter[int] = field(default_factory=Counter)
    reloads: Counter[int] = field(default_factory=Counter)
    vanished: int = 0
    latency_s: list[tuple[float, float]] = field(default_factory=list)
    resident_mib: list[tuple[float, float]] = field(default_factory=list)


def resident_mib(process: Process) -> float:
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


async def good_client(process, tally, end, seed):
    chance = random.Random(seed)
    async with httpx.AsyncClient(timeout=60) as client:
        while time.monotonic() < end:
            data = picture(chance.randrange(20, 500), chance.randrange(20, 500), kind=chance.choice(["PNG", "JPEG", "WEBP"]))
            started = time.monotonic()
            response = await client.post(process.url + "/v1/detect", content=data, headers=PNG)
            tally.good[response.status_code] += 1
            tally.latency_s.append((started, time.monotonic() - started))
            await asyncio.sleep(0.02)


async def bad_client(process, tally, end):
    chance = random.Random(1)
    async with httpx.AsyncClient(timeout=60) as client:
        while time.monotonic() < end:
            data = chance.choice([b"", b"text", picture()[: chance.randrange(1, 90)], chance.randbytes(500)])
            response = await client.post(process.url + "/v1/detect", content=data, headers=PNG)
            tally.bad[response.status_code] += 1
            await asyncio.sleep(0.05)


async def slow_client(process, tally, end):
    async def pieces():
        data = picture(300, 200)
        for at in range(0, len(data), 100):
            yield data[at : at + 100]
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(timeout=60) as client:
        while time.monotonic() < end:
            response = await client.post(process.url + "/v1/detect", content=pieces(), headers=PNG)
            tally.slow[response.status_code] += 1


async def vanishing_client(process, tally, end):
    data = picture(1000, 800)
    head = f"POST /v1/detect HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    while time.monotonic() < end:
        _, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(head + data[: random.randrange(len(data))] if tally.vanished % 2 else head + data)
        await writer.drain()
        writer.close()
        tally.vanished += 1
        await asyncio.sleep(0.1)


async def reloading_operator(process, tally, end, key):
    async with httpx.AsyncClient(timeout=60) as client:
        for number in range(10**9):
            if time.monotonic() >= end:
                return
            tally.resident_mib.append((time.monotonic(), resident_mib(process)))
            version = {"version": str(1 + number % 2)}
            response = await client.post(process.url + "/v1/models/blobs/load", json=version, headers={"x-api-key": key})
            tally.reloads[response.status_code] += 1
            await asyncio.sleep(RELOAD_EVERY_S)


async def soak(process: Process, seconds: float, key: str) -> Tally:
    tally, end = Tally(), time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for seed in range(4):
            group.create_task(good_client(process, tally, end, seed))
        for client in (bad_client, slow_client, vanishing_client):
            group.create_task(client(process, tally, end))
        group.create_task(reloading_operator(process, tally, end, key))
    return tally


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 300)
def test_nothing_wears_out(tmp_path):
    key, line = make_key("operator")
    (tmp_path / "admins").write_text(line)
    write_model(tmp_path / "repository", version="1")
    write_model(tmp_path / "repository", version="2", score=0.65)
    with service(tmp_path / "repository", admin_keys_file=tmp_path / "admins", max_batch_size=4) as process:
        tally = asyncio.run(soak(process, MINUTES * 60, key))
        print(tally.good, tally.bad, tally.slow, tally.reloads, tally.vanished, sep="\n")
        assert set(tally.good) == {200}
        assert set(tally.bad) <= CLIENT_ERRORS
        assert set(tally.slow) == {200}
        assert set(tally.reloads) == {200}
        check_memory(tally)
        check_latency(tally)
        assert process.stop() == 0


def check_memory(tally: Tally) -> None:
    """The second half's slope: the first one fills caches and the allocator's arenas."""
    half = tally.resident_mib[len(tally.resident_mib) // 2 :]
    times, sizes = np.array(half).T
    slope = float(np.polyfit((times - times[0]) / 60, sizes, 1)[0])
    growth = slope * (times[-1] - times[0]) / 60
    print(f"resident {sizes[0]:.0f} to {sizes[-1]:.0f} MiB, {slope:+.2f} MiB a minute")
    assert growth < ALLOCATOR_SLACK_MIB + MAX_GROWTH_MIB_PER_MINUTE * (times[-1] - times[0]) / 60


def check_latency(tally: Tally) -> None:
    third = len(tally.latency_s) // 3
    first, last = (statistics.median(seconds for _, seconds in part) for part in (tally.latency_s[:third], tally.latency_s[-third:]))
    print(f"median latency {first * 1e3:.1f} ms at first, {last * 1e3:.1f} ms at last")
    assert last < 2 * first + 0.01
