"""Work on a device's own thread between its batches, the gate for recordings, and both in a service that records CUDA graphs."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from service_fakes import WAIT_S, make_settings, picture, run, running, until
from service_onnx import write_model
from test_service_runtime import random_batch

from service.app import create_app
from service.batch_runner import Observer
from service.binding import BoundSession
from service.capture_gate import CAPTURES, CaptureGate
from service.device_errors import DeviceLost
from service.errors import Draining
from service.runtime import OUTPUTS, OnnxRuntime
from service.scheduler import Scheduler

PNG = {"content-type": "image/png"}


class Notebook:
    """What ran on each device: on which thread, of which session, and whether two things ran there at once."""

    def __init__(self):
        self.runs: list[tuple[int, int, str]] = []  # device, session, thread
        self.overlaps = 0
        self._busy = [threading.Lock(), threading.Lock()]

    def ran(self, device, session, work):
        free = self._busy[device].acquire(blocking=False)
        self.overlaps += not free
        try:
            self.runs.append((device, session, threading.current_thread().name))
            return work()
        finally:
            if free:
                self._busy[device].release()


class NotedSession:
    def __init__(self, session, device, notebook):
        self._session, self._device, self._notebook = session, device, notebook

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run_with_iobinding(self, binding, options):
        self._notebook.ran(self._device, id(self), lambda: self._session.run_with_iobinding(binding, options))


def recording_runtime(path, device, largest_batch, notebook, *, graphs):
    """A runtime on the CPU whose session is bound and told of as it would be on CUDA."""
    runtime = OnnxRuntime(path, provider="cpu", intra_op_threads=1)
    session = NotedSession(runtime._session, device, notebook)
    runtime._bound = BoundSession(session, OUTPUTS, "cpu", graphs=True, largest_batch=largest_batch)
    runtime.graphs, runtime.provider = graphs, "cuda"
    return runtime


async def flood(client, stop):
    statuses = []
    while not stop.is_set():
        statuses.append((await client.post("/v1/detect", content=picture(), headers=PNG)).status_code)
    return statuses


@pytest.mark.parametrize("graphs", [True, False])
def test_with_graphs_every_run_of_a_version_is_on_its_devices_thread_between_batches(tmp_path, monkeypatch, graphs):
    write_model(tmp_path)
    notebook = Notebook()
    monkeypatch.setattr(
        "service.app.open_onnx",
        lambda **_: lambda path, device, largest_batch: recording_runtime(path, device, largest_batch, notebook, graphs=graphs),
    )

    async def scenario():
        app = create_app(make_settings(model_repository=tmp_path, device_ids=("0", "1"), provider="cuda", cuda_graphs=graphs))
        async with running(app) as client:
            stop = asyncio.Event()
            clients = [asyncio.create_task(flood(client, stop)) for _ in range(6)]
            for version in ("2", "3"):
                write_model(tmp_path, version=version)
                await app.state.parts.repository.load("blobs")
            stop.set()
            assert {status for statuses in await asyncio.gather(*clients) for status in statuses} == {200}

    run(scenario())
    own = [thread == f"device-{device}" for device, _, thread in notebook.runs]
    assert len({session for _, session, _ in notebook.runs}) == 6
    if graphs:
        assert all(own)
        assert notebook.overlaps == 0
    else:  # nothing is recorded: the version that serves is not held up
        assert any(own)
        assert not all(own)


def scheduled(test, **options):
    async def scenario():
        scheduler = Scheduler(max_queue_images=8, max_queue_bytes=1 << 20, **options)
        scheduler.start()
        try:
            async with asyncio.timeout(WAIT_S):
                await test(scheduler)
        finally:
            await scheduler.close(grace_s=WAIT_S)

    run(scenario())


def test_a_call_waits_for_the_batch_that_runs_and_a_batch_for_the_call():
    order, begun, gate = [], threading.Event(), threading.Event()

    def batch(device, items):
        begun.set()
        assert gate.wait(WAIT_S)
        order.append(("batch", threading.current_thread().name))
        return items

    async def test(scheduler):
        scheduler.add_lane("a", batch, costs={1: 0.01}, max_batch_size=1)
        first = scheduler.submit("a", 1)
        assert await asyncio.to_thread(begun.wait, WAIT_S)
        call = asyncio.create_task(asyncio.to_thread(scheduler.place(0), lambda: order.append(("call", threading.current_thread().name))))
        await until(lambda: bool(scheduler._calls._waiting.get(0)))
        second = scheduler.submit("a", 2)
        gate.set()
        await asyncio.gather(first, call, second)
        assert order == [("batch", "device-0"), ("call", "device-0"), ("batch", "device-0")]

    scheduled(test)


def test_a_call_gives_its_result_or_its_error_and_the_device_goes_on():
    async def test(scheduler):
        assert await asyncio.to_thread(scheduler.place(1), lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(scheduler.place(1), lambda: 1 // 0)
        assert await asyncio.to_thread(scheduler.place(1), lambda: 8) == 8

    scheduled(test, devices=2)


def test_a_device_that_is_lost_in_a_call_is_lost_and_tells_those_that_wait():
    lost: asyncio.Queue[int] = asyncio.Queue()
    begun, gate = threading.Event(), threading.Event()

    def die():
        begun.set()
        assert gate.wait(WAIT_S)
        raise DeviceLost("CUDA failure 700")

    async def test(scheduler):
        dying = asyncio.create_task(asyncio.to_thread(scheduler.place(0), die))
        assert await asyncio.to_thread(begun.wait, WAIT_S)
        waiting = asyncio.create_task(asyncio.to_thread(scheduler.place(0), list))
        await until(lambda: bool(scheduler._calls._waiting.get(0)))
        gate.set()
        for task in (dying, waiting, asyncio.create_task(asyncio.to_thread(scheduler.place(0), list))):
            with pytest.raises(DeviceLost):
                await task
        assert await lost.get() == 0
        assert await asyncio.to_thread(scheduler.place(1), lambda: 7) == 7

    scheduled(test, devices=2, on_device_lost=lambda device, error, left: lost.put_nowait(device))


def test_a_call_that_hangs_is_seen_by_the_watchdog_and_closing_refuses_those_behind_it():
    begun, gate = threading.Event(), threading.Event()
    now = [0.0]

    def hang():
        begun.set()
        assert gate.wait(WAIT_S)

    async def test(scheduler):
        hanging = asyncio.create_task(asyncio.to_thread(scheduler.place(0), hang))
        assert await asyncio.to_thread(begun.wait, WAIT_S)
        behind = asyncio.create_task(asyncio.to_thread(scheduler.place(0), list))
        await until(lambda: bool(scheduler._calls._waiting.get(0)))
        now[0] = 61.0
        assert scheduler.snapshot().longest_run_s == 61.0
        closing = asyncio.create_task(scheduler.close(grace_s=WAIT_S))
        with pytest.raises(Draining):
            await behind
        gate.set()
        assert await closing
        await hanging
        with pytest.raises(Draining):
            scheduler.place(0)(list)

    scheduled(test, observer=Observer(), clock=lambda: now[0])


def test_who_records_is_alone_and_the_others_are_not():
    gate, met = CaptureGate(), threading.Barrier(2, timeout=WAIT_S)
    inside, entered, leave = [], threading.Event(), threading.Event()

    def other():
        with gate.beside(), gate.beside():  # a second pass of the same thread is none
            inside.append("other")
            met.wait()  # both at once
            entered.set()
            assert leave.wait(WAIT_S)
            inside.remove("other")

    def record():
        with gate.alone(), gate.beside():
            assert inside == []
            inside.append("recording")
            inside.remove("recording")

    def late():
        with gate.beside():
            assert "recording" not in inside

    with ThreadPoolExecutor(6) as threads:
        first = [threads.submit(other) for _ in range(2)]
        assert entered.wait(WAIT_S)
        recordings = [threads.submit(record) for _ in range(2)]
        last = threads.submit(late)
        leave.set()
        for future in (*first, *recordings, last):
            future.result(WAIT_S)


@pytest.mark.parametrize("outer", ["beside", "alone"])
def test_a_recording_within_a_pass_is_refused_instead_of_waiting_for_itself(outer):
    gate, refused, free = CaptureGate(), threading.Event(), threading.Event()

    def nested():
        with getattr(gate, outer)():
            with pytest.raises(RuntimeError, match="outside of any pass"), gate.alone():
                pass
            refused.set()
        with gate.alone():  # it left the gate as it was
            free.set()

    threading.Thread(target=nested, daemon=True).start()  # left behind if it hangs
    assert refused.wait(WAIT_S)
    assert free.wait(WAIT_S)


def test_a_runtime_records_alone_and_replays_beside_others(tmp_path):
    runtime = recording_runtime(write_model(tmp_path), 0, 4, Notebook(), graphs=True)
    batch = random_batch((3, 96, 160))
    with ThreadPoolExecutor(1) as thread:
        with CAPTURES.beside():
            recording = thread.submit(runtime.run, *batch)
            with pytest.raises(TimeoutError):
                recording.result(0.2)  # the first run of a shape waits for everybody else
        recording.result(WAIT_S)
        with CAPTURES.beside():
            thread.submit(runtime.run, *random_batch((4, 96, 160))).result(WAIT_S)  # the same shape, filled up


def test_a_shape_whose_first_run_failed_is_recorded_anew(tmp_path):
    runtime = recording_runtime(write_model(tmp_path), 0, 4, Notebook(), graphs=True)
    bound, images, sizes_hw = runtime._bound, *random_batch((2, 96, 160))
    with pytest.raises(RuntimeError, match="size of the OrtValue"):
        bound.run(images, sizes_hw[:1])
    assert bound.records(images.shape)
    assert bound.shapes == []
    bound.run(images, sizes_hw)
    assert not bound.records(images.shape)
