"""OpenTelemetry spans, where it is installed and configured: by `opentelemetry-instrument`, or by its own OTEL_* variables."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.middleware import METHODS, route_template

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

SERVICE_NAME = "faster-rcnn-service"
UNTRACED_PREFIXES = ("/healthz", "/readyz", "/metrics", "/v2/health")
CONFIGURING_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

logger = logging.getLogger(__name__)


def make_tracer() -> Tracer | None:
    """A tracer, or None where nobody asked for traces. What is asked for and not installed is a warning, for the service works without."""
    try:
        from opentelemetry import trace
    except ImportError:
        _warn_if_asked("opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http are")
        return None
    provider = trace.get_tracer_provider()
    nobody_set_one_up = isinstance(provider, trace.ProxyTracerProvider)
    if nobody_set_one_up and not (_asked() and _set_up_provider()):
        return None
    return trace.get_tracer(SERVICE_NAME)


def _asked() -> bool:
    return any(os.environ.get(name) for name in CONFIGURING_VARIABLES)


def _warn_if_asked(missing: str) -> None:
    if _asked():
        logger.warning("traces were asked for by OTEL_* variables, but %s not installed; going on without", missing)


def _set_up_provider() -> bool:
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _warn_if_asked("opentelemetry-sdk or opentelemetry-exporter-otlp-proto-http is")
        return False
    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE_NAME)}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


class TracingMiddleware:
    """One server span a request, continued from the client's traceparent, with what the route noted: model, sizes, stages.

    Attributes are OpenTelemetry's for HTTP servers, and `detector.*`. Where other instrumentation has opened a span already, that one gets
    them and no second one is made. Probes and scrapes make no spans: they would be nearly all of them.
    """

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(UNTRACED_PREFIXES):
            await self._app(scope, receive, send)
            return
        from opentelemetry import propagate, trace

        current = trace.get_current_span()
        if current.is_recording():
            await self._annotated(current, scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = propagate.extract(headers)
        with self._tracer.start_as_current_span(_method(scope), context=parent, kind=trace.SpanKind.SERVER) as span:
            await self._annotated(span, scope, receive, send)

    async def _annotated(self, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        token = logs.trace_id.set(format(span.get_span_context().trace_id, "032x"))  # also where the trace began here

        async def send_seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_status(span, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            logs.trace_id.reset(token)
            _note_request(span, scope)


def _method(scope: Scope) -> str:
    """For a span's name, which must not have as many values as clients have ideas."""
    return scope["method"] if scope["method"] in METHODS else "HTTP"


def _note_status(span: Span, status: int) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("http.response.status_code", status)
    if status >= 500:  # a client's mistake is no fault of the server's span
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)


def _note_request(span: Span, scope: Scope) -> None:
    route, context = route_template(scope), scope["context"]
    span.update_name(f"{_method(scope)} {route}")
    method = scope["method"] if scope["method"] in METHODS else "_OTHER"
    known = {"http.request.method": method, "http.route": route, "url.scheme": scope.get("scheme", "http")}
    span.set_attributes({**known, "detector.request_id": context.request_id, **_flat(context.fields)})


def _flat(fields: dict[str, Any], prefix: str = "detector") -> dict[str, str | int | float]:
    """{"timing_ms": {"decode": 2.1}} -> {"detector.timing_ms.decode": 2.1}"""
    flat: dict[str, str | int | float] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}.{name}")
        elif isinstance(value, str | int | float):
            flat[f"{prefix}.{name}"] = value
    return flat
