"""From an HTTP request to bytes, and from a client's leaving to cancelled work: what every detecting route needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from service.bodies import inflate
from service.errors import BadOption, DetectorError
from service.middleware import RequestContext
from service.parts import Parts, parts_of
from service.problems import error_response

T = TypeVar("T")

CLIENT_CLOSED = 499
"""Never sent, since nobody listens; only counted."""
MAX_QUERY_FIELDS = 300


class DetectingRoute(APIRoute):
    """A route whose endpoint takes the request and gives a response, without the framework's dependency machinery.

    Errors are counted as refused images; a client that leaves ends the work quietly.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint itself, guarded."""
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            try:
                response: Response = await endpoint(request)
            except DetectorError as error:
                parts_of(request).pipeline.count_refusal(error)
                return error_response(error, request.scope["path"])
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED)
            return response

        return handle


def context_of(request: Request) -> RequestContext:
    """When the request began and what its log record says."""
    context: RequestContext = request.scope["context"]
    return context


def query_pairs(request: Request) -> Iterable[tuple[str, str]]:
    """The query's fields in order. Raises BadOption for one that no client would send."""
    query: bytes = request.scope["query_string"]
    if not query:
        return ()
    try:
        return parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
    except ValueError as error:
        raise BadOption(f"the query cannot be read: {error}") from error


@asynccontextmanager
async def held_body(request: Request, parts: Parts) -> AsyncIterator[bytes]:
    """Read the whole body, inflated if it came compressed, and count its bytes for as long as it is used.

    Raises:
        QueueFull, BodyTooLarge, SlowBody, UnsupportedType, MalformedRequest, ClientDisconnect.
    """
    started = time.perf_counter()
    claimed = request.headers.get("content-length", "")
    # A chunked body claims nothing, so it counts as the largest until it is there.
    reserved = min(int(claimed), parts.settings.max_upload_bytes) if claimed.isdigit() else parts.settings.max_upload_bytes
    with parts.pipeline.hold_bytes(reserved):
        body = await _read(request.receive)
        parts.metrics.stage_seconds["read"].observe(time.perf_counter() - started)
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        body = await parts.pipeline.compute(inflate, body, encoding, parts.settings.max_upload_bytes)
    with parts.pipeline.hold_bytes(len(body)):
        yield body


async def _read(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await the work; cancel it when the client goes away. The body must have been read to its end.

    Raises:
        ClientDisconnect: the client left first.
    """
    current = asyncio.current_task()
    assert current is not None  # a coroutine runs in a task
    working = True

    def stop(_: asyncio.Future[Any]) -> None:
        if working:
            current.cancel()

    watcher = asyncio.ensure_future(receive())
    watcher.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError:
        if not watcher.done() or watcher.cancelled():
            raise  # somebody else cancelled
        current.uncancel()
        raise ClientDisconnect from None
    finally:
        working = False
        watcher.cancel()
