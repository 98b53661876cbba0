from __future__ import annotations

import contextlib

import pytest
from service_fakes import FakeRuntime, make_settings, picture, run, running

from service import app as app_module
from service import tracing
from service.app import create_app

trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is an optional part")

PNG = {"content-type": "image/png"}
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class RecordedSpan(trace.NonRecordingSpan):
    def __init__(self, context, name):
        super().__init__(context)
        self.name, self.attributes = name, {}

    def set_attribute(self, key, value):
        self.attributes[key] = value

    def set_attributes(self, attributes):
        self.attributes |= attributes

    def update_name(self, name):
        self.name = name


class RecordingTracer(trace.NoOpTracer):
    """Keeps every span, with its parent's trace."""

    def __init__(self):
        self.spans = []

    @contextlib.contextmanager
    def start_as_current_span(self, name, context=None, **_):
        span = RecordedSpan(trace.get_current_span(context).get_span_context(), name)
        self.spans.append(span)
        yield span


def test_a_span_continues_the_client_s_trace_and_tells_the_stages(monkeypatch):
    tracer = RecordingTracer()
    monkeypatch.setattr(app_module, "make_tracer", lambda: tracer)

    async def scenario():
        async with running(create_app(make_settings(), runtime=FakeRuntime())) as client:
            headers = {**PNG, "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
            assert (await client.post("/v1/detect", content=picture(), headers=headers)).status_code == 200

    run(scenario())
    (span,) = tracer.spans
    assert span.name == "POST /v1/detect"
    assert format(span.get_span_context().trace_id, "032x") == TRACE_ID
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["detector.model"] == "blobs@1"
    assert span.attributes["detector.timing_ms.infer"] >= 0
    assert span.attributes["detector.image.width"] == 90


def test_nobody_asked_means_no_tracer(monkeypatch):
    for name in tracing.CONFIGURING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert tracing.make_tracer() is None


def test_asked_for_and_not_installed_is_a_warning(monkeypatch, caplog):
    pytest.importorskip("opentelemetry")
    with contextlib.suppress(ImportError):
        import opentelemetry.sdk  # noqa: F401

        pytest.skip("the SDK is installed here")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert tracing.make_tracer() is None
    assert "not installed" in caplog.text
