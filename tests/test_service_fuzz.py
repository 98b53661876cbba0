"""Requests that nobody thought of, against the real process: made from the OpenAPI document, and from broken pictures."""

from __future__ import annotations

import random

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
    use_after_free,
)
from service_fakes import picture
from service_onnx import write_model
from test_service_server import service

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    use_after_free,
]
ANSWERS = {200, 400, 413, 415, 422, 429}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository)
    with service(repository) as running:
        yield running


def test_the_answers_are_the_documented_ones(process):
    load_all_checks()
    config = SchemathesisConfig(suppress_health_check=["all"])
    document = schemathesis.openapi.from_url(process.url + "/openapi.json", config=config)
    operations = [result.ok() for result in document.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/detect", "/v1/detect/batch", "/v1/models/{name}", "/readyz"}
    for operation in operations:
        fuzz_operation(operation)


def fuzz_operation(operation) -> None:
    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate], derandomize=True
    )
    @given(case=operation.as_strategy())
    def each(case):
        case.call_and_validate(checks=CHECKS)

    each()


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Cut, flip, insert or replace."""
    mutated = bytearray(data)
    kind = chance.randrange(4)
    if kind == 0:
        return bytes(mutated[: chance.randrange(1, len(mutated))])
    if kind == 1:
        for _ in range(chance.randrange(1, 30)):
            mutated[chance.randrange(len(mutated))] = chance.randrange(256)
    elif kind == 2:
        at = chance.randrange(len(mutated))
        mutated[at:at] = chance.randbytes(50)
    else:
        mutated = bytearray(chance.randbytes(chance.randrange(2000)))
    return bytes(mutated)


def fuzz_pictures(url: str, count: int) -> None:
    chance = random.Random(5)
    originals = [picture(90, 60, kind=kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    with httpx.Client(timeout=30) as client:
        for _ in range(count):
            data = mutate(chance.choice(originals), chance)
            response = client.post(url + "/v1/detect", content=data, headers={"content-type": "image/jpeg"})
            assert response.status_code in ANSWERS, (response.status_code, response.text, data)
        assert client.post(url + "/v1/detect", content=originals[0]).status_code == 200


def test_broken_pictures_get_a_reason(process):
    fuzz_pictures(process.url, 300)


@pytest.mark.slow
def test_ten_thousand_broken_pictures_get_a_reason_and_memory_stays(process):
    def resident_kib() -> int:
        with open(f"/proc/{process.process.pid}/status") as status:  # noqa: PTH123
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    fuzz_pictures(process.url, 1000)
    before = resident_kib()
    fuzz_pictures(process.url, 10_000)
    assert resident_kib() < 1.2 * before + 20_000
