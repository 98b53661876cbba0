"""What the OpenAPI document says of routes that parse their requests themselves: parameters, bodies, answers, every error code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, Field

from service import errors
from service.answers import DetectAnswer
from service.options import DetectOptions
from service.problems import PROBLEM_TYPE, Problem

REF_TEMPLATE = "#/components/schemas/{model}"

EXAMPLE_ANSWER = {
    "model": {"name": "blood-cells", "version": "1"},
    "image": {"width": 640, "height": 480},
    "detections": [{"box": [88.1, 40.2, 190.7, 151.9], "class": "WBC", "class_id": 3, "score": 0.97}],
    "timing_ms": {"decode": 2.1, "queue": 0.3, "infer": 11.8, "total": 15.2},
}


class BatchError(BaseModel):
    """A picture that has no answer."""

    error: Problem


class BatchAnswer(BaseModel):
    """What /v1/detect/batch answers."""

    results: list[DetectAnswer | BatchError] = Field(description="One a picture, in order.")


DETECT_ERRORS: tuple[type[errors.DetectorError], ...] = (
    errors.EmptyBody,
    errors.MalformedRequest,
    errors.Unauthorised,
    errors.Forbidden,
    errors.ModelNotFound,
    errors.SlowBody,
    errors.BodyTooLarge,
    errors.TooManyPixels,
    errors.UnsupportedType,
    errors.BadImage,
    errors.BadOption,
    errors.QueueFull,
    errors.WouldMissDeadline,
    errors.InferenceFailed,
    errors.NotReady,
    errors.Draining,
    errors.DeadlineExceeded,
)


def error_responses(kinds: tuple[type[errors.DetectorError], ...]) -> dict[int | str, dict[str, Any]]:
    """One entry a status, with an example for each of its codes."""
    responses: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        entry = responses.setdefault(
            kind.status,
            {
                "description": kind.title,
                "content": {PROBLEM_TYPE: {"schema": {"$ref": REF_TEMPLATE.format(model="Problem")}, "examples": {}}},
            },
        )
        if kind.status in (429, 503):
            entry["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
        example = {
            "type": "about:blank",
            "title": kind.title,
            "status": kind.status,
            "code": kind.code,
            "detail": "...",
            "request_id": "...",
        }
        entry["content"][PROBLEM_TYPE]["examples"][kind.code] = {"summary": kind.title, "value": example}
    return responses


def _option_schemas(*, many: bool = False) -> dict[str, dict[str, Any]]:
    """The options of one picture's request, or of a batch's, which is answered in JSON."""
    schemas: dict[str, dict[str, Any]] = DetectOptions.model_json_schema()["properties"]
    if many:
        schemas["format"] |= {"enum": ["json"], "description": "A batch is answered in JSON; pictures with boxes come from /v1/detect."}
    return schemas


def _query_parameters(*, many: bool = False) -> list[dict[str, Any]]:
    parameters = []
    for name, schema in _option_schemas(many=many).items():
        schema = dict(schema)
        description = schema.pop("description", "")
        if name == "classes":
            schema = {"type": "array", "items": {"type": "string"}, "maxItems": schema.get("maxItems")}
        parameters.append({"name": name, "in": "query", "required": False, "description": description, "schema": schema})
    return parameters


def _binary() -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary"}}


def _fields(name: str, picture: dict[str, Any]) -> dict[str, Any]:
    """A form or JSON object: the picture or pictures, and the options."""
    properties = {name: picture, **_option_schemas(many=name == "images")}
    return {"schema": {"type": "object", "required": [name], "properties": properties, "additionalProperties": False}}


_BASE64 = {"type": "string", "contentEncoding": "base64", "description": "A picture's bytes in base64."}
_FILE = {"type": "string", "format": "binary"}

DETECT: dict[str, Any] = {
    "response_model": None,
    "summary": "Detect on one picture",
    "responses": {
        200: {
            "description": "Detections, or with `format=image` the picture with its boxes drawn.",
            "content": {
                "application/json": {"schema": {"$ref": REF_TEMPLATE.format(model="DetectAnswer")}, "example": EXAMPLE_ANSWER},
                **{kind: _binary() for kind in ("image/jpeg", "image/png", "image/webp")},
            },
        },
        **error_responses(DETECT_ERRORS),
    },
    "openapi_extra": {
        "parameters": _query_parameters(),
        "requestBody": {
            "required": True,
            "content": {
                "image/*": _binary(),
                "application/octet-stream": _binary(),
                "multipart/form-data": _fields("image", _FILE),
                "application/json": _fields("image", _BASE64),
            },
        },
    },
}

BATCH: dict[str, Any] = {
    "response_model": None,
    "summary": "Detect on many pictures",
    "responses": {
        200: {
            "description": "One result a picture, in order.",
            "content": {
                "application/json": {
                    "schema": {"$ref": REF_TEMPLATE.format(model="BatchAnswer")},
                    "example": {"results": [EXAMPLE_ANSWER, {"error": {"status": 422, "code": "bad_image", "detail": "..."}}]},
                }
            },
        },
        **error_responses(DETECT_ERRORS),
    },
    "openapi_extra": {
        "parameters": _query_parameters(many=True),
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": _fields("images", {"type": "array", "items": _FILE, "minItems": 1}),
                "application/json": _fields("images", {"type": "array", "items": _BASE64, "minItems": 1}),
            },
        },
    },
}


KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "`X-API-Key: KEY`"},
}


def _replace_validation_errors(document: dict[str, Any]) -> None:
    """The framework documents its own shape of 422, which this service never sends."""
    ours = error_responses((errors.BadOption,))[422]
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation.get("responses", {}).get("422", {})):
                operation["responses"]["422"] = ours
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def add_schemas(document: dict[str, Any], models: Iterable[type[BaseModel]] = ()) -> None:
    """Put the schemas that the routes above refer to, and those of other modules' routes, into the document's components."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    _replace_validation_errors(document)
    own: tuple[type[BaseModel], ...] = (DetectAnswer, BatchAnswer, Problem)
    for model in (*own, *models):
        schema = model.model_json_schema(ref_template=REF_TEMPLATE, by_alias=True, mode="serialization")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema


def add_keys(document: dict[str, Any], needs_key: Callable[[str], bool], *, optional: bool) -> None:
    """Say where a key goes, and which routes want one.

    Args:
        needs_key: tells by the path, where keys are on.
        optional: they are off, so a key is taken and not looked at, but for admin routes.
    """
    document["components"]["securitySchemes"] = KEY_SCHEMES
    either: list[dict[str, list[str]]] = [{name: []} for name in KEY_SCHEMES]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "admin" in operation.get("tags", ()):
                operation["security"] = either
            elif needs_key(path):
                operation["security"] = [{}, *either] if optional else either
