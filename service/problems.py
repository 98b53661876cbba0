"""Errors as answers: problem+json (RFC 9457) for everything, and the shape that V2 clients expect under /v2."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import logs
from service.errors import BadOption, DetectorError, MethodNotAllowed, NotFound

PROBLEM_TYPE = "application/problem+json"

logger = logging.getLogger(__name__)


class Problem(BaseModel):
    """An error answer."""

    type: str = Field("about:blank", description="RFC 9457 problem type; `code` is what tells errors apart.")
    title: str = Field(description="The kind of error, for people.")
    status: int = Field(description="The HTTP status again.")
    code: str = Field(description="The kind of error, for programs.")
    detail: str = Field(description="What was expected, what came, and what to do.")
    request_id: str | None = Field(None, description="Find the request in the service's log by this.")


def problem(error: DetectorError) -> dict[str, Any]:
    """The fields of Problem."""
    return {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": logs.request_id.get(),
    }


def error_headers(error: DetectorError) -> dict[str, str]:
    """Retry-After in whole seconds, at least 1, for what passes by itself; how to authenticate for 401."""
    headers = {}
    if error.retry_after_s is not None or error.status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = 'Bearer realm="detector"'
    return headers


def error_response(error: DetectorError, path: str) -> Response:
    """The answer for an error on a path."""
    headers = error_headers(error)
    if path.startswith("/v2"):
        return Response(orjson.dumps({"error": error.detail}), error.status, headers, "application/json")
    return Response(orjson.dumps(problem(error)), error.status, headers, PROBLEM_TYPE)


async def _answer_detector_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DetectorError)
    return error_response(error, request.url.path)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(NotFound(f"nothing is at {path[:120]!r}; /docs lists what is"), path)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        response = error_response(
            MethodNotAllowed(f"{request.method} is not offered at {path[:120]!r}; use {allowed or 'another method'}"), path
        )
        response.headers["allow"] = allowed
        return response
    unnamed = DetectorError(str(error.detail))
    unnamed.status, unnamed.code = error.status_code, "http_error"  # type: ignore[misc]
    unnamed.title = HTTPStatus(error.status_code).phrase  # type: ignore[misc]
    return error_response(unnamed, path)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return error_response(BadOption(f"{where}: {first['msg']}; see /docs"), request.url.path)


async def _answer_unforeseen(request: Request, error: Exception) -> Response:
    fault = DetectorError("the service made a mistake; it is in its log under this request id")
    return error_response(fault, request.url.path)


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of the app in one shape."""
    app.add_exception_handler(DetectorError, _answer_detector_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(Exception, _answer_unforeseen)
