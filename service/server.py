"""The HTTP server of the process: bounded headers and connections, and a shutdown that loses nothing.

SIGTERM or SIGINT: unready, serve on for `drain_seconds`, stop accepting, finish what is in flight, exit 0.
A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import DetectorError, HeadersTooLarge, MalformedRequest, NotReady, SlowBody
from service.health import Health
from service.problems import PROBLEM_TYPE, error_response, problem
from service.settings import Settings

FINISH_GRACE_S = 5.0
"""Beyond the longest request, before what is still open is cut."""
BACKLOG = 2048
"""Connections that the kernel keeps while the loop is busy."""
WHOLE_BODY_BYTES = 1 << 20
"""A body that claims no more than this wakes its reader once, when it is complete; larger and chunked ones arrive in pieces."""
SWITCH_INTERVAL_S = 0.0005
"""How long one thread may keep Python's lock from another. When a batch is done the event loop answers for milliseconds on end; with the
usual 5 ms the decoders, who need the lock for moments between long stretches of C, would stand still as long."""
FAILURE_GRACE_S = 2.0
"""After a failure for good: time for the answers that say so."""

logger = logging.getLogger(__name__)


def make_protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with bounds on connections, on headers, and on the time to send them."""

    class BoundedProtocol(HttpToolsProtocol):
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
            if self._in_headers and self._header_bytes > settings.max_header_bytes and not self.transport.is_closing():
                self._refuse(b"431 Request Header Fields Too Large", _headers_too_large(self._header_bytes, settings))

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
                self.loop.call_later(settings.body_timeout_ms / 1e3, self._cut_unread_body, self.cycle)

        def _cut_unread_body(self, cycle: RequestResponseCycle) -> None:
            if self.cycle is cycle and not self._in_headers:
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            self._refuse(
                b"400 Bad Request", MalformedRequest("this is not HTTP/1.1 as servers understand it; let a client library write it")
            )

        def _choose_app(self) -> Any:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > settings.max_header_bytes:
                detail = (
                    f"request line and headers may have {settings.max_header_bytes} bytes, these have {size}; send fewer or shorter ones"
                )
                return _refusing(HeadersTooLarge(detail))
            if len(self.connections) > settings.max_connections:
                return _refusing(
                    NotReady(f"{settings.max_connections} connections are open and no more may be; try again", retry_after_s=1.0)
                )
            return self.app

        def timeout_keep_alive_handler(self) -> None:
            """Idle: close. A client that never reads its answer would keep the closing connection for ever, so it is cut after a while."""
            super().timeout_keep_alive_handler()
            self.loop.call_later(settings.body_timeout_ms / 1e3, self.transport.abort)

        def _start_header_timer(self) -> None:
            self._header_timer = self.loop.call_later(settings.header_timeout_ms / 1e3, self._headers_late)

        def _stop_header_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _headers_late(self) -> None:
            self._header_timer = None
            if self._in_headers and not self.transport.is_closing():
                detail = (
                    f"no complete request came in {settings.header_timeout_ms} ms; send faster, or open the connection when it is needed"
                )
                self._refuse(b"408 Request Timeout", SlowBody(detail))

        def _refuse(self, status: bytes, error: DetectorError) -> None:
            """Answer below HTTP, where there is no request yet."""
            body = orjson.dumps(problem(error))
            head = f"content-type: {PROBLEM_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + head.encode() + body)
            self.transport.close()

    return BoundedProtocol


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


class Server(uvicorn.Server):
    """uvicorn with our order of leaving. `exit_code` is 0, or what health failed with."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, health: Health, *, drain_seconds: float) -> None:
        super().__init__(config)
        self.listener = listener
        self.companion: _CompanionServer | None = None
        self._health = health
        self._drain_seconds = drain_seconds

    @property
    def exit_code(self) -> int:
        return self._health.exit_code or 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: unready, and a timer to the stop. Second: stop now. Not passed on to uvicorn, which would end by the signal."""
        if self._health.draining:
            self.should_exit = True
            return
        self._health.draining = True
        logger.info("leaving", extra={"fields": {"signal": signal.Signals(sig).name, "drain_seconds": self._drain_seconds}})

    async def main_loop(self) -> None:
        """Serve until told to stop, then as long again as balancers need to notice."""
        drained_at: float | None = None
        loop = asyncio.get_running_loop()
        counter = 0
        while not await self.on_tick(counter):
            counter = (counter + 1) % 864_000
            if self._health.ended.is_set():
                await self._leave_after_failure()
            if self._health.draining:
                drained_at = drained_at or loop.time() + self._drain_seconds
                self.should_exit = self.should_exit or loop.time() >= drained_at
            await asyncio.sleep(0.1)
        if self.companion is not None:
            self.companion.should_exit = True

    async def _leave_after_failure(self) -> None:
        """A hung device's thread cannot be joined and may hold locks that an orderly end needs, so the process ends at once."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(FAILURE_GRACE_S if self.server_state.tasks else 0.0)
        logging.shutdown()
        os._exit(self.exit_code)


class _CompanionServer(uvicorn.Server):
    """The server of the operations port: it lives and ends with the main one."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.listener = listener

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signals belong to the main server."""


def make_server(app: FastAPI, settings: Settings, *, operations: FastAPI | None = None) -> Server:
    """A server for the app, and its companion on the operations port where there is one, both listening.

    Raises:
        PortTaken: before anything is loaded.
    """
    health: Health = app.state.parts.health
    listener = listen(settings.host, settings.port)
    server = Server(_config(app, settings), listener, health, drain_seconds=settings.drain_seconds)
    if operations is not None and settings.operations_port is not None:
        server.companion = _CompanionServer(_config(operations, settings), listen(settings.host, settings.operations_port))
    return server


class PortTaken(RuntimeError):
    """Somebody else listens there, or the address is not ours."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port or DETECTOR_PORT") from error


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        backlog=BACKLOG,
        http=make_protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_ms / 1e3 + FINISH_GRACE_S),
    )


async def serve(server: Server) -> None:
    """Run the server, and its companion, to their end."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # What is there now stays to the end. Looking through it for garbage would stop every thread for 40 ms, some time under load.
    gc.collect()
    gc.freeze()
    host, port = server.listener.getsockname()[:2]
    logger.info("listening", extra={"fields": {"host": host, "port": port}})
    async with asyncio.TaskGroup() as group:
        if server.companion is not None:
            group.create_task(server.companion._serve(sockets=[server.companion.listener]))
        group.create_task(server.serve(sockets=[server.listener]))
