"""The Open Inference Protocol, asked by the clients that others wrote, and by requests that broke other servers."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from service_fakes import FakeRuntime, fake_service, make_manifest, picture, run, sample, until
from service_onnx import write_model
from service_v2_bodies import INFER, INFER_TENSOR, LENGTH, post, request_body, tensor_body
from test_service_server import Process

from service.auth import make_key

RED, GREEN = (220, 30, 30), (30, 220, 30)
OUTPUTS = ("boxes", "scores", "labels", "num_detections")
ROWS = 4

# Unmodified clients against the real process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository)
    write_model(repository, version="2")
    process = Process(repository, model="blobs,blobs@1", canary_seconds=0)
    process.until_ready()
    yield process
    process.stop()


@pytest.fixture
def client(server: Process) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as made:
        yield made


def image_input(*pictures: bytes) -> triton.InferInput:
    tensor = triton.InferInput("IMAGE", [len(pictures), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[data] for data in pictures], dtype=np.object_))
    return tensor


def tensor_inputs(pixels: np.ndarray, sizes: list[list[int]], *, binary: bool) -> list[triton.InferInput]:
    images, sizes_hw = (
        triton.InferInput("images", list(pixels.shape), "UINT8"),
        triton.InferInput("image_sizes_hw", [len(sizes), 2], "INT64"),
    )
    images.set_data_from_numpy(pixels, binary_data=binary)
    sizes_hw.set_data_from_numpy(np.array(sizes, np.int64), binary_data=binary)
    return [images, sizes_hw]


def two_scenes() -> np.ndarray:
    """Red of 60 x 100 and green of 90 x 160 in a padding of 96 x 160."""
    pixels = np.zeros((2, 96, 160, 3), np.uint8)
    pixels[0, :60, :100], pixels[1, :90, :160] = RED, GREEN
    return pixels


def test_health_metadata_and_configuration(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("blobs")
    assert client.is_model_ready("blobs_tensor", "1")
    assert not client.is_model_ready("blobs", "7")
    assert not client.is_model_ready("nothing")
    about = client.get_server_metadata()
    assert about["name"] == "faster-rcnn-service"
    assert {"statistics", "binary_tensor_data", "model_configuration"} <= set(about["extensions"])
    assert not any("shared_memory" in name or name in ("trace", "logging") for name in about["extensions"])
    for name, inputs in {
        "blobs": [("IMAGE", "BYTES", [-1, 1])],
        "blobs_tensor": [("images", "UINT8", [-1, -1, -1, 3]), ("image_sizes_hw", "INT64", [-1, 2])],
    }.items():
        described, configured = client.get_model_metadata(name), client.get_model_config(name, "2")
        assert [(entry["name"], entry["datatype"], entry["shape"]) for entry in described["inputs"]] == inputs
        assert [(entry["name"], entry["shape"]) for entry in described["outputs"]] == [
            ("boxes", [-1, ROWS, 4]),
            ("scores", [-1, ROWS]),
            ("labels", [-1, ROWS]),
            ("num_detections", [-1]),
        ]
        assert (described["name"], described["versions"], described["platform"]) == (name, ["1", "2"], "onnxruntime_onnx")
        assert [(entry["name"], entry["dims"]) for entry in configured["input"]] == [(entry[0], entry[2][1:]) for entry in inputs]
        assert configured["max_batch_size"] == 64
        assert configured["model_transaction_policy"] == {"decoupled": False}
        assert configured["response_cache"] == {"enable": False}
        assert "dynamic_batching" in configured


def test_repository_index(client: triton.InferenceServerClient) -> None:
    listed = client.get_model_repository_index()
    assert {(entry["name"], entry["version"], entry["state"]) for entry in listed} == {
        (name, version, "READY") for name in ("blobs", "blobs_tensor") for version in ("1", "2")
    }


@pytest.mark.parametrize("binary_answer", [True, False])
def test_pictures_in_detections_out(client: triton.InferenceServerClient, binary_answer: bool) -> None:
    """Two pictures of different sizes in one request; boxes in each picture's own pixels."""
    wanted = [triton.InferRequestedOutput(name, binary_data=binary_answer) for name in OUTPUTS]
    answer = client.infer("blobs", [image_input(picture(90, 60, RED), picture(300, 200, GREEN, "JPEG"))], outputs=wanted, request_id="a-1")
    assert answer.get_response()["id"] == "a-1"
    assert answer.get_response()["model_version"] == "2"
    assert answer.as_numpy("num_detections").tolist() == [2, 2]
    assert answer.as_numpy("labels")[:, 0].tolist() == [1, 2]
    np.testing.assert_allclose(answer.as_numpy("boxes")[:, 0], [[45, 0, 90, 60], [150, 0, 300, 200]], atol=0.01)
    assert [answer.as_numpy(name).dtype for name in OUTPUTS] == [np.float32, np.float32, np.int64, np.int64]
    assert answer.as_numpy("scores").shape == (2, ROWS)
    assert not answer.as_numpy("boxes")[:, 2:].any()


@pytest.mark.parametrize("binary", [True, False])
def test_tensors_in_detections_out(client: triton.InferenceServerClient, binary: bool) -> None:
    answer = client.infer("blobs_tensor", tensor_inputs(two_scenes(), [[60, 100], [90, 160]], binary=binary))
    assert answer.as_numpy("labels")[:, 0].tolist() == [1, 2]
    np.testing.assert_allclose(answer.as_numpy("boxes")[:, 0], [[50, 0, 100, 60], [80, 0, 160, 90]])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client: triton.InferenceServerClient, algorithm: str) -> None:
    answer = client.infer(
        "blobs",
        [image_input(picture())],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert answer.as_numpy("labels")[0, 0] == 1


def test_a_version_can_be_named(client: triton.InferenceServerClient) -> None:
    assert client.infer("blobs", [image_input(picture())], model_version="1").get_response()["model_version"] == "1"
    with pytest.raises(triton.InferenceServerException, match="blobs@9"):
        client.infer("blobs", [image_input(picture())], model_version="9")


def test_errors_reach_the_client_as_sentences(client: triton.InferenceServerClient) -> None:
    with pytest.raises(triton.InferenceServerException, match="'nothing' is not served") as missing:
        client.infer("nothing", [image_input(picture())])
    assert missing.value.status() == "404"
    with pytest.raises(triton.InferenceServerException, match="got text"):
        client.infer("blobs", [image_input(picture(), b"not a picture but a sentence")])
    with pytest.raises(triton.InferenceServerException, match="fits none"):
        client.infer("blobs_tensor", tensor_inputs(np.zeros((1, 640, 640, 3), np.uint8), [[640, 640]], binary=True))
    for unoffered in (client.get_trace_settings, client.get_log_settings, client.get_system_shared_memory_status):
        with pytest.raises(triton.InferenceServerException, match="not offer"):
            unoffered()


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient) -> None:
    def counts() -> dict[str, Any]:
        (entry,) = client.get_inference_statistics("blobs", "2")["model_stats"]
        return entry

    before = counts()
    client.infer("blobs", [image_input(picture(), picture(), picture())])
    client.infer("blobs", [image_input(picture())])
    with pytest.raises(triton.InferenceServerException):
        client.infer("blobs", [image_input(b"\xff\xd8")])
    after = counts()
    assert after["inference_count"] - before["inference_count"] == 4
    assert 2 <= after["execution_count"] - before["execution_count"] <= 4
    assert after["last_inference"] > 0
    spent = {stage: after["inference_stats"][stage] for stage in after["inference_stats"]}
    grown = {stage: spent[stage]["count"] - before["inference_stats"][stage]["count"] for stage in spent}
    assert grown == {
        "success": 2,
        "fail": 1,
        "queue": 2,
        "compute_input": 2,
        "compute_infer": 2,
        "compute_output": 2,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert spent["success"]["ns"] > spent["compute_infer"]["ns"] > 0
    assert {entry["name"] for entry in client.get_inference_statistics()["model_stats"]} == {"blobs", "blobs_tensor"}


def test_asyncio_client(server: Process) -> None:
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("blobs")
            assert (await client.get_server_metadata())["name"] == "faster-rcnn-service"
            assert (await client.get_model_metadata("blobs"))["inputs"][0]["name"] == "IMAGE"
            assert (await client.get_model_config("blobs"))["max_batch_size"] > 0
            assert (await client.get_inference_statistics("blobs"))["model_stats"]
            assert len(await client.get_model_repository_index()) == 4
            answers = await asyncio.gather(
                *(client.infer("blobs", [image_input(picture(90 + i, 60))], request_id=str(i)) for i in range(12))
            )
            assert [answer.get_response()["id"] for answer in answers] == [str(i) for i in range(12)]
            assert [round(float(answer.as_numpy("boxes")[0, 0, 2])) for answer in answers] == [90 + i for i in range(12)]
            squeezed = await client.infer(
                "blobs_tensor",
                tensor_inputs(two_scenes(), [[60, 100], [90, 160]], binary=True),
                request_compression_algorithm="gzip",
                response_compression_algorithm="deflate",
            )
            assert squeezed.as_numpy("num_detections").tolist() == [2, 2]
            with pytest.raises(triton.InferenceServerException, match="not served"):
                await client.infer("nothing", [image_input(picture())])

    asyncio.run(ask())


# Loading, with and without the key


def test_load_needs_the_admin_key_and_takes_no_files(tmp_path: Path) -> None:
    write_model(tmp_path / "repository")
    key, line = make_key("operator")
    (tmp_path / "keys").write_text(line + "\n")
    process = Process(tmp_path / "repository", admin_keys_file=tmp_path / "keys", canary_seconds=0)
    try:
        process.until_ready()
        write_model(tmp_path / "repository", version="2")
        with triton.InferenceServerClient(f"127.0.0.1:{process.port}") as client:
            bearer = {"Authorization": f"Bearer {key}"}
            unloaded = {entry["version"]: entry["state"] for entry in client.get_model_repository_index() if entry["name"] == "blobs"}
            assert unloaded == {"1": "READY", "2": "UNAVAILABLE"}
            with pytest.raises(triton.InferenceServerException, match="key"):
                client.load_model("blobs")
            with pytest.raises(triton.InferenceServerException, match="refused"):
                client.load_model("blobs", headers=bearer, config='{"backend": "python"}')
            with pytest.raises(triton.InferenceServerException, match="refused"):
                client.load_model("blobs", headers=bearer, config="{}", files={"file:1/model.py": b"print()"})
            assert client.get_model_metadata("blobs")["versions"] == ["1"]
            client.load_model("blobs_tensor", headers=bearer)
            assert client.get_model_metadata("blobs")["versions"] == ["2"]
            with pytest.raises(triton.InferenceServerException, match="nothing"):
                client.load_model("nothing", headers=bearer)
    finally:
        process.stop()


def test_unload_and_load_again(tmp_path: Path) -> None:
    """What an unmodified client sees of a model that leaves and comes back, beside one that stays."""
    write_model(tmp_path / "repository")
    write_model(tmp_path / "repository", version="2")
    write_model(tmp_path / "repository", name="cells")
    key, line = make_key("operator")
    (tmp_path / "keys").write_text(line + "\n")
    process = Process(tmp_path / "repository", admin_keys_file=tmp_path / "keys", model="blobs@1,cells", canary_seconds=0)
    bearer = {"Authorization": f"Bearer {key}"}
    try:
        process.until_ready()
        with triton.InferenceServerClient(f"127.0.0.1:{process.port}") as client:
            with pytest.raises(triton.InferenceServerException, match="key"):
                client.unload_model("blobs")
            assert client.is_model_ready("blobs", "1")
            client.unload_model("blobs_tensor", headers=bearer, unload_dependents=True)
            client.unload_model("blobs", headers=bearer)  # again: it is gone already
            assert not any(client.is_model_ready(name) for name in ("blobs", "blobs_tensor"))
            assert not client.is_model_ready("blobs", "1")
            assert client.is_server_ready()
            states = {(entry["name"], entry["version"]): (entry["state"], entry["reason"]) for entry in client.get_model_repository_index()}
            assert states["blobs", "1"] == states["blobs_tensor", "2"] == ("UNAVAILABLE", "unloaded")
            assert states["cells", "1"] == ("READY", "")
            with pytest.raises(triton.InferenceServerException, match="was unloaded and answers again when it is loaded"):
                client.infer("blobs", [image_input(picture())])
            with pytest.raises(triton.InferenceServerException, match="nothing"):
                client.unload_model("nothing", headers=bearer)
            assert client.infer("cells", [image_input(picture())]).as_numpy("num_detections").tolist() == [2]
            client.unload_model("cells", headers=bearer)
            assert client.is_server_live()
            assert not client.is_server_ready()
            client.load_model("blobs_tensor", headers=bearer)
            assert client.is_server_ready()
            assert client.infer("blobs", [image_input(picture())]).get_response()["model_version"] == "2"
            with pytest.raises(triton.InferenceServerException, match="was unloaded"):
                client.get_model_metadata("cells")
    finally:
        process.stop()


def test_without_admin_keys_nothing_can_be_loaded(client: triton.InferenceServerClient) -> None:
    for change in (client.load_model, client.unload_model):
        with pytest.raises(triton.InferenceServerException, match="set DETECTOR_ADMIN_KEYS_FILE"):
            change("blobs")


# Bodies by hand, on a simulated device


def test_json_in_json_out() -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            answer = (await post(client, INFER, request_body(id="x", outputs=[{"name": "labels"}, {"name": "boxes"}]))).json()
            assert (answer["model_name"], answer["model_version"], answer["id"]) == ("blobs", "1", "x")
            assert [(entry["name"], entry["datatype"], entry["shape"]) for entry in answer["outputs"]] == [
                ("labels", "INT64", [1, ROWS]),
                ("boxes", "FP32", [1, ROWS, 4]),
            ]
            assert answer["outputs"][0]["data"] == [1, 1, 0, 0]
            nested_data = np.full((1, 3, 4, 3), (0, 200, 0)).tolist()
            answer = (await post(client, INFER_TENSOR, tensor_body(pixels={"data": nested_data}))).json()
            assert answer["outputs"][2]["data"][0] == 2
            assert "id" not in answer

    run(ask())


def test_outputs_binary_and_json_side_by_side() -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            wanted = [{"name": "scores", "parameters": {"binary_data": False}}, {"name": "labels"}, {"name": "num_detections"}]
            response = await post(client, INFER, request_body(outputs=wanted, parameters={"binary_data_output": True}))
            length = int(response.headers[LENGTH])
            document = json.loads(response.content[:length])
            assert [set(entry) - {"name", "shape", "datatype"} for entry in document["outputs"]] == [
                {"data"},
                {"parameters"},
                {"parameters"},
            ]
            assert response.content[length:] == np.array([1, 1, 0, 0, 2], "<i8").tobytes()
            assert response.headers["content-type"] == "application/octet-stream"

    run(ask())


def test_the_body_alone_is_a_picture() -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            response = await post(client, INFER, picture(90, 60, GREEN), {LENGTH: "0"})
            document = json.loads(response.content[: int(response.headers[LENGTH])])
            sizes = [entry["parameters"]["binary_data_size"] for entry in document["outputs"]]
            assert sizes == [ROWS * 16, ROWS * 4, ROWS * 8, 8]
            boxes = np.frombuffer(response.content[-sum(sizes) :][: sizes[0]], "<f4").reshape(ROWS, 4)
            np.testing.assert_allclose(boxes[0], [45, 0, 90, 60], atol=0.01)

    run(ask())


def test_very_many_chunks() -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            body = json.dumps(request_body()).encode()

            async def trickle() -> Any:
                for at in range(len(body)):
                    yield body[at : at + 1]

            response = await client.post(INFER, content=trickle())
            assert response.status_code == 200

    run(ask())


@pytest.mark.parametrize(
    ("sent", "back"), [("gzip", gzip.decompress), ("deflate", zlib.decompress), ("br, gzip;q=0, deflate", zlib.decompress)]
)
def test_answer_is_compressed_as_accepted(sent: str, back: Any) -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            async with client.stream(
                "POST", INFER, content=json.dumps(request_body()).encode(), headers={"accept-encoding": sent}
            ) as response:
                raw = b"".join([chunk async for chunk in response.aiter_raw()])
            assert json.loads(back(raw))["model_name"] == "blobs"

    run(ask())


def test_timeout_is_in_microseconds() -> None:
    async def ask() -> None:
        runtime = FakeRuntime()
        async with fake_service(runtime) as (client, _, _runtime):
            runtime.gate.clear()
            response = await post(client, INFER, request_body(parameters={"timeout": 50_000}))
            runtime.gate.set()
            assert response.status_code == 504
            assert response.json().keys() == {"error"}
            assert (await post(client, INFER, request_body(parameters={"timeout": 5_000_000}))).status_code == 200

    run(ask())


def test_priority_two_yields() -> None:
    async def ask() -> None:
        runtime = FakeRuntime()
        seen: list[int] = []
        async with fake_service(runtime, max_batch_size=1) as (client, app, _runtime):
            runtime.gate.clear()
            runtime.before_run = lambda images: seen.append(int(images[0].reshape(-1, 3).max(axis=0).argmax()))
            first = asyncio.create_task(post(client, INFER, request_body()))
            await asyncio.to_thread(runtime.entered.acquire)
            order: list[asyncio.Task[httpx.Response]] = []
            scheduler = app.state.parts.scheduler
            for colour, priority in (((0, 200, 0), 2), ((0, 0, 200), 1)):
                pixels = {"data": list(colour) * 12}
                order.append(asyncio.create_task(post(client, INFER_TENSOR, tensor_body(pixels=pixels, parameters={"priority": priority}))))
                await until(lambda: scheduler.snapshot().waiting_images == len(order))
            runtime.gate.set()
            await asyncio.gather(first, *order)
            assert seen == [0, 2, 1]

    run(ask())


def test_one_bad_picture_fails_its_request_alone() -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            both = [base64.b64encode(data).decode() for data in (picture(), b"\xff\xd8 broken")]
            image = {"name": "IMAGE", "shape": [2, 1], "datatype": "BYTES", "data": both}
            bad, good = await asyncio.gather(post(client, INFER, {"inputs": [image]}), post(client, INFER, request_body()))
            assert (bad.status_code, good.status_code) == (422, 200)

    run(ask())


def test_a_detector_that_is_called_so_keeps_its_name() -> None:
    async def ask() -> None:
        async with fake_service(FakeRuntime(make_manifest(name="my_tensor"))) as (client, _, _runtime):
            assert (await client.get("/v2/models/my_tensor")).json()["inputs"][0]["name"] == "IMAGE"
            assert (await client.get("/v2/models/my_tensor_tensor")).json()["inputs"][0]["name"] == "images"
            assert (await client.get("/v2/models/my%5Ftensor/ready")).status_code == 200
            assert (await client.get("/v2/models/my")).status_code == 404

    run(ask())


def test_every_error_of_the_prefix_has_the_protocols_shape() -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            for method, path, status in (
                ("GET", "/v2/nothing", 404),
                ("DELETE", "/v2/models/blobs", 405),
                ("GET", INFER, 405),
                ("GET", "/v2/systemsharedmemory/status", 501),
                ("POST", "/v2/cudasharedmemory/region/a/register", 501),
                ("GET", "/v2/models/blobs/trace/setting", 501),
                ("POST", "/v2/repository/models/blobs/load", 404),
                ("POST", "/v2/repository/index", 200),
            ):
                response = await client.request(method, path)
                assert response.status_code == status, path
                if status != 200:
                    assert list(response.json()) == ["error"], path
            assert (await post(client, "/v2/repository/index", b"[]")).status_code == 400
            ready = (await post(client, "/v2/repository/index", {"ready": True})).json()
            assert [entry["name"] for entry in ready] == ["blobs", "blobs_tensor"]

    run(ask())


def test_keys_guard_the_protocol_but_not_its_health(tmp_path: Path) -> None:
    key, line = make_key("application")
    (tmp_path / "keys").write_text(line + "\n")

    async def ask() -> None:
        async with fake_service(api_keys_file=tmp_path / "keys") as (client, _, _runtime):
            for path in ("/v2/health/live", "/v2/health/ready"):
                assert (await client.get(path)).status_code == 200
            refused = await post(client, INFER, request_body())
            assert (refused.status_code, list(refused.json())) == (401, ["error"])
            assert (await client.get("/v2")).status_code == 401
            assert (await post(client, INFER, request_body(), {"authorization": f"Bearer {key}"})).status_code == 200

    run(ask())


def test_requests_are_measured_under_their_template() -> None:
    async def ask() -> None:
        async with fake_service() as (client, app, _runtime):
            await post(client, INFER, request_body())
            await post(client, "/v2/models/blobs/versions/1/infer", request_body())
            for route in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
                assert sample(app, "detector_http_request_duration_seconds_count", route=route, method="POST", status="200") == 1
            assert sample(app, "detector_images_total", outcome="ok") == 2

    run(ask())


def test_a_client_that_leaves_is_dropped() -> None:
    async def ask() -> None:
        runtime = FakeRuntime()
        async with fake_service(runtime, max_batch_size=1) as (_, app, _runtime):
            runtime.gate.clear()
            body, sent = json.dumps(request_body()).encode(), asyncio.Event()
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await sent.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                assert message.get("status") in (None, 499)

            scope = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": "POST",
                "path": INFER,
                "raw_path": INFER.encode(),
            }
            request = asyncio.create_task(app({**scope, "query_string": b"", "headers": [], "scheme": "http"}, receive, send))
            await until(lambda: app.state.parts.scheduler.snapshot().running_images == 1)
            sent.set()
            await request
            runtime.gate.set()
            assert sample(app, "detector_images_total", outcome="cancelled") == 1

    run(ask())
