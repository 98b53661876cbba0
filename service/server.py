"""The HTTP server of the process: bounded headers and connections, and a shutdown that loses nothing.

SIGTERM or SIGINT: unready, serve on for `drain_seconds`, stop accepting, finish what is in flight, exit 0.
A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.health import Health
from service.protocol import make_protocol
from service.settings import Settings

FINISH_GRACE_S = 5.0
"""Beyond the longest request, before what is still open is cut."""
BACKLOG = 2048
"""Connections that the kernel keeps while the loop is busy."""
SWITCH_INTERVAL_S = 0.0005
"""How long one thread may keep Python's lock from another. When a batch is done the event loop answers for milliseconds on end; with the
usual 5 ms the decoders, who need the lock for moments between long stretches of C, would stand still as long."""
FAILURE_GRACE_S = 2.0
"""After a failure for good: time for the answers that say so."""

logger = logging.getLogger(__name__)


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
    _warn_if_open(listener, settings)
    server = Server(_config(app, settings), listener, health, drain_seconds=settings.drain_seconds)
    if operations is not None and settings.operations_port is not None:
        server.companion = _CompanionServer(_config(operations, settings), listen(settings.host, settings.operations_port))
    return server


def _warn_if_open(listener: socket.socket, settings: Settings) -> None:
    """A newcomer's machine may stand in a network that is not theirs."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if settings.api_keys_file is None and not address.is_loopback:
        where = f"port {port} at any address of this machine" if address.is_unspecified else f"{host} port {port}"
        logger.warning(
            "no key is asked for: whoever reaches %s may use the API; DETECTOR_HOST=127.0.0.1 keeps it to this machine, "
            "DETECTOR_API_KEYS_FILE asks for keys",
            where,
        )


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
