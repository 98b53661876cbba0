"""The service as a Ray Serve application: one replica a device, each with the same scheduler, runtime, API and metrics as one process.

serve run deploy.ray.app:application                                           the bundled demo, one replica on CPUs
serve run deploy.ray.app:application provider=cuda num_gpus=1 max_replicas=8   one GPU under each replica

Ray starts, places, watches, scales and replaces replicas; batching, deadlines and refusals stay where the device is, in the replica's
scheduler. Other arguments are the service's settings by name. Ray's own switches for this application are in serve.env beside this file;
what they bring is measured in README.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import ray
import uvicorn
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.app import create_app, create_operations_app
from service.runtime import Runtime
from service.settings import Settings, load_settings

OpenRuntime = Callable[[], Runtime]
HEALTH_PERIOD_S = 5.0
FINISH_S = 5.0
"""Beyond the longest request, for a replica that leaves."""

logger = logging.getLogger(__name__)


@serve.deployment
@serve.ingress()
class Detector:
    """One replica: the whole ASGI application around one device."""

    def __init__(self, settings: Settings, open_runtime: OpenRuntime | None, targets: Path | None) -> None:
        """Prepare.

        Args:
            settings: the service's settings.
            open_runtime: makes a runtime in place of the model repository: simulated devices.
            targets: folder for Prometheus' file_sd_configs, one file a replica; None: metrics stay in the replica.
        """
        logs.configure_logs(settings.log_level, settings.log_format)
        self._app = create_app(settings, runtime=open_runtime() if open_runtime is not None else None)
        self._app.add_middleware(RequestIdOnce)
        surround_lifespan(self._app, targets)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray asks for the application once the replica is there."""
        return self._app

    async def check_health(self) -> None:
        """A lost or hung device is for good: Ray replaces a replica that raises here."""
        failure = self._app.state.parts.health.failure
        if failure is not None:
            raise RuntimeError(failure)

    async def describe(self) -> dict[str, int]:
        """Which process this is, and how many images it holds: for tests and for people."""
        return {"pid": os.getpid(), "images": self._app.state.parts.pipeline.images_in_house}


class RequestIdOnce:
    """Ray gives a request an id where its client did not, and adds it to the answer; the service uses the same id and need not add it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, the answer without its X-Request-ID."""

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without_id)


def surround_lifespan(app: FastAPI, targets: Path | None) -> None:
    """A replica counts as started when its models are warm and checked, and while it runs it can be scraped."""
    usual = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with usual(app):
            await _until_loaded(app)
            async with _scraped(app, targets) if targets is not None else contextlib.nullcontext():
                yield

    app.router.lifespan_context = lifespan


async def _until_loaded(app: FastAPI) -> None:
    health = app.state.parts.health
    while health.reason_not_ready() is not None:
        if health.failure is not None:
            raise RuntimeError(health.failure)
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def _scraped(app: FastAPI, targets: Path) -> AsyncIterator[None]:
    """Serve /metrics and the admin routes of this replica on a port of its own, since the proxy's address stands for all replicas."""
    listener = socket.create_server((ray.util.get_node_ip_address(), app.state.parts.settings.operations_port or 0))
    server = uvicorn.Server(uvicorn.Config(create_operations_app(app.state.parts), log_config=None, lifespan="off"))
    server.capture_signals = contextlib.nullcontext  # signals belong to Ray
    task = asyncio.create_task(server.serve(sockets=[listener]))
    file = await asyncio.to_thread(_write_target, targets, *listener.getsockname())
    try:
        yield
    finally:
        await asyncio.to_thread(file.unlink, missing_ok=True)
        server.should_exit = True
        await task


def _write_target(targets: Path, host: str, port: int) -> Path:
    """Tell Prometheus of this replica, and remove what killed replicas of this machine left behind."""
    targets.mkdir(parents=True, exist_ok=True)
    for file in targets.glob(f"{host}-*.json"):
        if not Path("/proc", file.stem.rpartition("-")[2]).exists():
            file.unlink(missing_ok=True)
    file = targets / f"{host}-{os.getpid()}.json"
    file.write_text(json.dumps([{"targets": [f"{host}:{port}"], "labels": {"job": "detector"}}]))
    return file


def make_application(
    settings: Settings,
    *,
    min_replicas: int = 1,
    max_replicas: int = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    max_ongoing_requests: int | None = None,
    open_runtime: OpenRuntime | None = None,
    targets: Path | None = None,
) -> Application:
    """The application for serve.run.

    Args:
        settings: the service's settings; `host` and `port` are Ray's business.
        min_replicas, max_replicas: bounds of the autoscaler; equal numbers switch it off.
        num_gpus, num_cpus: what Ray sets aside for each replica.
        max_ongoing_requests: most requests in one replica; default: all that its queue takes, and some that it may refuse with the truth.
        open_runtime, targets: see Detector.
    """
    room = max_ongoing_requests or settings.max_queue_images + 2 * settings.max_batch_size
    scaling: dict[str, Any] = {"num_replicas": min_replicas}
    if max_replicas > min_replicas:
        # Two full batches in each replica: one that runs, and one that forms meanwhile.
        target = 2 * settings.max_batch_size
        scaling = {
            "autoscaling_config": {
                "min_replicas": min_replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": target,
                "upscale_delay_s": 10,
                "downscale_delay_s": 300,
            }
        }
    return Detector.options(
        **scaling,
        logging_config=LoggingConfig(enable_access_log=False),  # the service writes its own where it is asked for
        ray_actor_options={"num_gpus": num_gpus, "num_cpus": num_cpus},
        max_ongoing_requests=room,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=settings.request_timeout_ms / 1e3 + FINISH_S,
    ).bind(settings, open_runtime, targets)


def application(arguments: dict[str, str]) -> Application:
    """What `serve run` calls with its NAME=VALUE arguments: make_application's numbers, `targets`, and settings of the service."""
    given = dict(arguments)
    numbers = {name: int(given.pop(name)) for name in ("min_replicas", "max_replicas", "max_ongoing_requests") if name in given}
    shares = {name: float(given.pop(name)) for name in ("num_gpus", "num_cpus") if name in given}
    targets = Path(given.pop("targets")) if "targets" in given else None
    return make_application(load_settings(**given), **numbers, **shares, targets=targets)
