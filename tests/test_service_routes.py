from __future__ import annotations

import asyncio
import base64
import gzip
import io
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from service_fakes import CLASS_NAMES, WAIT_S, FakeRuntime, fake_service, make_manifest, picture, run, sample, until

from service.errors import InferenceFailed
from service.manifest import InputSpec

PNG = {"content-type": "image/png"}
RED, GREEN, BLUE = (220, 30, 30), (30, 220, 30), (30, 30, 220)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def batching_runtime(seconds=0.005) -> FakeRuntime:
    """One bucket, and a time that does not depend on the batch: batches always pay, however busy the test machine is."""
    return FakeRuntime(make_manifest(input=InputSpec(short_side=96, long_side=160, buckets=[(160, 160)])), seconds=seconds)


async def ask(client, data=None, **query):
    return await client.post("/v1/detect", content=picture() if data is None else data, headers=PNG, params=query)


def test_one_picture_gets_its_box_in_the_documented_shape():
    async def scenario():
        async with fake_service() as (client, _, _):
            response = await ask(client, picture(90, 60, BLUE))
            assert response.status_code == 200
            answer = response.json()
            assert answer["model"] == {"name": "blobs", "version": "1"}
            assert answer["image"] == {"width": 90, "height": 60}
            assert answer["detections"] == [{"box": [45.0, 0.0, 90.0, 60.0], "class": "blue", "class_id": 3, "score": 0.8588}]
            assert list(answer["timing_ms"]) == ["decode", "queue", "infer", "total"]
            assert response.headers["server-timing"].startswith(f"decode;dur={answer['timing_ms']['decode']}, queue;dur=")

    run(scenario())


@pytest.mark.parametrize(
    "content_type", ["image/png", "image/x-anything", "application/octet-stream", "application/x-www-form-urlencoded", ""]
)
def test_raw_bodies_of_every_kind(content_type):
    async def scenario():
        async with fake_service() as (client, _, _):
            response = await client.post("/v1/detect", content=picture(), headers={"content-type": content_type})
            assert response.status_code == 200

    run(scenario())


def test_form_json_and_compressed_bodies_give_the_raw_body_s_answer():
    async def scenario():
        async with fake_service() as (client, _, _):
            data = picture(70, 110, GREEN)
            raw = (await ask(client, data, box_format="xywh")).json()["detections"]
            form = await client.post("/v1/detect", files={"image": ("a.png", data)}, data={"box_format": "xywh"})
            json = await client.post("/v1/detect", json={"image": b64(data), "box_format": "xywh"})
            zipped = await client.post(
                "/v1/detect?box_format=xywh", content=gzip.compress(data), headers={**PNG, "content-encoding": "gzip"}
            )
            deflated = await client.post(
                "/v1/detect?box_format=xywh", content=zlib.compress(data), headers={**PNG, "content-encoding": "deflate"}
            )
            for response in (form, json, zipped, deflated):
                assert response.status_code == 200, response.text
                assert response.json()["detections"] == raw

    run(scenario())


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xyxy", [45.0, 0.0, 90.0, 60.0]),
        ("xywh", [45.0, 0.0, 45.0, 60.0]),
        ("cxcywh", [67.5, 30.0, 45.0, 60.0]),
        ("normalized", [0.5, 0.0, 1.0, 1.0]),
    ],
)
def test_box_formats(box_format, box):
    async def scenario():
        async with fake_service() as (client, _, _):
            response = await ask(client, box_format=box_format)
            assert response.json()["detections"][0]["box"] == pytest.approx(box, abs=1e-3)

    run(scenario())


def test_threshold_count_and_classes_cut_the_answer():
    async def scenario():
        async with fake_service() as (client, _, _):

            async def found(**query):
                response = await ask(client, picture(90, 60, GREEN), **query)
                return [(d["class"], round(d["score"], 1)) for d in response.json()["detections"]]

            assert await found(score_threshold=0.1) == [("green", 0.9), ("red", 0.2)]
            assert await found() == [("green", 0.9)]
            assert await found(score_threshold=0.1, max_detections=1) == [("green", 0.9)]
            assert await found(score_threshold=0.1, classes="red,blue") == [("red", 0.2)]
            assert await found(score_threshold=0.95) == []

    run(scenario())


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("score_treshold=0.3", 422, "bad_option"),
        ("score_threshold=nan", 422, "bad_option"),
        ("classes=purple", 422, "bad_option"),
        ("classes=%00", 422, "bad_option"),
        ("classes=" + "a" * 5000, 422, "bad_option"),
        ("&".join(f"classes=c{n}" for n in range(400)), 422, "bad_option"),
        ("model=../../etc/passwd", 404, "model_not_found"),
        ("model=%F0%9F%98%80", 404, "model_not_found"),
        ("model=blobs@7", 404, "model_not_found"),
        ("timeout_ms=-5", 422, "bad_option"),
    ],
)
def test_bad_options_are_told_by_name(query, status, code):
    async def scenario():
        async with fake_service() as (client, _, _):
            response = await client.post(f"/v1/detect?{query}", content=picture(), headers=PNG)
            assert (response.status_code, response.json()["code"]) == (status, code)
            assert response.headers["content-type"] == "application/problem+json"

    run(scenario())


@pytest.mark.parametrize(
    ("data", "headers", "status", "code"),
    [
        (b"", PNG, 400, "empty_body"),
        (b"hello, this is text", PNG, 415, "unsupported_type"),
        (picture(), {"content-type": "text/plain"}, 415, "unsupported_type"),
        (picture()[:60], PNG, 422, "bad_image"),
        (picture(1, 50), PNG, 422, "bad_image"),
        (picture(2000, 1000), PNG, 413, "too_many_pixels"),
        (b"x" * 300_000, PNG, 413, "too_large"),
        (gzip.compress(bytes(5_000_000)), {**PNG, "content-encoding": "gzip"}, 413, "too_large"),
        (b"not gzip", {**PNG, "content-encoding": "gzip"}, 400, "malformed_request"),
        (picture(), {**PNG, "content-encoding": "br"}, 415, "unsupported_type"),
        (b"{", {"content-type": "application/json"}, 400, "malformed_request"),
        (b'{"image": "!!"}', {"content-type": "application/json"}, 400, "malformed_request"),
        (b"--x--", {"content-type": "multipart/form-data; boundary=x"}, 400, "malformed_request"),
    ],
)
def test_bad_bodies_have_their_own_codes_and_the_next_request_works(data, headers, status, code):
    async def scenario():
        async with fake_service(max_upload_bytes=200_000, max_image_pixels=1_000_000) as (client, app, _):
            response = await client.post("/v1/detect", content=data, headers=headers)
            problem = response.json()
            assert (response.status_code, problem["code"], problem["status"]) == (status, code, status)
            assert len(problem["detail"]) > 10
            assert problem["request_id"] == response.headers["x-request-id"]
            assert sample(app, "detector_images_total", outcome="rejected") == 1
            assert (await ask(client)).status_code == 200

    run(scenario())


def test_a_batch_answers_in_order_and_a_bad_picture_spares_its_neighbours():
    async def scenario():
        async with fake_service() as (client, app, _):
            pictures = [picture(90, 60, RED), b"no picture", picture(60, 90, GREEN), b"", picture(50, 50, BLUE)]
            form = await client.post("/v1/detect/batch", files=[("images", (f"{i}.png", data)) for i, data in enumerate(pictures)])
            json = await client.post("/v1/detect/batch", json={"images": [b64(data) for data in pictures]})
            for response in (form, json):
                assert response.status_code == 200
                results = response.json()["results"]
                assert [r["detections"][0]["class"] if "detections" in r else r["error"]["code"] for r in results] == [
                    "red",
                    "unsupported_type",
                    "green",
                    "empty_body",
                    "blue",
                ]
                assert results[1]["error"]["request_id"] == response.headers["x-request-id"]
            assert sample(app, "detector_images_total", outcome="ok") == 6
            assert sample(app, "detector_images_total", outcome="rejected") == 4

    run(scenario())


def test_a_batch_has_bounds_and_its_own_refusals():
    async def scenario():
        async with fake_service(max_batch_images=2) as (client, _, _):
            too_many = await client.post("/v1/detect/batch", json={"images": [b64(picture())] * 3})
            assert (too_many.status_code, too_many.json()["code"]) == (413, "too_large")
            drawn = await client.post("/v1/detect/batch", json={"images": [b64(picture())], "format": "image"})
            assert (drawn.status_code, drawn.json()["code"]) == (422, "bad_option")
            raw = await client.post("/v1/detect/batch", content=picture(), headers=PNG)
            assert raw.status_code == 415

    run(scenario())


def test_parallel_requests_of_mixed_sizes_share_batches_and_equal_singles():
    async def scenario():
        slow = batching_runtime(0.02)
        async with fake_service(slow) as (client, app, runtime):
            rng = np.random.default_rng(3)
            pictures = [
                picture(int(rng.integers(30, 400)), int(rng.integers(30, 300)), tuple(map(int, rng.integers(0, 255, 3)))) for _ in range(64)
            ]
            singles = [(await ask(client, data)).json() for data in pictures]
            assert set(runtime.batch_sizes) == {1}
            runtime.batch_sizes.clear()
            together = await asyncio.gather(*(ask(client, data) for data in pictures))
            assert [response.status_code for response in together] == [200] * 64
            for alone, shared in zip(singles, together, strict=True):
                assert shared.json()["image"] == alone["image"]
                for one, other in zip(shared.json()["detections"], alone["detections"], strict=True):
                    assert one["class"] == other["class"]
                    assert one["box"] == pytest.approx(other["box"], abs=1e-3)
                    assert one["score"] == pytest.approx(other["score"], abs=1e-3)
            assert sum(runtime.batch_sizes) == 64
            assert np.mean(runtime.batch_sizes) > 2
            assert sample(app, "detector_batch_size_sum") / sample(app, "detector_batch_size_count") > 1

    run(scenario())


def test_numbers_that_are_no_detections_fail_their_image_alone():
    def spoil_blue(detections, images):
        blue = images[:, :20, :20, 2].mean(axis=(1, 2)) > 150
        detections.boxes[blue, 0, 0] = np.nan
        return detections

    async def scenario():
        runtime = batching_runtime()
        runtime.spoil = spoil_blue
        async with fake_service(runtime) as (client, app, _):
            runtime.gate.clear()
            first = asyncio.create_task(ask(client))
            await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
            others = [asyncio.create_task(ask(client, picture(90, 60, colour))) for colour in (GREEN, BLUE, GREEN)]
            await until(lambda: app.state.parts.scheduler.snapshot().waiting_images >= 3)
            runtime.gate.set()
            statuses = [(await task).status_code for task in (first, *others)]
            assert statuses == [200, 200, 500, 200]
            assert others[1].result().json()["code"] == "inference_failed"
            assert sum(runtime.batch_sizes) == 4
            assert max(runtime.batch_sizes) > 1
            assert sample(app, "detector_device_errors_total", kind="bad_output") == 1
            assert sample(app, "detector_images_total", outcome="failed") == 1

    run(scenario())


def test_an_image_that_breaks_the_device_spares_its_batch():
    def break_on_blue(images):
        if (images[:, :20, :20, 2].mean(axis=(1, 2)) > 150).any():
            raise InferenceFailed("broken")

    async def scenario():
        runtime = batching_runtime()
        async with fake_service(runtime) as (client, app, _):
            runtime.before_run = break_on_blue
            runtime.gate.clear()
            first = asyncio.create_task(ask(client))
            await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
            others = [asyncio.create_task(ask(client, picture(90, 60, colour))) for colour in (GREEN, BLUE, RED, GREEN)]
            await until(lambda: app.state.parts.scheduler.snapshot().waiting_images >= 4)
            runtime.gate.set()
            assert [(await task).status_code for task in (first, *others)] == [200, 200, 500, 200, 200]

    run(scenario())


def test_a_full_house_refuses_at_once_and_says_when_to_come_back():
    async def scenario():
        async with fake_service(max_queue_images=4, max_batch_size=1) as (client, app, runtime):
            runtime.gate.clear()
            accepted = [asyncio.create_task(ask(client)) for _ in range(4)]
            await until(lambda: app.state.parts.pipeline.images_in_house >= 4)
            refused = await ask(client)
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            runtime.gate.set()
            assert [(await task).status_code for task in accepted] == [200] * 4
            assert sample(app, "detector_rejected_total", reason="queue_full") == 1
            assert app.state.parts.pipeline.images_in_house == 0

    run(scenario())


def test_bytes_are_bounded_too():
    async def scenario():
        async with fake_service(max_queue_bytes=1 << 20) as (client, _, runtime):
            runtime.gate.clear()
            rng = np.random.default_rng(0)
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (500, 460, 3), np.uint8)).save(buffer, "PNG")
            large = buffer.getvalue()
            first = asyncio.create_task(ask(client, large))
            await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
            refused = await ask(client, large)
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            runtime.gate.set()
            assert (await first).status_code == 200
            assert (await ask(client, large)).status_code == 200

    run(scenario())


def test_a_wait_beyond_the_deadline_is_refused_on_entry():
    async def scenario():
        async with fake_service(FakeRuntime(seconds=0.05), max_batch_size=1) as (client, app, runtime):
            runtime.gate.clear()
            waiting = [asyncio.create_task(ask(client)) for _ in range(6)]
            await until(lambda: app.state.parts.scheduler.snapshot().waiting_images >= 5)
            refused = await ask(client, timeout_ms=100)
            assert (refused.status_code, refused.json()["code"]) == (429, "deadline")
            assert "retry-after" in refused.headers
            runtime.gate.set()
            await asyncio.gather(*waiting)
            assert sample(app, "detector_rejected_total", reason="deadline") == 1

    run(scenario())


def test_a_deadline_that_passes_while_the_device_runs_gives_504():
    async def scenario():
        async with fake_service() as (client, app, runtime):
            runtime.gate.clear()
            late = await ask(client, timeout_ms=60)
            assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
            runtime.gate.set()
            assert (await ask(client)).status_code == 200
            assert sample(app, "detector_images_total", outcome="failed") == 1

    run(scenario())


class Leaving:
    """An ASGI request whose client sends its body and then leaves when told to."""

    def __init__(self, app, body):
        self.app, self.body, self.left, self.sent = app, body, asyncio.Event(), []
        self._told_body = False

    async def receive(self):
        if not self._told_body:
            self._told_body = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    async def __call__(self):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/detect",
            "raw_path": b"/v1/detect",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"image/png")],
            "scheme": "http",
            "server": ("detector", 80),
            "client": ("127.0.0.1", 1),
        }
        await self.app(scope, self.receive, self.send)


def test_a_client_that_leaves_is_taken_out_of_the_queue():
    async def scenario():
        async with fake_service() as (client, app, runtime):
            runtime.gate.clear()
            first = asyncio.create_task(ask(client))
            await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
            leaving = [Leaving(app, picture()) for _ in range(3)]
            tasks = [asyncio.create_task(one()) for one in leaving]
            neighbour = asyncio.create_task(ask(client, picture(90, 60, GREEN)))
            await until(lambda: app.state.parts.scheduler.snapshot().waiting_images >= 4)
            for one in leaving:
                one.left.set()
            await asyncio.gather(*tasks)
            assert app.state.parts.scheduler.snapshot().waiting_images == 1
            runtime.gate.set()
            assert (await first).status_code == (await neighbour).status_code == 200
            assert runtime.batch_sizes == [1, 1]
            assert sample(app, "detector_cancelled_total", phase="queued") == 3
            assert sample(app, "detector_images_total", outcome="cancelled") == 3

    run(scenario())


def test_a_client_that_leaves_while_the_device_runs_is_counted_as_running():
    async def scenario():
        async with fake_service() as (client, app, runtime):
            runtime.gate.clear()
            leaving = Leaving(app, picture())
            task = asyncio.create_task(leaving())
            await asyncio.to_thread(runtime.entered.acquire, True, WAIT_S)
            leaving.left.set()
            await task
            runtime.gate.set()
            assert (await ask(client)).status_code == 200
            assert sample(app, "detector_cancelled_total", phase="running") == 1

    run(scenario())


def test_a_client_that_leaves_while_its_picture_waits_for_a_decoder():
    async def scenario():
        async with fake_service(decode_threads=1) as (client, app, _):
            pool_gate = threading.Event()
            busy = asyncio.create_task(app.state.parts.pipeline.compute(pool_gate.wait, WAIT_S))
            leaving = Leaving(app, picture())
            task = asyncio.create_task(leaving())
            await until(lambda: app.state.parts.pipeline.images_in_house >= 1)
            leaving.left.set()
            await task
            pool_gate.set()
            await busy
            assert sample(app, "detector_cancelled_total", phase="queued") == 1
            assert sample(app, "detector_stage_duration_seconds_count", stage="decode") == 0
            assert app.state.parts.pipeline.images_in_house == 0
            assert (await ask(client)).status_code == 200

    run(scenario())


def test_models_are_listed_with_what_a_client_needs():
    async def scenario():
        async with fake_service() as (client, _, _):
            models = (await client.get("/v1/models")).json()["models"]
            assert [(m["name"], m["version"]) for m in models] == [("blobs", "1")]
            one = (await client.get("/v1/models/blobs")).json()
            assert one == models[0]
            version = one["versions"][0]
            assert (version["class_names"], version["state"], version["provider"]) == (CLASS_NAMES, "active", "fake")
            assert set(version["batch_seconds"]) >= {"96x160/1", "160x96/1", "128x128/1"}
            missing = await client.get("/v1/models/nope")
            assert (missing.status_code, missing.json()["code"]) == (404, "model_not_found")
            assert (await client.get("/v1/models/%2e%2e%2fetc")).status_code == 404

    run(scenario())


@pytest.mark.parametrize(
    ("accept", "media_type"), [("*/*", "image/jpeg"), ("image/webp", "image/webp"), ("image/png, image/*;q=0.5", "image/png")]
)
def test_the_picture_with_its_boxes_in_the_type_asked_for(accept, media_type):
    async def scenario():
        async with fake_service() as (client, _, _):
            response = await client.post(
                "/v1/detect", content=picture(300, 200), headers={**PNG, "accept": accept}, params={"format": "image"}
            )
            assert (response.status_code, response.headers["content-type"]) == (200, media_type)
            drawn = np.asarray(Image.open(io.BytesIO(response.content)).convert("RGB")).astype(int)
            assert drawn.shape == (200, 300, 3)
            changed = np.abs(drawn - (220, 30, 30)).sum(axis=2) > 60
            assert changed[:, 145:155].any(axis=1).mean() > 0.8  # the left side of the box
            assert not changed[60:180, 20:120].any()  # outside of every box above the threshold
            assert "infer;dur=" in response.headers["server-timing"]

    run(scenario())
