"""Changing a running service: load a version, roll back, log level. These routes exist only where admin keys do; elsewhere 404 says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Depends, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from service import errors, logs
from service.auth import require_key
from service.catalogue import ModelVersion, describe_version
from service.middleware import RequestContext
from service.openapi import error_responses
from service.parts import parts_of

ADMIN_ERRORS = (errors.Unauthorised, errors.Forbidden, errors.ModelNotFound, errors.BadOption, errors.LoadFailed)


def require_admin(request: Request) -> None:
    """Let only holders of an admin key pass; the holder of an API key is told that it is not enough."""
    parts = parts_of(request)
    assert parts.admin_keys is not None  # else the router is not there
    holder = require_key(request.headers, parts.admin_keys, instead=parts.api_keys)
    context: RequestContext | None = request.scope.get("context")
    if context is not None:
        context.fields["admin"] = holder


router = APIRouter(prefix="/v1", tags=["admin"], dependencies=[Depends(require_admin)], responses=error_responses(ADMIN_ERRORS))


def absent_routes(routers: Sequence[APIRouter], why: str) -> APIRouter:
    """The routers' paths where their routes are not: 404 with the reason, so that nobody looks for a misspelling."""

    async def absent() -> None:
        raise errors.NotFound(why)

    router = APIRouter(include_in_schema=False)
    for given in routers:
        for route in given.routes:
            if isinstance(route, APIRoute):
                router.add_api_route(route.path, absent, methods=sorted(route.methods or ()))
    return router


class LoadRequest(BaseModel):
    """Which version to load."""

    model_config = ConfigDict(extra="forbid")
    version: str | None = Field(None, pattern=r"^[1-9][0-9]{0,17}$", description="A folder's number; left out: the newest valid one.")


class LogLevel(BaseModel):
    """The least severe record that is written."""

    model_config = ConfigDict(extra="forbid")
    level: Literal["debug", "info", "warning", "error"]


@router.post("/models/{name}/load")
async def load_model(request: Request, name: str, wanted: Annotated[LoadRequest | None, Body()] = None) -> ModelVersion:
    """Load a version aside, warm and check it, then let it answer. On any failure the version before it stays, and 409 says why."""
    repository = parts_of(request).repository
    return describe_version(repository, await repository.load(name, wanted.version if wanted else None))


@router.post("/models/{name}/rollback")
async def roll_back(request: Request, name: str) -> ModelVersion:
    """Serve the version that served before."""
    repository = parts_of(request).repository
    return describe_version(repository, await repository.rollback(name))


@router.get("/log-level")
async def get_log_level() -> LogLevel:
    """The level in force."""
    return LogLevel.model_validate({"level": logs.get_level()})


@router.put("/log-level")
async def set_log_level(wanted: LogLevel) -> LogLevel:
    """Change the level until the process ends."""
    logs.set_level(wanted.level)
    return wanted
