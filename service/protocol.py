"""One connection of the HTTP server, bounded: how many there may be, how large headers are, how long a client may take."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import DetectorError, HeadersTooLarge, MalformedRequest, NotReady, SlowBody
from service.problems import PROBLEM_TYPE, error_response, problem
from service.settings import Settings

WHOLE_BODY_BYTES = 1 << 20
"""A body that claims no more than this wakes its reader once, when it is complete; larger and chunked ones arrive in pieces."""


def make_protocol(settings: Settings) -> type[BoundedProtocol]:
    """The class of connections that keep to these settings."""
    return type("BoundedProtocol", (BoundedProtocol,), {"settings": settings})


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on connections, on headers, and on the time to send them."""

    settings: ClassVar[Settings]
    """Of the subclass that make_protocol makes: uvicorn itself makes the instances."""
    _header_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_headers = True
    _whole_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_timer is None:
                self._start_header_timer()
        super().data_received(data)
        if self._in_headers and self._header_bytes > self.settings.max_header_bytes and not self.transport.is_closing():
            self._refuse(b"431 Request Header Fields Too Large", _headers_too_large(self._header_bytes, self.settings))

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_header_timer()
        usual_app = self.app
        self.app = self._choose_app()
        self._whole_body = 0 < _claimed_bytes(self.headers) <= WHOLE_BODY_BYTES
        super().on_headers_complete()
        self.app = usual_app

    def on_body(self, body: bytes) -> None:
        if not self._whole_body:
            super().on_body(body)
        elif not self.cycle.response_complete:
            self.cycle.body += body

    def on_message_complete(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer may come before its request's body has: what still comes is read and dropped, but not for ever."""
        super().on_response_complete()
        if self.cycle.response_complete and not self._in_headers:
            self.loop.call_later(self.settings.body_timeout_ms / 1e3, self._cut_unread_body, self.cycle)

    def _cut_unread_body(self, cycle: RequestResponseCycle) -> None:
        if self.cycle is cycle and not self._in_headers:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(b"400 Bad Request", MalformedRequest("this is not HTTP/1.1 as servers understand it; let a client library write it"))

    def _choose_app(self) -> Any:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.settings.max_header_bytes:
            detail = (
                f"request line and headers may have {self.settings.max_header_bytes} bytes, these have {size}; send fewer or shorter ones"
            )
            return _refusing(HeadersTooLarge(detail))
        if len(self.connections) > self.settings.max_connections:
            return _refusing(
                NotReady(f"{self.settings.max_connections} connections are open and no more may be; try again", retry_after_s=1.0)
            )
        return self.app

    def timeout_keep_alive_handler(self) -> None:
        """Idle: close. A client that never reads its answer would keep the closing connection for ever, so it is cut after a while."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.settings.body_timeout_ms / 1e3, self.transport.abort)

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.settings.header_timeout_ms / 1e3, self._headers_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        if self._in_headers and not self.transport.is_closing():
            detail = (
                f"no complete request came in {self.settings.header_timeout_ms} ms; send faster, or open the connection when it is needed"
            )
            self._refuse(b"408 Request Timeout", SlowBody(detail))

    def _refuse(self, status: bytes, error: DetectorError) -> None:
        """Answer below HTTP, where there is no request yet."""
        body = orjson.dumps(problem(error))
        head = f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + head.encode() + body)
        self.transport.close()


def _headers_too_large(size: int, settings: Settings) -> HeadersTooLarge:
    return HeadersTooLarge(
        f"request line and headers may have {settings.max_header_bytes} bytes, these have {size} or more; send fewer or shorter ones"
    )


def _claimed_bytes(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """Content-Length, 0 where there is none."""
    return next((int(value) for name, value in headers if name == b"content-length" and value.isdigit()), 0)


def _refusing(error: DetectorError) -> Response:
    response = error_response(error, "")
    response.headers["connection"] = "close"
    return response
