"""The OpenAPI document against the application that it describes."""

from __future__ import annotations

import base64
import re
from typing import get_args

import onnx
import pytest
import service_v2_bodies
from conftest import ROOT
from service_fakes import fake_service, picture, run
from test_service_app import PNG, key_file

from service import openapi
from service.manifest import parse_manifest
from service.options import OPTION_NAMES, DetectOptions


def test_openapi_describes_what_the_routes_do():
    async def scenario():
        async with fake_service() as (client, _, _):
            document = (await client.get("/openapi.json")).json()
            detect = document["paths"]["/v1/detect"]["post"]
            assert [parameter["name"] for parameter in detect["parameters"]] == list(OPTION_NAMES)
            assert set(detect["requestBody"]["content"]) == {
                "image/*",
                "application/octet-stream",
                "multipart/form-data",
                "application/json",
            }
            assert {int(status) for status in detect["responses"]} == {200, 400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504}
            for reference in re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', (await client.get("/openapi.json")).text):
                assert reference in document["components"]["schemas"], reference
            named = {
                example["value"]["code"]
                for response in detect["responses"].values()
                for example in response["content"].get("application/problem+json", {}).get("examples", {}).values()
            }
            assert {"queue_full", "deadline", "too_large", "too_many_pixels", "not_ready", "draining"} <= named

    run(scenario())


def real_operations(app) -> set[tuple[str, str]]:
    """Path and verb of everything that the application answers, as its routers have it."""
    routers = [included.original_router for included in app.routes if hasattr(included, "original_router")]
    return {
        (route.path, verb.lower())
        for router in routers
        for route in router.routes
        if route.endpoint.__name__ != "absent"
        for verb in route.methods - {"HEAD"}
    }


UNDOCUMENTED = {"/", "/dashboard", "/docs"}
"""Pages for people."""
NOT_OFFERED = {"/v2/trace/setting", "/v2/models/{name}/trace/setting", "/v2/logging", "/v2/{kind}sharedmemory/{rest:path}"}
"""Parts of the protocol that are answered 501."""


@pytest.mark.parametrize("admin", [False, True])
def test_openapi_and_its_page_know_every_route(admin, tmp_path):
    key_file(tmp_path / "admins", "root")

    async def scenario():
        async with fake_service(admin_keys_file=tmp_path / "admins" if admin else None) as (client, app, _):
            document = (await client.get("/openapi.json")).json()
            documented = {(path, verb) for path, operations in document["paths"].items() for verb in operations}
            expected = {(path, verb) for path, verb in real_operations(app) if path not in UNDOCUMENTED | NOT_OFFERED}
            assert documented == expected
            assert {("/v2/models/{name}/infer", "post"), ("/v1/detect", "post")} <= documented
            assert (("/v2/repository/models/{name}/load", "post") in documented) is admin
            for path, verb in documented:
                told = document["paths"][path][verb]
                named = {parameter["name"] for parameter in told.get("parameters", ()) if parameter["in"] == "path"}
                assert named == set(re.findall(r"\{(\w+)\}", path)), path

    run(scenario())


def test_openapi_of_a_batch_offers_the_formats_that_it_takes():
    async def scenario():
        async with fake_service() as (client, _, _):
            batch = (await client.get("/openapi.json")).json()["paths"]["/v1/detect/batch"]["post"]
            query = {parameter["name"]: parameter["schema"] for parameter in batch["parameters"]}
            contents = [content["schema"]["properties"] for content in batch["requestBody"]["content"].values()]
            assert list(query) == list(OPTION_NAMES)
            assert [list(fields) for fields in contents] == [["images", *OPTION_NAMES]] * 2
            images = [base64.b64encode(picture()).decode()]
            for name in get_args(DetectOptions.model_fields["format"].annotation):
                in_query = await client.post("/v1/detect/batch", params={"format": name}, json={"images": images})
                in_body = await client.post("/v1/detect/batch", json={"images": images, "format": name})
                offered = all(name in fields["format"]["enum"] for fields in (query, *contents))
                assert [in_query.status_code, in_body.status_code] == [200 if offered else 422] * 2, name
            assert query["format"]["enum"] == ["json"]

    run(scenario())


@pytest.mark.parametrize("locked", [False, True])
def test_openapi_says_which_routes_want_a_key_and_where_it_goes(locked, tmp_path):
    key_file(tmp_path / "keys", "alice")
    key_file(tmp_path / "admins", "root")

    async def scenario():
        keys = {"api_keys_file": tmp_path / "keys"} if locked else {}
        async with fake_service(admin_keys_file=tmp_path / "admins", **keys) as (client, _, _):
            document = (await client.get("/openapi.json")).json()
            schemes = document["components"]["securitySchemes"]
            assert {(scheme["type"], scheme.get("scheme", scheme.get("name"))) for scheme in schemes.values()} == {
                ("http", "bearer"),
                ("apiKey", "X-API-Key"),
            }
            for path, operations in document["paths"].items():
                for verb, operation in operations.items():
                    response = await client.request(verb, path.replace("{name}", "blobs").replace("{version}", "1"))
                    wanted = operation.get("security", [])
                    assert (response.status_code == 401) is bool(wanted and {} not in wanted), (verb, path)
                    assert response.status_code != 401 or "401" in operation["responses"], (verb, path)

    run(scenario())


def test_the_example_answer_is_one_that_the_demo_could_give():
    file = ROOT / "model_repository" / "blood-cells" / "1" / "model.onnx"
    demo = parse_manifest({entry.key: entry.value for entry in onnx.load(file).metadata_props}, "the demo")
    for found in openapi.EXAMPLE_ANSWER["detections"]:
        assert demo.class_names[found["class_id"] - 1] == found["class"]


def test_answers_and_errors_fit_their_schemas():
    jsonschema = pytest.importorskip("jsonschema")

    async def scenario():
        async with fake_service() as (client, _, _):
            schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]

            def check(document, name):
                jsonschema.validate(document, {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})

            check((await client.post("/v1/detect", content=picture(), headers=PNG)).json(), "DetectAnswer")
            check((await client.post("/v1/detect", content=b"x", headers=PNG)).json(), "Problem")
            check((await client.post("/v1/detect/batch", json={"images": ["!!", "eA=="]})).json(), "BatchAnswer")
            check((await client.get("/v1/models")).json(), "ModelList")
            body = service_v2_bodies.request_body(id="seven")
            jsonschema.validate(body, {"$ref": "#/components/schemas/V2Request", "components": {"schemas": schemas}})
            check((await client.post(service_v2_bodies.INFER, json=body)).json(), "V2Answer")
            check((await client.post(service_v2_bodies.INFER, json={})).json(), "V2Error")

    run(scenario())
