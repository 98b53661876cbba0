"""The app as a whole: readiness, identity, keys, pages, the order of shutting down."""

from __future__ import annotations

import asyncio
import logging
import re
import time

import httpx
import pytest
from service_fakes import WAIT_S, FakeRuntime, fake_service, make_manifest, make_settings, picture, run, running, sample, until
from service_onnx import golden, write_model

from service import errors
from service.app import create_app, create_operations_app
from service.auth import make_key
from service.errors import DetectorError
from service.health import Health

PNG = {"content-type": "image/png"}


def key_file(path, *names):
    keys, lines = zip(*(make_key(name) for name in names), strict=True)
    path.write_text("# keys of a test\n\n" + "\n".join(lines) + "\n")
    return keys


# Readiness


def test_unready_until_warm_while_already_alive():
    async def scenario():
        runtime = FakeRuntime()
        runtime.gate.clear()
        app = create_app(make_settings(), runtime=runtime)
        async with running(app, ready=False) as client:
            await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
            assert (await client.get("/healthz")).json() == {"alive": True}
            unready = await client.get("/readyz")
            assert (unready.status_code, unready.headers["retry-after"]) == (503, "2")
            assert "warmed up" in unready.json()["detail"]
            early = await client.post("/v1/detect", content=picture(), headers=PNG)
            assert (early.status_code, early.json()["code"]) == (503, "not_ready")
            runtime.gate.set()
            await until(lambda: app.state.parts.health.reason_not_ready() is None)
            assert (await client.get("/readyz")).json() == {"ready": True}

    run(scenario())


def test_every_bucket_is_warm_before_ready():
    shapes = set()
    runtime = FakeRuntime()
    runtime.before_run = lambda images: shapes.add(images.shape)

    async def scenario():
        async with running(create_app(make_settings(), runtime=runtime)):
            assert {shape[1:3] for shape in shapes} == set(runtime.manifest.input.buckets)
            assert {shape[0] for shape in shapes} >= {1, 2}

    run(scenario())


def test_a_runtime_that_fails_its_golden_image_never_gets_ready():
    async def scenario():
        app = create_app(make_settings(), runtime=FakeRuntime(make_manifest(golden=[golden(0.3)])))
        async with running(app, ready=False) as client:
            await asyncio.wait_for(app.state.parts.health.ended.wait(), WAIT_S)
            assert "golden image 0" in (await client.get("/readyz")).json()["detail"]

    run(scenario())


def test_readiness_asks_the_device_when_nothing_ran_lately():
    async def scenario():
        async with fake_service(canary_seconds=0.05) as (client, app, runtime):
            await asyncio.sleep(0.1)
            assert (await client.get("/readyz")).status_code == 200
            assert runtime.batch_sizes == [1]  # the canary
            assert sample(app, "detector_images_total", outcome="ok") == 0
            runtime.before_run = lambda images: (_ for _ in ()).throw(RuntimeError("sick"))
            await asyncio.sleep(0.1)
            sick = await client.get("/readyz")
            assert (sick.status_code, "canary inference failed" in sick.json()["detail"]) == (503, True)
            runtime.before_run = lambda images: None
            assert (await client.get("/readyz")).status_code == 200

    run(scenario())


def test_a_canary_without_an_answer_is_no_readiness(monkeypatch):
    monkeypatch.setattr("service.health.CANARY_TIMEOUT_S", 0.05)

    async def scenario():
        async with fake_service(canary_seconds=0.01) as (client, _, runtime):
            runtime.gate.clear()
            await asyncio.sleep(0.02)
            answers = await asyncio.gather(*(client.get("/readyz") for _ in range(3)))
            assert {response.status_code for response in answers} == {503}
            assert "gave no answer" in answers[0].json()["detail"]
            runtime.gate.set()

    run(scenario())


# Identity and errors


def test_request_ids_are_taken_when_sound_and_made_otherwise():
    async def scenario():
        async with fake_service() as (client, _, _):
            taken = await client.get("/healthz", headers={"x-request-id": "order-7/a:b"})
            assert taken.headers["x-request-id"] == "order-7/a:b"
            for bad in ("", "a b", "x" * 200, "new\tline"):
                made = (await client.get("/healthz", headers={"x-request-id": bad})).headers["x-request-id"]
                assert re.fullmatch("[0-9a-f]{32}", made)
            ids = {(await client.get("/healthz")).headers["x-request-id"] for _ in range(50)}
            assert len(ids) == 50

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing/here", 404, "not_found"),
        ("GET", "/v1/detect", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
        ("POST", "/v1/models/blobs/load", 404, "not_found"),
        ("GET", "/static/../../pyproject.toml", 404, "not_found"),
        ("GET", "/static/%2e%2e/%2e%2e/pyproject.toml", 404, "not_found"),
    ],
)
def test_errors_of_the_framework_look_like_ours(method, path, status, code):
    async def scenario():
        async with fake_service() as (client, _, _):
            response = await client.request(method, path)
            assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
            problem = response.json()
            assert (problem["code"], problem["request_id"]) == (code, response.headers["x-request-id"])
            if status == 405:
                assert response.headers["allow"]

    run(scenario())


def test_a_fault_of_ours_is_a_500_without_its_secrets(caplog):
    async def scenario():
        async with fake_service() as (client, app, _):

            def broken(*args, **kwargs):
                raise ZeroDivisionError("internal words")

            app.state.parts.pipeline.check_room = broken
            response = await client.post("/v1/detect", content=picture(), headers=PNG)
            assert (response.status_code, response.json()["code"]) == (500, "internal")
            assert "internal words" not in response.text

    run(scenario())


def test_requests_are_measured_by_route_template_and_status():
    async def scenario():
        async with fake_service() as (client, app, _):
            await client.post("/v1/detect", content=picture(), headers=PNG)
            await client.post("/v1/detect", content=b"", headers=PNG)
            for name in ("a", "b", "c"):
                await client.get(f"/v1/models/{name}")
                await client.get(f"/random/{name}")
            name = "detector_http_request_duration_seconds_count"
            assert sample(app, name, route="/v1/detect", method="POST", status="200") == 1
            assert sample(app, name, route="/v1/detect", method="POST", status="400") == 1
            assert sample(app, name, route="/v1/models/{name}", method="GET", status="404") == 3
            assert sample(app, name, route="unmatched", method="GET", status="404") == 3
            assert sample(app, "detector_inflight_requests") == 0
            for stage in ("read", "decode", "queue", "assemble", "infer", "postprocess", "serialise"):
                assert sample(app, "detector_stage_duration_seconds_count", stage=stage) >= 1, stage
            text = (await client.get("/metrics")).text
            assert "random" not in text

    run(scenario())


def test_a_strange_method_is_no_new_label():
    async def scenario():
        async with fake_service() as (client, app, _):
            await client.request("BREW", "/healthz")
            assert sample(app, "detector_http_request_duration_seconds_count", route="/healthz", method="other", status="405") == 1

    run(scenario())


def test_event_loop_lag_is_measured():
    async def scenario():
        async with fake_service() as (_, app, _):
            time.sleep(0.3)  # noqa: ASYNC251  what must not happen, on purpose
            await until(lambda: sample(app, "detector_event_loop_lag_seconds_count") >= 2)
            assert sample(app, "detector_event_loop_lag_seconds_sum") > 0.1

    run(scenario())


# Keys


def test_keys_open_the_api_and_nothing_else_needs_them(tmp_path):
    (key,) = key_file(tmp_path / "keys", "alice")

    async def scenario():
        async with fake_service(api_keys_file=tmp_path / "keys") as (client, app, _):
            for headers, status, code in (
                ({}, 401, "unauthorised"),
                ({"authorization": "Bearer wrong"}, 401, "unauthorised"),
                ({"authorization": f"Basic {key}"}, 401, "unauthorised"),
                ({"authorization": f"Bearer {key}"}, 200, None),
                ({"x-api-key": key}, 200, None),
            ):
                response = await client.post("/v1/detect", content=picture(), headers={**PNG, **headers})
                assert response.status_code == status
                assert code is None or response.json()["code"] == code
                assert ("www-authenticate" in response.headers) == (status == 401)
            assert (await client.get("/v1/models")).status_code == 401
            for path in ("/", "/docs", "/healthz", "/readyz", "/metrics", "/openapi.json"):
                assert (await client.get(path)).status_code == 200
            assert sample(app, "detector_rejected_total", reason="unauthorised") == 4

    run(scenario())


def test_admin_routes_need_an_admin_key(tmp_path):
    (key,) = key_file(tmp_path / "keys", "alice")
    (admin,) = key_file(tmp_path / "admins", "root")
    write_model(tmp_path / "repository")

    async def scenario():
        settings = make_settings(
            api_keys_file=tmp_path / "keys", admin_keys_file=tmp_path / "admins", model_repository=tmp_path / "repository", provider="cpu"
        )
        async with running(create_app(settings)) as client:

            async def load(headers, body=None):
                return await client.post("/v1/models/blobs/load", headers=headers, json=body)

            assert (await load({})).status_code == 401
            assert (await load({"x-api-key": key})).json()["code"] == "forbidden"
            assert (await load({"x-api-key": admin})).json()["version"] == "1"
            write_model(tmp_path / "repository", version="2")
            loaded = await load({"authorization": f"Bearer {admin}"}, {"version": "2"})
            assert (loaded.status_code, loaded.json()["version"], loaded.json()["state"]) == (200, "2", "active")
            assert (await load({"x-api-key": admin}, {"version": "9"})).status_code == 404
            assert (await load({"x-api-key": admin}, {"version": "../../etc"})).json()["code"] == "bad_option"
            assert (await load({"x-api-key": admin}, {"file": "/etc/passwd"})).status_code == 422
            (tmp_path / "repository" / "blobs" / "3").mkdir()
            (tmp_path / "repository" / "blobs" / "3" / "model.onnx").write_bytes(b"garbage")
            failed = await load({"x-api-key": admin}, {"version": "3"})
            assert (failed.status_code, failed.json()["code"]) == (409, "load_failed")
            assert "blobs@2 still serves" in failed.json()["detail"]
            back = await client.post("/v1/models/blobs/rollback", headers={"x-api-key": admin})
            assert back.json()["version"] == "1"
            # An administrator may also use the API.
            assert (await client.post("/v1/detect", content=picture(), headers={**PNG, "x-api-key": admin})).status_code == 200

    run(scenario())


def test_without_an_admin_file_there_are_no_admin_routes():
    async def scenario():
        async with fake_service() as (client, _, _):
            for path in ("/v1/models/blobs/load", "/v1/models/blobs/rollback", "/v2/repository/models/blobs/load"):
                response = await client.post(path)
                assert response.status_code == 404
                assert "set DETECTOR_ADMIN_KEYS_FILE" in response.text
            assert "set DETECTOR_ADMIN_KEYS_FILE" in (await client.put("/v1/log-level")).json()["detail"]
            paths = (await client.get("/openapi.json")).json()["paths"]
            assert not any("load" in path or "rollback" in path or "log-level" in path for path in paths)

    run(scenario())


def test_the_log_level_changes_at_run_time(tmp_path):
    (admin,) = key_file(tmp_path / "admins", "root")
    before = logging.getLogger("service").level

    async def scenario():
        async with fake_service(admin_keys_file=tmp_path / "admins") as (client, _, _):
            headers = {"x-api-key": admin}
            assert (await client.put("/v1/log-level", json={"level": "debug"}, headers=headers)).json() == {"level": "debug"}
            assert (await client.get("/v1/log-level", headers=headers)).json() == {"level": "debug"}
            assert logging.getLogger("service").isEnabledFor(logging.DEBUG)
            assert (await client.put("/v1/log-level", json={"level": "loud"}, headers=headers)).status_code == 422

    try:
        run(scenario())
    finally:
        logging.getLogger("service").setLevel(before)


def test_metrics_and_admin_move_to_their_own_port(tmp_path):
    (admin,) = key_file(tmp_path / "admins", "root")

    async def scenario():
        async with fake_service(operations_port=9, admin_keys_file=tmp_path / "admins") as (client, app, _):
            assert (await client.get("/metrics")).status_code == 404
            elsewhere = await client.get("/v1/log-level", headers={"x-api-key": admin})
            assert elsewhere.status_code == 404
            assert "on the operations port here, 9 (" in elsewhere.json()["detail"]
            assert (await client.get("/readyz")).status_code == 200
            transport = httpx.ASGITransport(app=create_operations_app(app.state.parts))
            async with httpx.AsyncClient(transport=transport, base_url="http://operations") as operations:
                assert "detector_images_total" in (await operations.get("/metrics")).text
                assert (await operations.get("/v1/log-level", headers={"x-api-key": admin})).status_code == 200
                assert (await operations.get("/v1/log-level")).status_code == 401
                assert (await operations.post("/v1/detect")).status_code == 404
                assert "dashboard.js" in (await operations.get("/dashboard")).text
                assert (await operations.get("/static/dashboard.js")).status_code == 200

    run(scenario())


# Browsers


def test_pages_load_nothing_from_elsewhere():
    async def scenario():
        async with fake_service() as (client, _, _):
            for path in ("/", "/dashboard", "/docs"):
                page = await client.get(path)
                assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
                policy = page.headers["content-security-policy"]
                assert policy.startswith("default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob: mediastream:")
                assert "unsafe" not in policy
                assert page.headers["x-frame-options"] == "DENY"
                for asset in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
                    assert "//" not in asset, asset
                    assert (await client.get("/" + asset.removeprefix("./"))).status_code == 200, asset
            script = await client.get("/static/docs.js")
            assert script.headers["x-content-type-options"] == "nosniff"
            assert "content-security-policy" in script.headers

    run(scenario())


def test_cors_only_by_setting_and_only_for_the_named():
    async def scenario():
        preflight = {
            "origin": "https://shop.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        async with fake_service() as (client, _, _):
            assert "access-control-allow-origin" not in (await client.options("/v1/detect", headers=preflight)).headers
        async with fake_service(cors_origins=("https://shop.example",)) as (client, _, _):
            allowed = await client.options("/v1/detect", headers=preflight)
            assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
            posted = await client.post("/v1/detect", content=picture(), headers={**PNG, "origin": "https://shop.example"})
            assert posted.headers["access-control-allow-origin"] == "https://shop.example"
            assert "x-request-id" in posted.headers["access-control-expose-headers"]
            other = await client.options("/v1/detect", headers={**preflight, "origin": "https://evil.example"})
            assert "access-control-allow-origin" not in other.headers

    run(scenario())


# Errors


def test_codes_and_statuses_of_errors_are_unique_and_documented():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DetectorError)]
    codes = [kind.code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert all(kind.title and 400 <= kind.status < 600 for kind in kinds)


# Leaving


def test_shutting_down_answers_what_was_accepted_and_refuses_the_rest():
    async def scenario():
        runtime = FakeRuntime()
        app = create_app(make_settings(), runtime=runtime)
        lifespan = app.router.lifespan_context(app)
        await lifespan.__aenter__()
        await until(lambda: app.state.parts.health.reason_not_ready() is None)
        runtime.gate.clear()
        while runtime.entered.acquire(blocking=False):
            pass
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://detector") as client:
            accepted = [asyncio.create_task(client.post("/v1/detect", content=picture(), headers=PNG))]
            await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
            accepted += [asyncio.create_task(client.post("/v1/detect", content=picture(), headers=PNG)) for _ in range(3)]
            await until(lambda: app.state.parts.scheduler.snapshot().waiting_images == 3)
            leaving = asyncio.create_task(lifespan.__aexit__(None, None, None))
            await until(lambda: app.state.parts.health.draining)
            await asyncio.sleep(0)
            late = await client.post("/v1/detect", content=picture(), headers=PNG)
            assert (late.status_code, late.json()["code"], late.headers["connection"]) == (503, "draining", "close")
            assert (await client.get("/readyz")).status_code == 503
            runtime.gate.set()
            assert [(await task).status_code for task in accepted] == [200] * 4
            await leaving
            assert runtime.closed
            assert sample(app, "detector_rejected_total", reason="draining") == 1

    run(scenario())


def test_health_keeps_its_first_failure():
    async def scenario():
        health = Health()
        health.fail("first", 4)
        health.fail("second", 5)
        assert (health.failure, health.exit_code) == ("first", 4)

    run(scenario())
