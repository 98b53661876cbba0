"""Protocol bodies that broke other servers, and others that are only wrong: each gets its error, and the service goes on."""

from __future__ import annotations

import gzip
import json
import random
from typing import Any

import pytest
from service_fakes import fake_service, make_manifest, picture, run
from service_v2_bodies import INFER, INFER_TENSOR, LENGTH, Headers, nested, picture_by_length, post, request_body, tensor_body

from service.errors import BodyTooLarge, MalformedRequest
from service.v2_codec import parse_infer
from service.v2_models import PICTURE_INPUTS, TENSOR_INPUTS, output_specs

ONE_IMAGE = {"name": "IMAGE", "shape": [1, 1], "datatype": "BYTES"}
NOTHING: dict[str, Any] = {"data": []}
BAD_REQUESTS: dict[str, tuple[str, Any, Headers, int]] = {
    "negative header length": (INFER, request_body(), {LENGTH: "-1"}, 400),
    "oversized header length": (INFER, request_body(), {LENGTH: "999999999999"}, 400),
    "header length of 40 digits": (INFER, request_body(), {LENGTH: "9" * 40}, 400),
    "header length of 5000 digits": (INFER, request_body(), {LENGTH: "9" * 5000}, 400),
    "header length that is no number": (INFER, request_body(), {LENGTH: "0x10"}, 400),
    "header length that cuts the JSON": (INFER, request_body(), {LENGTH: "20"}, 400),
    "header length of other digits": (INFER, request_body(), {LENGTH: b"\xb2"}, 400),
    "no JSON": (INFER, b"\xff\xd8\xff\xe0 picture", {}, 400),
    "JSON of another kind": (INFER, b"[1, 2]", {}, 400),
    "JSON of depth 500": (INFER_TENSOR, nested(500), {}, 400),
    "JSON of depth 100 000": (INFER_TENSOR, nested(100_000), {}, 400),
    "no inputs": (INFER, {}, {}, 400),
    "inputs of another kind": (INFER, {"inputs": {"name": "IMAGE"}}, {}, 400),
    "too many inputs": (INFER, {"inputs": [{}] * 65}, {}, 400),
    "an unknown input": (INFER, {"inputs": [{"name": "image"}]}, {}, 400),
    "the same input twice": (INFER, {"inputs": request_body()["inputs"] * 2}, {}, 400),
    "the same output twice": (INFER, request_body(outputs=[{"name": "boxes"}, {"name": "boxes"}]), {}, 400),
    "an unknown output": (INFER, request_body(outputs=[{"name": "masks"}]), {}, 400),
    "classification": (INFER, request_body(outputs=[{"name": "scores", "parameters": {"classification": 3}}]), {}, 400),
    "an output in shared memory": (INFER, request_body(outputs=[{"name": "boxes", "parameters": {"shared_memory_region": "a"}}]), {}, 400),
    "an id that is no text": (INFER, request_body(id=7), {}, 400),
    "parameters of another kind": (INFER, request_body(parameters=[1]), {}, 400),
    "a negative timeout": (INFER, request_body(parameters={"timeout": -5}), {}, 400),
    "one input is missing": (INFER_TENSOR, {"inputs": tensor_body()["inputs"][:1]}, {}, 400),
    "another datatype": (INFER_TENSOR, tensor_body(pixels={"datatype": "FP32"}), {}, 400),
    "another rank": (INFER_TENSOR, tensor_body(pixels={"shape": [3, 4, 3]}), {}, 400),
    "a negative shape": (INFER_TENSOR, tensor_body(pixels={"shape": [-1, 3, 4, 3]}), {}, 400),
    "a shape of fractions": (INFER_TENSOR, tensor_body(pixels={"shape": [1.0, 3, 4, 3]}), {}, 400),
    "a shape of truths": (INFER_TENSOR, tensor_body(pixels={"shape": [True, 3, 4, 3]}), {}, 400),
    "a huge shape": (INFER_TENSOR, tensor_body(pixels={"shape": [1, 2**40, 2**40, 3]}), {}, 400),
    "batches that differ": (INFER_TENSOR, tensor_body(sizes={"shape": [2, 2], "data": [3, 4, 3, 4]}), {}, 400),
    "a batch of nothing": (INFER_TENSOR, tensor_body(pixels=NOTHING | {"shape": [0, 3, 4, 3]}, sizes=NOTHING | {"shape": [0, 2]}), {}, 400),
    "too large a batch": (INFER_TENSOR, tensor_body(pixels={"shape": [65, 3, 4, 3]}), {}, 413),
    "too few numbers": (INFER_TENSOR, tensor_body(pixels={"data": [1, 2, 3]}), {}, 400),
    "ragged numbers": (INFER_TENSOR, tensor_body(pixels={"data": [[1, 2], [3]]}), {}, 400),
    "fractions for whole numbers": (INFER_TENSOR, tensor_body(pixels={"data": [0.5] * 36}), {}, 400),
    "numbers beyond a byte": (INFER_TENSOR, tensor_body(pixels={"data": [256] * 36}), {}, 400),
    "numbers beyond 64 bits": (INFER_TENSOR, tensor_body(sizes={"data": [2**70, 4]}), {}, 400),
    "words for numbers": (INFER_TENSOR, tensor_body(pixels={"data": ["a"] * 36}), {}, 400),
    "a size outside the tensor": (INFER_TENSOR, tensor_body(sizes={"data": [4, 4]}), {}, 400),
    "a size of nothing": (INFER_TENSOR, tensor_body(sizes={"data": [0, 4]}), {}, 400),
    "no data": (INFER, {"inputs": [ONE_IMAGE]}, {}, 400),
    "text that is no base64": (INFER, {"inputs": [ONE_IMAGE | {"data": ["h\u00e9llo"]}]}, {}, 400),
    "numbers for a picture": (INFER, {"inputs": [ONE_IMAGE | {"data": [7]}]}, {}, 400),
    "data and binary data": (INFER, {"inputs": [{**request_body()["inputs"][0], "parameters": {"binary_data_size": 0}}]}, {}, 400),
    "an input in shared memory": (INFER, {"inputs": [{"name": "IMAGE", "parameters": {"shared_memory_region": "a"}}]}, {}, 400),
    "an element longer than the body": (INFER, *picture_by_length(picture(), claimed=2**32 - 1), 400),
    "an element shorter than the data": (INFER, *picture_by_length(picture(), claimed=10), 400),
    "fewer elements than the shape": (INFER, *picture_by_length(picture(), count=2), 400),
    "binary data beyond the body": (INFER, *picture_by_length(picture(), size=10**12), 400),
    "bytes left over": (INFER, *picture_by_length(picture(), size=0, count=0), 400),
    "raw data for two inputs": (INFER_TENSOR, b"abc", {LENGTH: "0"}, 400),
    "raw data of nothing": (INFER, b"", {LENGTH: "0"}, 400),
    "raw data that is no picture": (INFER, b"hello, I am no picture", {LENGTH: "0"}, 415),
    "an empty picture": (INFER, *picture_by_length(b""), 400),
    "broken gzip": (INFER, b"\x1f\x8b\x08 nonsense", {"content-encoding": "gzip"}, 400),
    "another encoding": (INFER, b"abc", {"content-encoding": "br"}, 415),
    "a gzip bomb": (INFER, gzip.compress(bytes(40_000_000)), {"content-encoding": "gzip"}, 413),
}  # fmt: skip


def test_bad_requests_get_an_error_each_and_the_service_goes_on() -> None:
    async def ask() -> None:
        async with fake_service() as (client, _, _runtime):
            for name, (path, body, headers, status) in BAD_REQUESTS.items():
                response = await post(client, path, body, headers)
                assert response.status_code == status, f"{name}: {response.text}"
                assert list(response.json()) == ["error"], name
                assert len(response.json()["error"]) > 15, name
            assert (await post(client, INFER, request_body())).status_code == 200

    run(ask())


MEANINGFUL = [b"null", b"-1", b"1e999", b"[[", b"]", b"{}", b'"\\ud800"', b"true", b"99999999999999999999", b"\xff", b","]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, or put in what means something to a parser."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(damaged) + 1)
        match rng.randrange(5):
            case 0 if at < len(damaged):
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                del damaged[at : at + rng.randint(1, 40)]
            case 2:
                damaged[at:at] = damaged[at : at + rng.randint(1, 40)]
            case _:
                damaged[at:at] = rng.choice(MEANINGFUL)
    return bytes(damaged)


def fuzz(count: int, seed: int) -> int:
    """Parse damaged bodies: an error for the client or a request that fits the model, nothing else. Returns how many still fitted."""
    rng, fitting = random.Random(seed), 0
    binary, headers = picture_by_length(picture())
    sources = [
        (json.dumps(request_body(id="a", outputs=[{"name": "boxes"}])).encode(), None, PICTURE_INPUTS),
        (json.dumps(tensor_body(parameters={"timeout": 5, "binary_data_output": True})).encode(), None, TENSOR_INPUTS),
        (binary, headers[LENGTH], PICTURE_INPUTS),
    ]
    for number in range(count):
        body, length, inputs = rng.choice(sources)
        length = rng.choice([length, length, None, "0", "-7", "50"])
        try:
            request = parse_infer(mutate(body, rng), length, inputs, output_specs(make_manifest()), 64)
        except (MalformedRequest, BodyTooLarge):
            continue
        fitting += 1
        assert set(request.inputs) == {spec.name for spec in inputs}, f"seed {seed}, case {number}"
        assert 1 <= request.batch_size <= 64, f"seed {seed}, case {number}"
    return fitting


def test_damaged_bodies() -> None:
    assert 0 < fuzz(1000, seed=1) < 900


@pytest.mark.slow
def test_very_many_damaged_bodies() -> None:
    assert fuzz(100_000, seed=2)
