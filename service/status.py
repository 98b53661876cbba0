"""/healthz, /readyz, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.responses import Response

from service.errors import NotReady
from service.openapi import error_responses
from service.parts import parts_of

RETRY_AFTER_S = 2.0


class Alive(BaseModel):
    """The process answers."""

    alive: bool = True


class Ready(BaseModel):
    """Requests are welcome."""

    ready: bool = True


def status_router(*, operations: bool) -> APIRouter:
    """Health for probes, and where `operations` says so, metrics."""
    router = APIRouter(tags=["operation"])
    router.add_api_route("/healthz", healthz, methods=["GET"], response_model=Alive)
    router.add_api_route("/readyz", readyz, methods=["GET"], response_model=Ready, responses=error_responses((NotReady,)))
    if operations:
        text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text."}
        router.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response, responses={200: text})
    return router


async def healthz() -> Alive:
    """Alive: the event loop turns. Says nothing of models and devices, so that a restart is asked for only when it helps."""
    return Alive()


async def readyz(request: Request) -> Ready:
    """Ready for requests: every model is warm and checked, the device answered lately, and the process is not leaving."""
    reason = await parts_of(request).why_not_ready()
    if reason is not None:
        raise NotReady(f"not ready: {reason}", retry_after_s=RETRY_AFTER_S)
    return Ready()


def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(parts_of(request).metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
