"""Joins the parts: the only module that knows all others. What each needs of the settings it gets from here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service import __version__, admin, catalogue, openapi, routes, site, v2, v2_openapi
from service.auth import KeyRing, read_keys
from service.device_errors import DeviceLost
from service.head import HeadMiddleware
from service.health import EXIT_DEVICE_LOST, EXIT_NO_MODEL, Health
from service.images import ImageLimits
from service.inference import make_steps
from service.loading import Loader, from_runtime, open_onnx, require_models
from service.metrics import Metrics
from service.middleware import BodyLimitMiddleware, ContextMiddleware, DirectMiddleware, KeyMiddleware, needs_key
from service.parts import Parts
from service.pipeline import Pipeline
from service.problems import install_handlers
from service.quota import cpu_quota
from service.repository import Repository
from service.requests import DetectingRoute
from service.runtime import Runtime
from service.scheduler import Scheduler
from service.settings import Settings, load_settings
from service.shadow import Shadow
from service.status import status_router
from service.tracing import TracingMiddleware, make_tracer
from service.vitals import ServiceObserver, make_canary, measure_loop_lag, watch_devices, watch_queue

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

DESCRIPTION = (
    "Post a picture, get boxes, classes and scores. "
    "Errors are problem+json (RFC 9457) with a stable `code` and a `detail` that says what to do. "
    "Where the operator asks for keys, send yours as `Authorization: Bearer KEY` or `X-API-Key: KEY`."
)

NO_TRACES: TelemetryConfig = {"tracing": False}
"""Of the framework's own: it does not see the routes that are taken directly, and would double `service.tracing`'s."""
CLOSE_GRACE_S = 10.0
"""For batches that run when the process stops."""

logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None, *, runtime: Runtime | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        settings: None reads the environment.
        runtime: serves this one in place of a repository: tests, and load tests with a simulated device.

    Raises:
        SettingsError, KeyFileError: before anything starts.
    """
    settings = settings or load_settings()
    parts = _make_parts(settings, runtime)
    app = FastAPI(
        title="faster-rcnn-service",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TRACES,
        lifespan=_lifespan(parts, runtime),
    )
    app.state.parts = parts
    install_handlers(app)
    for router in (routes.detecting, catalogue.router, status_router(operations=settings.operations_port is None), site.page_router()):
        app.include_router(router)
    app.include_router(v2.OpenInference(parts).router())
    _include_admin(app, parts, elsewhere=settings.operations_port)
    app.router.routes.append(site.page_files())
    _surround(app, parts)
    _complete_openapi(app, parts)
    return app


def create_operations_app(parts: Parts) -> FastAPI:
    """The application for `operations_port`: health, metrics, dashboard and admin routes. It shares the parts and starts nothing."""
    app = FastAPI(title="faster-rcnn-service operations", version=__version__, docs_url=None, redoc_url=None, telemetry=NO_TRACES)
    app.state.parts = parts
    app.add_middleware(HeadMiddleware)
    install_handlers(app)
    app.include_router(status_router(operations=True))
    app.include_router(site.page_router(["/dashboard"]))  # it reads the /metrics beside it
    _include_admin(app, parts, elsewhere=None)
    app.router.routes.append(site.page_files())
    _complete_openapi(app, parts)
    return app


def _include_admin(app: FastAPI, parts: Parts, *, elsewhere: int | None) -> None:
    """The routes that change the service: here, on the port `elsewhere`, or nowhere."""
    routers = [admin.router, v2.admin_router]
    if parts.admin_keys is None:
        why = "admin routes are off here; set DETECTOR_ADMIN_KEYS_FILE to a file with a line of `python -m service key NAME`"
        routers = [admin.absent_routes(routers, why)]
    elif elsewhere is not None:
        routers = [admin.absent_routes(routers, f"admin routes are on the operations port here, {elsewhere} (DETECTOR_OPERATIONS_PORT)")]
    for router in routers:
        app.include_router(router)


def _make_parts(settings: Settings, runtime: Runtime | None) -> Parts:
    metrics = Metrics(triton_aliases=settings.metrics_triton_aliases)
    health = Health(canary_seconds=settings.canary_seconds)
    devices = [0] if runtime is not None else [int(device) for device in settings.device_ids]
    loader = None if runtime is not None else _make_loader(settings, devices, metrics)
    scheduler = Scheduler(
        devices=len(devices),
        max_queue_images=settings.max_queue_images,
        max_queue_bytes=settings.max_queue_bytes,
        observer=ServiceObserver(metrics, health),
        on_device_lost=partial(_lose_device, metrics, health, loader),
    )
    watch_queue(scheduler, metrics)
    metrics.devices.set_function(lambda: float(scheduler.devices))
    repository = Repository(loader, scheduler, metrics, lambda loaded: make_steps(loaded, metrics), max_batch_size=settings.max_batch_size)
    pipeline = Pipeline(
        scheduler,
        metrics,
        ImageLimits(max_bytes=settings.max_upload_bytes, max_pixels=settings.max_image_pixels),
        decode_threads=settings.decode_threads or cpu_quota(),
        max_images=settings.max_queue_images,
        max_bytes=settings.max_queue_bytes,
    )
    return Parts(settings, metrics, scheduler, repository, pipeline, health, _keys(settings.api_keys_file), _keys(settings.admin_keys_file))


def _lose_device(metrics: Metrics, health: Health, loader: Loader | None, index: int, error: BaseException, left: int) -> None:
    """The other devices go on and new versions are loaded on them alone; without one left the process ends."""
    metrics.device_errors["lost"].inc()
    if loader is not None:
        loader.lose(index)
    if left == 0:
        health.fail(f"the device is lost: {error}", EXIT_DEVICE_LOST)


def _keys(path: Path | None) -> KeyRing | None:
    return read_keys(path) if path is not None else None


def _make_loader(settings: Settings, devices: Sequence[int], metrics: Metrics) -> Loader:
    open_runtime = open_onnx(
        provider=settings.provider,
        intra_op_threads=settings.intra_op_threads,
        gpu_memory_limit_bytes=settings.gpu_memory_limit_bytes,
        cuda_graphs=settings.cuda_graphs,
        on_unsettled=metrics.nms_unconverged.inc,
    )
    return Loader(settings.model_repository, open_runtime, devices=devices, max_batch_size=settings.max_batch_size)


def _surround(app: FastAPI, parts: Parts) -> None:
    """Middleware; the one that is added last is the outermost."""
    settings = parts.settings
    app.add_middleware(HeadMiddleware)
    app.add_middleware(DirectMiddleware, routes=[route for route in routes.detecting.routes if isinstance(route, DetectingRoute)])
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_upload_bytes, timeout_s=settings.body_timeout_ms / 1e3)
    if parts.api_keys is not None:
        app.add_middleware(KeyMiddleware, keys=parts.api_keys, admin_keys=parts.admin_keys, metrics=parts.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id", "traceparent"],
            expose_headers=["x-request-id", "server-timing", "retry-after"],
        )
    tracer = make_tracer()
    if tracer is not None:
        app.add_middleware(TracingMiddleware, tracer=tracer)
    app.add_middleware(ContextMiddleware, metrics=parts.metrics, health=parts.health, access_log=settings.access_log)


def _complete_openapi(app: FastAPI, parts: Parts) -> None:
    """The routes that parse their own requests refer to schemas that the framework does not see, and keys are asked for around it."""
    framework_openapi = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = framework_openapi()
            openapi.add_schemas(document, v2_openapi.SCHEMAS)
            openapi.add_keys(document, needs_key, optional=parts.api_keys is None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]


def _lifespan(parts: Parts, runtime: Runtime | None) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.scheduler.start()
        tasks = [asyncio.create_task(work) for work in _background(parts, runtime)]
        try:
            yield
        finally:
            await _stop(parts, tasks)

    return lifespan


def _background(parts: Parts, runtime: Runtime | None) -> list[Coroutine[Any, Any, None]]:
    settings = parts.settings
    work = [
        _load_models(parts, runtime),
        measure_loop_lag(parts.metrics),
        watch_devices(parts.scheduler, parts.health, settings.watchdog_seconds),
    ]
    if settings.watch_repository_seconds:
        work.append(parts.repository.watch(settings.watch_repository_seconds))
    return work


async def _load_models(parts: Parts, runtime: Runtime | None) -> None:
    """Load aside while the server already answers /healthz; ready when every model is warm and checked."""
    settings = parts.settings
    try:
        if runtime is not None:
            parts.repository.adopt(await asyncio.to_thread(from_runtime, runtime, settings.max_batch_size))
        else:
            await parts.repository.start(require_models(settings.model_repository, settings.model))
    except Exception as error:
        logger.debug("loading failed", exc_info=error)
        parts.health.fail(str(error), EXIT_DEVICE_LOST if isinstance(error, DeviceLost) else EXIT_NO_MODEL)
        return
    if settings.shadow is not None and runtime is None:
        await _start_shadow(parts, settings.shadow)
    parts.health.loaded(make_canary(parts.repository, parts.pipeline))
    logger.info("ready", extra={"fields": {"version": __version__, "models": [served.reference for served in parts.repository.served]}})


async def _start_shadow(parts: Parts, wanted: str) -> None:
    """A candidate that cannot be loaded is an error in the log: it must not keep the service from its work."""
    reference, _, share = wanted.partition("=")
    name, _, version = reference.partition("@")
    try:
        candidate = await parts.repository.enter_beside(name, version)
    except Exception as error:
        logger.error("shadow %s is not running: %s", reference, error)
        return
    parts.pipeline.shadow = Shadow(candidate, float(share), parts.scheduler, parts.metrics)


async def _stop(parts: Parts, tasks: Sequence[asyncio.Task[None]]) -> None:
    parts.health.draining = True
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if parts.health.failure is None:
        await parts.scheduler.drain()
    stopped = await parts.scheduler.close(grace_s=0.0 if parts.health.failure else CLOSE_GRACE_S)
    await parts.pipeline.close()
    if stopped:
        await parts.repository.close()
