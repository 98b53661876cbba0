"""What surrounds every request, as pure ASGI: identity, measurement, headers, keys, and bounds on the body while it is read."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from prometheus_client import Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.auth import KeyRing, require_key
from service.errors import BodyTooLarge, DetectorError, SlowBody
from service.health import Health
from service.metrics import Metrics
from service.problems import error_response

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-[0-9a-f]{2}")
NO_TRACE = "0" * 32
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
KEYED_PREFIXES = ("/v1/", "/v2")
OPEN_PREFIXES = ("/v2/health",)

EVERY_ANSWER_HEADERS = [(b"x-content-type-options", b"nosniff")]
"""Pages add their own, see site.py."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestContext:
    """One request's facts, in `scope["context"]`: routes add to `fields` what its log record should say."""

    request_id: str
    started: float
    """perf_counter seconds at the request's headers."""
    fields: dict[str, Any] = field(default_factory=dict)


class ContextMiddleware:
    """Gives every request an id, counts and times it, adds the headers that every answer has, and writes the access log."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, health: Health, access_log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._health = health
        self._access_log = access_log
        self._seconds: dict[tuple[str, str, int], Histogram] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, trace_id = _identity(scope)
        context = scope["context"] = RequestContext(request_id, time.perf_counter())
        tokens = logs.request_id.set(request_id), logs.trace_id.set(trace_id)
        extra = [(b"x-request-id", request_id.encode()), *EVERY_ANSWER_HEADERS]
        status = 500

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
                if self._health.draining:
                    message["headers"].append((b"connection", b"close"))  # the next request of this client goes to another replica
            await send(message)

        self._metrics.inflight_requests.inc()
        try:
            await self._app(scope, receive, send_marked)
        finally:
            self._metrics.inflight_requests.dec()
            self._observe(scope, context, status)
            logs.request_id.reset(tokens[0])
            logs.trace_id.reset(tokens[1])

    def _observe(self, scope: Scope, context: RequestContext, status: int) -> None:
        seconds = time.perf_counter() - context.started
        route = route_template(scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._histogram(route, method, status).observe(seconds)
        if self._access_log:
            fields = {"route": route, "method": method, "status": status, "ms": round(seconds * 1e3, 2), **context.fields}
            logger.info("request", extra={"fields": fields})

    def _histogram(self, route: str, method: str, status: int) -> Histogram:
        """Kept here, as to find one by its labels costs as much as to observe."""
        labels = route, method, status
        if labels not in self._seconds:
            self._seconds[labels] = self._metrics.request_seconds.labels(*labels)
        return self._seconds[labels]


def route_template(scope: Scope) -> str:
    """The route that answered, with its parameters unfilled: a bounded label."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


def _identity(scope: Scope) -> tuple[str, str | None]:
    request_id = trace_id = None
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            request_id = value.decode()
        elif name == b"traceparent" and (match := TRACEPARENT.fullmatch(value)):
            trace_id = match["trace"].decode()
    return request_id or make_request_id(), trace_id if trace_id != NO_TRACE else None


_PROCESS_PART = uuid.uuid4().hex[:16]
_counter = itertools.count()


def make_request_id() -> str:
    """Unique, and cheap: asking the kernel for randomness each time would give up the interpreter's lock to the decoders."""
    return f"{_PROCESS_PART}{next(_counter):016x}"


class BodyLimitMiddleware:
    """Bounds a body's size and the time to send it, while it is read, whatever Content-Length claims."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reader = _BoundedReader(receive, _claimed_bytes(scope), self._max_bytes, self._timeout_s)
        await self._app(scope, reader.receive, send)


def _claimed_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


class _BoundedReader:
    """One request's `receive`. Errors are raised into whoever reads, so that they are answered like any other."""

    def __init__(self, receive: Receive, claimed_bytes: int, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._claimed_bytes = claimed_bytes
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._read_bytes = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:  # what follows can only be the client's leaving, for which one waits without limit
            return await self._receive()
        self._check(self._claimed_bytes)
        message = await self._receive_in_time()
        self._read_bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        self._check(self._read_bytes)
        return message

    def _check(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise BodyTooLarge(f"a body may have {self._max_bytes} bytes, this one has {nbytes} or more; send a smaller picture")

    async def _receive_in_time(self) -> Message:
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._receive()
        except TimeoutError:
            raise SlowBody(
                f"{self._read_bytes} bytes came in {self._timeout_s:g} s and the body is not complete; send faster or less"
            ) from None


class DirectMiddleware:
    """Takes the requests that there are many of straight to their handlers: the framework's routing costs as much as they do."""

    def __init__(self, app: ASGIApp, *, routes: Sequence[APIRoute]) -> None:
        self._app = app
        self._handlers = {(method, route.path): (route, route.get_route_handler()) for route in routes for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["route"], handler = found
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)


def needs_key(path: str) -> bool:
    """Whether a path is part of the API; health, metrics and pages are for everybody."""
    return path.startswith(KEYED_PREFIXES) and not path.startswith(OPEN_PREFIXES)


class KeyMiddleware:
    """Asks for an API key on the API's paths."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, admin_keys: KeyRing | None, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and needs_key(path):
            try:
                scope["context"].fields["client"] = self._holder(Headers(scope=scope))
            except DetectorError as error:
                self._metrics.rejected["unauthorised"].inc()
                await error_response(error, path)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _holder(self, headers: Headers) -> str:
        try:
            return require_key(headers, self._keys)
        except DetectorError:
            if self._admin_keys is None:
                raise
            return require_key(headers, self._admin_keys)  # an administrator may also use the API
