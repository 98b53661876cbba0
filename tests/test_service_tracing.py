"""Traces with OpenTelemetry's own SDK: spans kept in memory, and spans sent by the real process to a collector on a socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fakes import FakeRuntime, fake_service, make_settings, picture, run, running
from service_onnx import write_model
from test_service_server import Process

from service import app as app_module
from service import tracing
from service.app import create_app
from service.errors import InferenceFailed

trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is an optional part")

PNG = {"content-type": "image/png"}
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
NO_SDK = "opentelemetry-sdk is an optional part"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An exporter that keeps the spans of the next app."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=NO_SDK)
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason=NO_SDK)
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=NO_SDK)
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app_module, "make_tracer", lambda: provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def test_a_span_continues_the_client_s_trace_and_tells_the_stages(spans: Any) -> None:
    async def scenario() -> None:
        async with running(create_app(make_settings(), runtime=FakeRuntime())) as client:
            headers = {**PNG, "traceparent": TRACEPARENT, "x-request-id": "order-7"}
            assert (await client.post("/v1/detect", content=picture(), headers=headers)).status_code == 200

    run(scenario())
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind) == ("POST /v1/detect", trace.SpanKind.SERVER)
    assert format(span.context.trace_id, "032x") == TRACE_ID
    assert format(span.parent.span_id, "016x") == SPAN_ID
    assert span.parent.is_remote
    assert span.end_time > span.start_time
    found = dict(span.attributes)
    assert {name: found[name] for name in ("http.request.method", "http.route", "http.response.status_code", "url.scheme")} == {
        "http.request.method": "POST", "http.route": "/v1/detect", "http.response.status_code": 200, "url.scheme": "http",
    }  # fmt: skip
    assert (found["detector.model"], found["detector.request_id"], found["detector.image.width"]) == ("blobs@1", "order-7", 90)
    assert all(found[f"detector.timing_ms.{stage}"] >= 0 for stage in ("decode", "queue", "infer", "total"))
    assert span.status.status_code is trace.StatusCode.UNSET


def test_the_client_s_decision_not_to_sample_is_kept(spans: Any) -> None:
    async def scenario() -> None:
        async with running(create_app(make_settings(), runtime=FakeRuntime())) as client:
            await client.get("/v1/models", headers={"traceparent": TRACEPARENT[:-2] + "00"})

    run(scenario())
    assert spans.get_finished_spans() == ()


def test_a_trace_that_begins_here_is_in_the_log_too(spans: Any, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str | None] = []

    async def scenario() -> None:
        async with running(create_app(make_settings(), runtime=FakeRuntime())) as client:
            parts = client._transport.app.state.parts  # type: ignore[attr-defined]
            resolve = parts.repository.resolve

            def noting(reference: str | None) -> Any:
                seen.append(tracing.logs.trace_id.get())
                return resolve(reference)

            parts.repository.resolve = noting
            await client.get("/v1/models/blobs")
            await client.get("/v1/models/blobs", headers={"traceparent": "nonsense"})

    run(scenario())
    ids = [format(span.context.trace_id, "032x") for span in spans.get_finished_spans()]
    assert len(set(ids)) == 2
    assert list(dict.fromkeys(seen)) == ids


def test_errors_of_the_service_mark_the_span_and_errors_of_the_client_do_not(spans: Any) -> None:
    async def scenario() -> None:
        async with fake_service() as (client, app, _):
            assert (await client.post("/v1/detect", content=b"", headers=PNG)).status_code == 400
            assert (await client.get("/nothing/here")).status_code == 404
            assert (await client.request("BREW", "/v1/models")).status_code == 405

            async def broken(*args: object, **kwargs: object) -> None:
                raise InferenceFailed("the device stumbled")

            app.state.parts.pipeline.detect = broken
            assert (await client.post("/v1/detect", content=picture(), headers=PNG)).status_code == 500
            for path in ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"):
                assert (await client.get(path)).status_code == 200

    run(scenario())
    told = [(span.name, span.attributes["http.response.status_code"], span.status.status_code.name) for span in spans.get_finished_spans()]
    assert told == [
        ("POST /v1/detect", 400, "UNSET"),
        ("GET unmatched", 404, "UNSET"),
        ("HTTP /v1/models", 405, "UNSET"),
        ("POST /v1/detect", 500, "ERROR"),
    ]
    assert spans.get_finished_spans()[3].attributes["error.type"] == "500"
    assert spans.get_finished_spans()[2].attributes["http.request.method"] == "_OTHER"


def test_a_span_that_others_opened_is_annotated_and_no_second_one_made(spans: Any) -> None:
    """As under `opentelemetry-instrument`."""

    async def scenario() -> None:
        app = create_app(make_settings(), runtime=FakeRuntime())
        tracer = app_module.make_tracer()
        assert tracer is not None
        async with running(app) as client:
            with tracer.start_as_current_span("outer", kind=trace.SpanKind.SERVER):
                await client.get("/v1/models")

    run(scenario())
    (span,) = spans.get_finished_spans()
    assert (span.name, span.attributes["http.route"], span.attributes["http.response.status_code"]) == ("GET /v1/models", "/v1/models", 200)


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An OTLP collector's door: its address, and what was posted to it."""
    posted: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_process_sends_its_spans_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="opentelemetry-exporter-otlp-proto-http is optional"
    )
    service_pb = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason=NO_SDK)
    write_model(tmp_path)
    with collector() as (endpoint, posted):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        process = Process(tmp_path, access_log=True, log_format="json")
        try:
            process.until_ready()
            answer = httpx.post(process.url + "/v1/detect", content=picture(), headers={**PNG, "traceparent": TRACEPARENT})
            assert answer.status_code == 200
        finally:
            assert process.stop() == 0
    requests = [service_pb.ExportTraceServiceRequest.FromString(body) for path, body in posted if path == "/v1/traces"]
    resources = [resource for request in requests for resource in request.resource_spans]
    sent = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert len(sent) == 1  # none of probes, and no second one by the framework
    span = sent[0]
    assert (span.name, span.trace_id.hex()) == ("POST /v1/detect", TRACE_ID)
    names = {attribute.key: attribute.value.string_value for attribute in resources[0].resource.attributes}
    assert names["service.name"] == "faster-rcnn-service"
    logged = [json.loads(line) for line in process.log if '"route":"/v1/detect"' in line]
    assert [line["trace_id"] for line in logged] == [TRACE_ID]


def test_nobody_asked_means_no_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.CONFIGURING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert tracing.make_tracer() is None


def test_asked_for_and_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As where only the API came along with another package."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert tracing.make_tracer() is None
    assert "not installed" in caplog.text
