"""What must hold when the machine does not: devices that fail, hang or run full, disks that are full, clocks that jump."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from service_fakes import WAIT_S, FakeRuntime, fake_service, make_manifest, make_settings, picture, run, running, sample, until
from service_onnx import write_model
from test_service_server import ROOT, environment, free_port, service

from service.app import create_app
from service.batch_runner import FAILURES_BEFORE_DOUBT
from service.device_errors import DeviceLost, DeviceOutOfMemory
from service.errors import InferenceFailed
from service.manifest import InputSpec
from service.protocol import make_protocol
from service.settings import Settings

PNG = {"content-type": "image/png"}


def one_bucket_runtime(seconds: float = 0.005) -> FakeRuntime:
    return FakeRuntime(make_manifest(input=InputSpec(short_side=96, long_side=160, buckets=[(160, 160)])), seconds=seconds)


async def ask(client, data=None, **query):
    return await client.post("/v1/detect", content=data or picture(), headers=PNG, params=query)


async def hold_one(client, app, runtime, waiting):
    """One request on the device and `waiting` behind it, so that the next batch is large. Returns their tasks."""
    runtime.gate.clear()
    while runtime.entered.acquire(blocking=False):
        pass
    tasks = [asyncio.create_task(ask(client))]
    await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
    tasks += [asyncio.create_task(ask(client)) for _ in range(waiting)]
    await until(lambda: app.state.parts.scheduler.snapshot().waiting_images == waiting)
    return tasks


def test_out_of_memory_splits_the_batch_lowers_the_limit_and_loses_nobody():
    def only_two_fit(images):
        if len(images) > 2:
            raise DeviceOutOfMemory("Failed to allocate memory for requested buffer")

    async def scenario():
        async with fake_service(one_bucket_runtime()) as (client, app, runtime):
            runtime.before_run = only_two_fit
            for expected_errors in (1, 1):  # the second flood is never tried in one batch
                tasks = await hold_one(client, app, runtime, 4)
                runtime.gate.set()
                assert [(await task).status_code for task in tasks] == [200] * 5
                assert sample(app, "detector_device_errors_total", kind="out_of_memory") == expected_errors
            assert max(runtime.batch_sizes) == 2

    run(scenario())


def test_each_failed_run_is_counted_once_by_what_it_failed_of():
    def full(images):
        raise DeviceOutOfMemory("CUDA failure 2: out of memory")

    async def scenario():
        async with fake_service(one_bucket_runtime()) as (client, app, runtime):

            def counts():
                return [int(sample(app, "detector_device_errors_total", kind=kind)) for kind in ("out_of_memory", "other")]

            runtime.before_run = full
            assert (await ask(client)).status_code == 500
            assert counts() == [1, 0]
            runtime.before_run = lambda images: None
            tasks = await hold_one(client, app, runtime, 2)
            runtime.before_run = full
            runtime.gate.set()
            assert [(await task).status_code for task in tasks] == [200, 500, 500]
            assert counts() == [4, 0]  # the two together, then each alone

    run(scenario())


def test_a_device_on_which_nothing_works_any_more_is_lost_whatever_it_says():
    def broken(images):
        raise InferenceFailed("words that nobody knows")

    async def scenario():
        async with fake_service(one_bucket_runtime()) as (client, app, runtime):
            runtime.before_run = broken
            statuses = [(await ask(client)).status_code for _ in range(FAILURES_BEFORE_DOUBT)]
            assert statuses == [500] * (FAILURES_BEFORE_DOUBT - 1) + [503]
            await asyncio.wait_for(app.state.parts.health.ended.wait(), WAIT_S)
            assert app.state.parts.health.exit_code == 4
            assert "one that is known to work: words that nobody knows" in app.state.parts.health.failure

    run(scenario())


def test_many_bad_pictures_in_a_row_lose_no_device():
    def refuse_red(images):
        if images[0, 0, 0].tolist() == [220, 30, 30]:
            raise InferenceFailed("a picture that breaks the graph")

    async def scenario():
        async with fake_service(one_bucket_runtime()) as (client, app, runtime):
            runtime.before_run = refuse_red
            assert {(await ask(client)).status_code for _ in range(3 * FAILURES_BEFORE_DOUBT)} == {500}
            assert (await ask(client, picture(colour=(30, 30, 220)))).status_code == 200
            assert sample(app, "detector_device_errors_total", kind="lost") == 0

    run(scenario())


def test_a_lost_device_answers_everyone_and_ends_the_service():
    def lose(images):
        raise DeviceLost("CUDA failure 700")

    async def scenario():
        async with fake_service(one_bucket_runtime()) as (client, app, runtime):
            tasks = await hold_one(client, app, runtime, 3)
            runtime.before_run = lose
            runtime.gate.set()
            statuses = sorted([(await task).status_code for task in tasks])
            assert statuses == [200, 503, 503, 503]
            await asyncio.wait_for(app.state.parts.health.ended.wait(), WAIT_S)
            assert app.state.parts.health.exit_code == 4
            assert (await client.get("/readyz")).status_code == 503
            later = await ask(client)
            assert (later.status_code, "retry-after" in later.headers) == (503, True)
            assert sample(app, "detector_device_errors_total", kind="lost") == 1

    run(scenario())


def test_a_device_that_is_lost_in_the_warm_up_is_no_missing_model():
    def lose(images):
        raise DeviceLost("CUDA failure 700")

    async def scenario():
        runtime = one_bucket_runtime()
        runtime.before_run = lose
        app = create_app(make_settings(), runtime=runtime)
        async with running(app, ready=False):
            await asyncio.wait_for(app.state.parts.health.ended.wait(), WAIT_S)
            assert app.state.parts.health.exit_code == 4

    run(scenario())


def test_a_hung_device_makes_unready_and_requests_get_their_deadline():
    async def scenario():
        async with fake_service(watchdog_seconds=1, request_timeout_ms=300) as (client, app, runtime):
            runtime.gate.clear()
            late = await ask(client)
            assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
            await asyncio.wait_for(app.state.parts.health.ended.wait(), WAIT_S)
            assert app.state.parts.health.exit_code == 5
            assert "has been running" in (await client.get("/readyz")).json()["detail"]
            runtime.gate.set()

    run(scenario())


@pytest.mark.parametrize(("how", "code"), [("hang", 5), ("lost", 4)])
def test_the_process_ends_with_a_code_of_its_own(how, code):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("service_chaos.py")), str(port), how],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT_S
        while not answers(url + "/readyz"):
            assert time.monotonic() < end
            time.sleep(0.02)
        assert httpx.post(url + "/v1/detect", content=picture(90, 60), headers=PNG).status_code == 200
        try:
            assert httpx.post(url + "/v1/detect", content=picture(60, 90), headers=PNG, timeout=WAIT_S).status_code in (503, 504)
        except httpx.TransportError:
            assert how == "hang"  # the answer that never came; the process is gone
        assert process.wait(WAIT_S) == code
        assert process.stderr is not None
        records = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert any(record.get("exit_code") == code for record in records)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_under_the_log_stops_nobody(tmp_path):
    write_model(tmp_path)
    settings = {"host": "127.0.0.1", "port": free_port(), "model_repository": tmp_path, "drain_seconds": 0, "access_log": True}
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=environment(**settings), stderr=full, stdout=full)
    try:
        url, end = f"http://127.0.0.1:{settings['port']}", time.monotonic() + WAIT_S
        while not answers(url + "/readyz"):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.02)
        for _ in range(5):
            assert httpx.post(url + "/v1/detect", content=picture(), headers=PNG).status_code == 200
        process.terminate()
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


def test_a_jumping_clock_moves_no_deadline(monkeypatch):
    real, jump = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (3600 if next(jump) % 2 else -3600))

    async def scenario():
        async with fake_service(canary_seconds=5) as (client, app, _):
            for _ in range(5):
                response = await ask(client, timeout_ms=5000)
                assert response.status_code == 200
                assert 0 <= response.json()["timing_ms"]["total"] < 5000
            assert (await client.get("/readyz")).status_code == 200
            assert sample(app, "detector_http_request_duration_seconds_sum", route="/v1/detect", method="POST", status="200") < 25

    run(scenario())


def test_a_model_file_replaced_by_garbage_under_a_running_process(tmp_path):
    path = write_model(tmp_path)
    with service(tmp_path) as process:
        path.write_bytes(b"garbage" * 1000)
        assert httpx.post(process.url + "/v1/detect", content=picture(), headers=PNG).status_code == 200
        assert process.stop() == 0


def test_a_client_that_never_reads_is_cut_after_a_while(monkeypatch):
    cut = []

    class Transport:
        def is_closing(self):
            return False

        def close(self):
            cut.append("closed")

        def abort(self):
            cut.append("aborted")

    protocol_class = make_protocol(Settings(body_timeout_ms=100))
    protocol = protocol_class.__new__(protocol_class)
    later = []
    protocol.transport = Transport()
    protocol.loop = type("Loop", (), {"call_later": staticmethod(lambda delay, call: later.append((delay, call)))})
    protocol.timeout_keep_alive_handler()
    assert cut == ["closed"]
    ((delay, call),) = later
    call()
    assert (delay, cut) == (0.1, ["closed", "aborted"])


def test_one_of_two_lost_devices_is_left_behind_and_the_second_ends_the_service(tmp_path):
    write_model(tmp_path)

    def lose(images, image_sizes_hw):
        raise DeviceLost("CUDA failure 700")

    async def scenario():
        app = create_app(make_settings(model_repository=tmp_path, device_ids=("0", "1"), canary_seconds=0))
        async with running(app) as client:
            parts = app.state.parts
            repository, health = parts.repository, parts.health
            assert sample(app, "detector_devices") == 2
            repository.resolve(None).loaded.runtimes[0].run = lose
            statuses = []
            while sample(app, "detector_devices") == 2:  # until the device with the fault has taken a batch
                statuses.append((await ask(client)).status_code)
            assert (statuses[-1], set(statuses[:-1]) <= {200}) == (503, True)
            assert [(await ask(client)).status_code for _ in range(10)] == [200] * 10
            assert (await client.get("/readyz")).status_code == 200
            assert sample(app, "detector_device_errors_total", kind="lost") == 1
            reloaded = await repository.load("blobs")
            assert list(reloaded.loaded.runtimes) == [1]  # no session is opened on the lost one
            assert [(await ask(client)).status_code for _ in range(3)] == [200] * 3
            reloaded.loaded.runtimes[1].run = lose
            assert (await ask(client)).status_code == 503
            await asyncio.wait_for(health.ended.wait(), WAIT_S)
            assert (health.exit_code, sample(app, "detector_devices")) == (4, 0)

    run(scenario())
