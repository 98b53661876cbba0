"""The load tool's HTTP client: callbacks on raw connections, because the generator shares its cores with what it measures.

A request costs one write of prepared bytes and one pass of llhttp (httptools) over the answer: 41 us of CPU with bodies of 100 KB,
where aiohttp's client takes 118 us, both on uvloop. Keep-alive, no pipelining, no redirects, no TLS.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import SplitResult, urlsplit

import httptools

from benchmarks.load_pictures import Picture

CONNECTION_FAILED = 0
"""In the place of a status: refused, reset or closed in mid-answer."""
TIMED_OUT = -1
SWEEP_S = 0.1


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what became of it. Times are time.perf_counter() seconds."""

    picture: int
    scheduled: float
    on_done: Callable[[Exchange], None]
    sent: float = 0.0
    done: float = 0.0
    status: int = CONNECTION_FAILED
    retry_after: bool = False
    body: bytes = b""
    retried: bool = False


def parse_target(url: str) -> SplitResult:
    """Split a URL that the tool can load.

    Raises:
        ValueError: not http://host[:port]/path.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r}: expected http://host:port/path, for example http://127.0.0.1:8000/v1/detect")
    return parts


def prepare_request(target: SplitResult, picture: Picture, headers: Sequence[str] = ()) -> bytes:
    """The bytes of one POST."""
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {target.netloc}",
        "User-Agent: detector-load",
        "Accept: application/json",
        f"Content-Type: {picture.content_type}",
        f"Content-Length: {len(picture.body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + picture.body


class Client:
    """A pool of connections to one server; `fire` never waits."""

    def __init__(
        self, host: str, port: int, requests: Sequence[bytes], *, max_connections: int, timeout_s: float, keep_bodies: bool = False
    ) -> None:
        """Prepare the pool.

        Args:
            host: where to connect.
            port: its port.
            requests: the bytes of each picture's request; exchanges name them by index.
            max_connections: more requests than this wait here, and their wait counts.
            timeout_s: an exchange that takes longer after it was sent ends as TIMED_OUT.
            keep_bodies: whether exchanges keep the answers' bodies.
        """
        self._address = (host, port)
        self._requests = requests
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self.keep_bodies = keep_bodies
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._connecting = 0
        self._closed = False
        self._waiting: deque[Exchange] = deque()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    @property
    def outstanding(self) -> int:
        """Requests fired and not yet done."""
        return sum(1 for connection in self._open if connection.exchange) + len(self._waiting) + self._connecting

    def fire(self, exchange: Exchange) -> None:
        """Send now if a connection is free or may be opened, else as soon as one is."""
        if self._idle:
            self._send(self._idle.pop(), exchange)
        elif len(self._open) + self._connecting < self._max_connections:
            self._connecting += 1
            task = self._loop.create_task(self._connect(exchange))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._waiting.append(exchange)

    def close(self) -> None:
        """Drop every connection; exchanges still open end as TIMED_OUT."""
        self._closed = True
        self._sweeper.cancel()
        for connection in list(self._open):
            connection.abort(TIMED_OUT)
        while self._waiting:
            exchange = self._waiting.popleft()
            exchange.status = TIMED_OUT
            exchange.sent = exchange.done = time.perf_counter()
            exchange.on_done(exchange)

    async def _connect(self, exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await self._loop.create_connection(lambda: _Connection(self), *self._address)
        except (OSError, TimeoutError) as error:
            self._connecting -= 1
            exchange.sent = exchange.done = time.perf_counter()
            exchange.status = TIMED_OUT if isinstance(error, TimeoutError) else CONNECTION_FAILED
            exchange.on_done(exchange)
            return
        self._connecting -= 1
        self._open.add(connection)
        self._send(connection, exchange)

    def _send(self, connection: _Connection, exchange: Exchange) -> None:
        exchange.sent = time.perf_counter()
        connection.send(self._requests[exchange.picture], exchange)

    def finished(self, connection: _Connection, exchange: Exchange, *, reusable: bool) -> None:
        """A connection ended its exchange."""
        if reusable:
            if self._waiting and not self._closed:
                self._send(connection, self._waiting.popleft())
            else:
                self._idle.append(connection)
        exchange.on_done(exchange)

    def lost(self, connection: _Connection) -> None:
        """A connection is gone; the next request in line may open another."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting and not self._closed:
            self.fire(self._waiting.popleft())

    def _sweep(self) -> None:
        oldest = time.perf_counter() - self._timeout_s
        for connection in [c for c in self._open if c.exchange is not None and c.exchange.sent < oldest]:
            connection.abort(TIMED_OUT)
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one exchange on it. Methods named on_* are called by the parser."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._answered = False
        self._used = 0
        self.exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by behaviour, not by inheritance

    def send(self, request: bytes, exchange: Exchange) -> None:
        assert self._transport is not None
        self.exchange = exchange
        self._answered = False
        self._chunks.clear()
        self._used += 1
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort(CONNECTION_FAILED)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.exchange is not None and name.lower() == b"retry-after":
            self.exchange.retry_after = True

    def on_body(self, data: bytes) -> None:
        if self._client.keep_bodies:
            self._chunks.append(data)

    def on_message_complete(self) -> None:
        exchange, self.exchange = self.exchange, None
        status = self._parser.get_status_code()
        keep = self._parser.should_keep_alive()
        if exchange is None or status < 200:
            self.exchange = exchange
            return
        exchange.done = time.perf_counter()
        exchange.status = status
        exchange.body = b"".join(self._chunks)
        # The server may answer before the whole body is sent (413); what is left to send would be taken for the next request.
        assert self._transport is not None
        keep = keep and self._transport.get_write_buffer_size() == 0
        self._parser = httptools.HttpResponseParser(self)
        self._client.finished(self, exchange, reusable=keep)
        if not keep:
            self._transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        exchange, self.exchange = self.exchange, None
        self._client.lost(self)
        if exchange is None:
            return
        if self._used > 1 and not self._answered and not exchange.retried:
            exchange.retried = True  # the server closed an idle connection just as we wrote: as browsers do, once more on another one
            self._client.fire(exchange)
            return
        exchange.done = time.perf_counter()
        self._client.finished(self, exchange, reusable=False)

    def abort(self, status: int) -> None:
        exchange, self.exchange = self.exchange, None
        assert self._transport is not None
        self._transport.abort()
        if exchange is not None:
            exchange.status = status
            exchange.done = time.perf_counter()
            self._client.finished(self, exchange, reusable=False)
