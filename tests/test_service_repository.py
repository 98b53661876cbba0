from __future__ import annotations

import asyncio
import re
import shutil
import threading
from pathlib import Path

import pytest
from service_fakes import WAIT_S, make_settings, picture, run, running, sample, until
from service_onnx import write_model

from service.app import create_app
from service.device_calls import here
from service.errors import Draining, LoadFailed, ModelNotFound, NotReady
from service.loading import Loader, NoModel, find_models, parse_reference, require_models
from service.runtime import DeviceLost, OnnxRuntime, RuntimeLoadError

PNG = {"content-type": "image/png"}


def app_on(root, **settings):
    return create_app(make_settings(model_repository=root, provider="cpu", intra_op_threads=1, max_batch_size=2, **settings))


async def versions_that_answer(client, **query) -> str:
    response = await client.post("/v1/detect", content=picture(), headers=PNG, params=query)
    assert response.status_code == 200, response.text
    return response.json()["model"]["name"] + "@" + response.json()["model"]["version"]


def spoil(path):
    path.write_bytes(b"no model at all" * 50)


def test_only_folders_that_look_like_versions_count(tmp_path):
    for version in ("2", "10", "1"):
        write_model(tmp_path, version=version)
    write_model(tmp_path, name="cells")
    for other in ("blobs/latest", "blobs/0", "blobs/-1", "Blobs/1", ".git/1", "empty/1"):
        (tmp_path / other).mkdir(parents=True)
    (tmp_path / "README.md").write_text("hello")
    assert find_models(tmp_path) == {"blobs": ["10", "2", "1"], "cells": ["1"]}


@pytest.mark.parametrize("text", ["", "../etc", "a/b", "A", "a@", "a@0", "a@x", "a@1@2", "a" * 70, "a@" + "9" * 30])
def test_references_that_are_none(text):
    with pytest.raises(ValueError, match="is not `name` or `name@version`"):
        parse_reference(text)


def test_what_to_serve_is_checked_before_anything_loads(tmp_path):
    with pytest.raises(NoModel, match="python -m export CHECKPOINT"):
        require_models(tmp_path, ())
    write_model(tmp_path)
    assert require_models(tmp_path, ()) == [("blobs", None)]
    assert require_models(tmp_path, ("blobs@1",)) == [("blobs", "1")]
    with pytest.raises(NoModel, match="holds blobs@1"):
        require_models(tmp_path, ("blobs@2",))


def test_the_newest_valid_version_serves(tmp_path):
    write_model(tmp_path, version="1")
    write_model(tmp_path, version="2")
    spoil(write_model(tmp_path, version="10"))
    write_model(tmp_path, version="11", golden_score=0.1)  # answers its golden image differently

    async def scenario():
        app = app_on(tmp_path)
        async with running(app) as client:
            assert await versions_that_answer(client) == "blobs@2"
            model = (await client.get("/v1/models/blobs")).json()
            assert model["versions_on_disk"] == ["11", "10", "2", "1"]
            assert len(model["versions"][0]["sha256"]) == 64
            labels = {"model": "blobs", "version": "2", "sha256": model["versions"][0]["sha256"], "provider": "cpu"}
            assert sample(app, "detector_model_info", **labels) == 1

    run(scenario())


def test_a_version_that_opens_and_cannot_run_is_passed_over_and_closed(tmp_path, caplog):
    write_model(tmp_path, version="1")
    write_model(tmp_path, version="2", runs=False)
    opened = []

    def open_runtime(path, device, largest_batch):
        opened.append(OnnxRuntime(path, provider="cpu", intra_op_threads=1))
        return opened[-1]

    loader = Loader(tmp_path, open_runtime, devices=[0], max_batch_size=2)
    loaded = loader.load_newest("blobs", lambda index: here)
    assert loaded.version == "1"
    assert [runtime._session is None for runtime in opened] == [True, False]
    assert re.search(r"version 2 is not served: .*blobs/2/model.onnx: it cannot run: .*Reshape", caplog.text)
    assert "send it once more" not in caplog.text  # that is for who sent an image
    loaded.close()


@pytest.mark.parametrize("where", ["run", "trim"])
def test_whatever_a_runtime_raises_makes_its_version_one_that_cannot_run(tmp_path, where):
    path = write_model(tmp_path)
    runtime = OnnxRuntime(path, provider="cpu", intra_op_threads=1)

    def fail(*_):
        raise ValueError("Fail: the arena is in two minds\nand a second line")

    setattr(runtime, where, fail)
    with pytest.raises(RuntimeLoadError, match=r"model.onnx: it cannot run: Fail: the arena is in two minds$"):
        Loader(tmp_path, lambda *_: runtime, devices=[0], max_batch_size=2).load("blobs", "1", lambda index: here)
    assert runtime._session is None


@pytest.mark.parametrize("error", [DeviceLost("off the bus"), Draining("stopping"), NotReady("no device")])
def test_what_no_other_version_would_mend_ends_the_load(tmp_path, error):
    write_model(tmp_path, version="1")
    write_model(tmp_path, version="2")
    opened = []

    def open_runtime(path, device, largest_batch):
        opened.append(OnnxRuntime(path, provider="cpu", intra_op_threads=1))
        opened[-1].run = fail
        return opened[-1]

    def fail(*_):
        raise error

    with pytest.raises(type(error)):
        Loader(tmp_path, open_runtime, devices=[0], max_batch_size=2).load_newest("blobs", lambda index: here)
    assert [runtime._session for runtime in opened] == [None]


def test_a_device_that_is_lost_in_a_warm_up_still_ends_the_process(tmp_path, monkeypatch):
    write_model(tmp_path, version="1")
    write_model(tmp_path, version="2")

    def lost(*_):
        raise DeviceLost("CUDA failure 700: an illegal memory access was encountered")

    monkeypatch.setattr(OnnxRuntime, "run", lost)

    async def scenario():
        app = app_on(tmp_path)
        async with running(app, ready=False):
            await asyncio.wait_for(app.state.parts.health.ended.wait(), WAIT_S)
            assert app.state.parts.health.exit_code == 4

    run(scenario())


def test_without_a_valid_version_the_service_says_why_and_wants_to_end(tmp_path):
    spoil(write_model(tmp_path))

    async def scenario():
        app = app_on(tmp_path)
        async with running(app, ready=False) as client:
            await asyncio.wait_for(app.state.parts.health.ended.wait(), WAIT_S)
            assert app.state.parts.health.exit_code == 3
            response = await client.get("/readyz")
            assert response.status_code == 503
            assert "cannot open it" in response.json()["detail"]
            assert (await client.get("/healthz")).status_code == 200
            refused = await client.post("/v1/detect", content=picture(), headers=PNG)
            assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
            assert "retry-after" in refused.headers

    run(scenario())


def test_two_models_and_a_pinned_version_side_by_side(tmp_path):
    write_model(tmp_path, version="1", score=0.5)
    write_model(tmp_path, version="2")
    write_model(tmp_path, name="cells", class_names=["a", "b", "c"])

    async def scenario():
        async with running(app_on(tmp_path, model=("blobs", "blobs@1", "cells"))) as client:
            assert await versions_that_answer(client) == "blobs@2"
            assert await versions_that_answer(client, model="cells") == "cells@1"
            assert await versions_that_answer(client, model="blobs@1") == "blobs@1"
            assert await versions_that_answer(client, model="blobs@2") == "blobs@2"
            missing = await client.post("/v1/detect?model=blob", content=picture(), headers=PNG)
            assert (missing.status_code, "did you mean 'blobs'" in missing.json()["detail"]) == (404, True)
            states = [(v["version"], v["state"]) for v in (await client.get("/v1/models/blobs")).json()["versions"]]
            assert states == [("2", "active"), ("1", "pinned")]

    run(scenario())


def test_load_swaps_and_the_old_version_gives_its_memory_back(tmp_path):
    write_model(tmp_path, version="1")

    async def scenario():
        app = app_on(tmp_path)
        repository = app.state.parts.repository
        async with running(app) as client:
            old = repository.resolve(None)
            write_model(tmp_path, version="2")
            new = await repository.load("blobs")
            assert (new.version, await versions_that_answer(client)) == ("2", "blobs@2")
            gone = {"model": "blobs", "version": "1", "sha256": old.loaded.sha256, "provider": "cpu"}
            await until(lambda: app.state.parts.metrics.registry.get_sample_value("detector_model_info", gone) is None)
            assert old.loaded.runtimes[0]._session is None  # closed before it leaves the metrics
            assert sample(app, "detector_reloads_total", outcome="ok") == 1

    run(scenario())


def test_in_flight_requests_finish_on_the_old_version(tmp_path):
    write_model(tmp_path, version="1")

    async def scenario():
        app = app_on(tmp_path)
        repository = app.state.parts.repository
        async with running(app) as client:
            old, gate, entered = repository.resolve(None), threading.Event(), threading.Event()
            session_run = old.loaded.runtimes[0].run

            def held(images, sizes_hw):
                entered.set()
                assert gate.wait(WAIT_S)
                return session_run(images, sizes_hw)

            old.loaded.runtimes[0].run = held
            in_flight = [asyncio.create_task(versions_that_answer(client)) for _ in range(5)]
            await asyncio.to_thread(entered.wait, WAIT_S)
            write_model(tmp_path, version="2")
            await repository.load("blobs")
            assert old.loaded.runtimes[0]._session is not None
            gate.set()
            assert set(await asyncio.gather(*in_flight)) == {"blobs@1"}
            assert await versions_that_answer(client) == "blobs@2"
            await until(lambda: old.loaded.runtimes[0]._session is None)

    run(scenario())


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (spoil, "cannot open it"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "model.onnx"),
        (lambda path: path.write_bytes(b""), "cannot open it"),
        (lambda path: write_model(path.parents[2], version="2", golden_score=0.2), "golden image 0"),
        (lambda path: write_model(path.parents[2], version="2", runs=False), "model.onnx: it cannot run: "),
    ],
)
def test_a_failing_load_leaves_the_old_version_and_says_why(tmp_path, break_it, words):
    write_model(tmp_path, version="1")

    async def scenario():
        app = app_on(tmp_path)
        async with running(app) as client:
            break_it(write_model(tmp_path, version="2"))
            with pytest.raises(LoadFailed, match="blobs@1 still serves") as caught:
                await app.state.parts.repository.load("blobs", "2")
            assert words in caught.value.detail
            assert await versions_that_answer(client) == "blobs@1"
            assert sample(app, "detector_reloads_total", outcome="failed") == 1
            # The newest valid one is asked for: 2 is passed over, 1 loads again.
            assert (await app.state.parts.repository.load("blobs")).version == "1"

    run(scenario())


def test_the_served_file_may_be_replaced_or_deleted_under_the_running_service(tmp_path):
    path = write_model(tmp_path, version="1")

    async def scenario():
        async with running(app_on(tmp_path)) as client:
            spoil(path)
            assert await versions_that_answer(client) == "blobs@1"
            shutil.rmtree(tmp_path / "blobs")
            assert await versions_that_answer(client) == "blobs@1"

    run(scenario())


def test_rollback_goes_to_what_served_before_or_to_the_next_older(tmp_path):
    for version in ("1", "2", "3"):
        write_model(tmp_path, version=version)

    async def scenario():
        app = app_on(tmp_path)
        repository = app.state.parts.repository
        async with running(app) as client:
            await repository.load("blobs", "1")
            await repository.load("blobs", "3")
            assert (await repository.rollback("blobs")).version == "1"
            with pytest.raises(ModelNotFound, match="no version before it"):
                await repository.rollback("blobs")
            await repository.load("blobs", "3")
            shutil.rmtree(tmp_path / "blobs" / "1")
            with pytest.raises(ModelNotFound, match="it holds blobs"):
                await repository.rollback("blobs")
            assert await versions_that_answer(client) == "blobs@3"
            await repository.load("blobs", "2")
            assert await versions_that_answer(client) == "blobs@2"

    run(scenario())


def test_watching_takes_new_versions_tries_a_broken_file_once_and_respects_a_rollback(tmp_path):
    write_model(tmp_path, version="1")

    async def scenario():
        app = app_on(tmp_path, watch_repository_seconds=0.02)
        repository = app.state.parts.repository
        async with running(app) as client:
            new = write_model(tmp_path / "aside", version="2")
            half = tmp_path / "blobs" / "2" / "model.onnx"
            half.parent.mkdir()
            half.write_bytes(new.read_bytes()[:1000])
            await until(lambda: sample(app, "detector_reloads_total", outcome="failed") == 1)
            await asyncio.sleep(0.2)  # many looks later it was not tried again
            assert sample(app, "detector_reloads_total", outcome="failed") == 1
            new.replace(half)
            await until(lambda: repository.resolve(None).version == "2")
            assert await versions_that_answer(client) == "blobs@2"
            await repository.rollback("blobs")
            await asyncio.sleep(0.2)
            assert await versions_that_answer(client) == "blobs@1"
            write_model(tmp_path / "aside", version="3", runs=False).parent.rename(tmp_path / "blobs" / "3")
            await until(lambda: sample(app, "detector_reloads_total", outcome="failed") == 2)
            assert await versions_that_answer(client) == "blobs@1"
            write_model(tmp_path, version="4")
            await until(lambda: repository.resolve(None).version == "4")

    run(scenario())


def test_watching_goes_on_after_a_look_that_failed(tmp_path, monkeypatch, caplog):
    write_model(tmp_path, version="1")
    failures = iter([OSError(116, "Stale file handle"), PermissionError("not now")])

    def look(root):
        for failure in failures:
            raise failure
        return find_models(root)

    async def scenario():
        app = app_on(tmp_path, watch_repository_seconds=0.02)
        async with running(app):
            monkeypatch.setattr("service.repository.find_models", look)
            write_model(tmp_path, version="2")
            await until(lambda: app.state.parts.repository.resolve(None).version == "2")

    run(scenario())
    assert caplog.text.count("new versions cannot be looked for; the next look is in 0.02 s") == 2
    assert "Stale file handle" in caplog.text


def test_a_folder_that_is_removed_while_it_is_looked_at_holds_nothing(tmp_path, monkeypatch):
    write_model(tmp_path)
    write_model(tmp_path, name="cells")
    is_dir = Path.is_dir

    def removed_after(folder):
        found = is_dir(folder)
        if folder.name == "blobs":
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(Path, "is_dir", removed_after)
    assert find_models(tmp_path) == {"cells": ["1"]}


def test_an_unloaded_model_finishes_what_is_in_flight_and_gives_its_memory_back(tmp_path):
    write_model(tmp_path)

    async def scenario():
        app = app_on(tmp_path)
        repository = app.state.parts.repository
        async with running(app) as client:
            served = repository.resolve("blobs")
            session, entered, gate = served.loaded.runtimes[0], threading.Event(), threading.Event()
            really_run = session.run

            def held(images, sizes_hw):
                entered.set()
                assert gate.wait(WAIT_S)
                return really_run(images, sizes_hw)

            session.run = held
            asked = asyncio.create_task(client.post("/v1/detect", content=picture(), headers=PNG))
            assert await asyncio.to_thread(entered.wait, WAIT_S)
            await repository.unload("blobs")
            refused = await client.post("/v1/detect", content=picture(), headers=PNG)
            assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
            assert "every model was unloaded (blobs)" in refused.json()["detail"]
            assert refused.headers["retry-after"]
            ready = await client.get("/readyz")
            assert (ready.status_code, "every model was unloaded" in ready.json()["detail"]) == (503, True)
            assert (await client.get("/healthz")).status_code == 200
            labels = {"model": "blobs", "version": "1", "sha256": served.loaded.sha256, "provider": "cpu"}
            assert sample(app, "detector_model_info", **labels) == 1  # still answering
            gate.set()
            assert (await asked).status_code == 200
            await until(lambda: sample(app, "detector_model_info", **labels) == 0)
            await repository.load("blobs")
            assert (await client.get("/readyz")).status_code == 200
            assert await versions_that_answer(client) == "blobs@1"

    run(scenario())


def test_the_default_stays_the_default_while_it_is_unloaded(tmp_path):
    """Another model knows other classes: it must not answer in place of the one that was meant."""
    write_model(tmp_path)
    write_model(tmp_path, name="cells")

    async def scenario():
        async with running(app_on(tmp_path)) as client:
            repository = client._transport.app.state.parts.repository
            await repository.unload("blobs")
            answer = await client.post("/v1/detect", content=picture(), headers=PNG)
            assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
            assert "'blobs' was unloaded" in answer.json()["detail"]
            assert await versions_that_answer(client, model="cells") == "cells@1"
            assert [model["name"] for model in (await client.get("/v1/models")).json()["models"]] == ["cells"]
            await repository.load("blobs")
            assert await versions_that_answer(client) == "blobs@1"
            assert [model["name"] for model in (await client.get("/v1/models")).json()["models"]] == ["blobs", "cells"]
            with pytest.raises(ModelNotFound, match="cannot be unloaded; served: blobs@1, cells@1"):
                await repository.unload("others")

    run(scenario())


def test_watching_brings_nothing_back_and_rollback_works_after_unload_and_load(tmp_path):
    write_model(tmp_path)

    async def scenario():
        app = app_on(tmp_path, watch_repository_seconds=0.02)
        repository = app.state.parts.repository
        async with running(app) as client:
            await repository.unload("blobs")
            write_model(tmp_path, version="2")
            assert repository._find_newer() == []
            await repository.load("blobs", "1")
            await until(lambda: repository.served[0].version == "2")  # watched again
            await repository.unload("blobs")
            await repository.load("blobs", "2")
            assert (await repository.rollback("blobs")).version == "1"
            assert await versions_that_answer(client) == "blobs@1"

    run(scenario())


def test_reloads_under_load_fail_no_request(tmp_path):
    write_model(tmp_path, version="1", score=0.6)
    write_model(tmp_path, version="2", score=0.65)

    async def scenario():
        app = app_on(tmp_path)
        async with running(app) as client:
            stop, answers = asyncio.Event(), []

            async def ask():
                while not stop.is_set():
                    answers.append(await versions_that_answer(client))

            clients = [asyncio.create_task(ask()) for _ in range(6)]
            for n in range(20):
                await app.state.parts.repository.load("blobs", str(1 + n % 2))
            stop.set()
            await asyncio.gather(*clients)
            assert set(answers) == {"blobs@1", "blobs@2"}
            await until(lambda: len(app.state.parts.scheduler.snapshot().depths) == 3)

    run(scenario())


def test_one_session_a_device(tmp_path):
    write_model(tmp_path)

    async def scenario():
        app = app_on(tmp_path, device_ids=("0", "1"))
        async with running(app) as client:
            runtimes = app.state.parts.repository.resolve(None).loaded.runtimes
            assert len(runtimes) == 2
            used = set()
            for index, runtime in runtimes.items():
                real = runtime.run
                barrier_run = lambda images, sizes, real=real, index=index: (used.add(index), barrier.wait(WAIT_S), real(images, sizes))[2]  # noqa: E731
                runtime.run = barrier_run
            barrier = threading.Barrier(2)  # passes only when both devices run at once
            small, large = picture(90, 60), picture(60, 90)
            await asyncio.gather(*(client.post("/v1/detect", content=data, headers=PNG) for data in (small, large)))
            assert used == {0, 1}

    run(scenario())
