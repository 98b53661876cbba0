"""What the OpenAPI document says of /v2: the Open Inference Protocol's routes as this service offers them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from service import errors
from service.openapi import DETECT_ERRORS, REF_TEMPLATE, error_responses
from service.problems import PROBLEM_TYPE
from service.v2_codec import HEADER_LENGTH

JSON_TYPE, BINARY_TYPE = "application/json", "application/octet-stream"


class V2Error(BaseModel):
    """How the protocol says that something went wrong."""

    error: str = Field(description="What was expected, what came, and what to do.")


class V2Tensor(BaseModel):
    """A tensor of a request or an answer."""

    name: str
    datatype: str = Field(description="`BYTES`, `UINT8`, `INT64` or `FP32`.")
    shape: list[int] = Field(description="The batch comes first.")
    data: list[Any] | None = Field(
        None,
        description="Row-major; base64 for `BYTES`. Left out where `parameters` has `binary_data_size`: then it follows the JSON.",
    )
    parameters: dict[str, Any] | None = None


class V2RequestedOutput(BaseModel):
    """An output that is wanted."""

    name: str = Field(description="`boxes`, `scores`, `labels` or `num_detections`.")
    parameters: dict[str, Any] | None = Field(None, description="`binary_data`: true sends its numbers behind the JSON.")


class V2Request(BaseModel):
    """What infer takes as JSON."""

    inputs: list[V2Tensor]
    outputs: list[V2RequestedOutput] | None = Field(None, description="All of them where left out.")
    id: str | None = Field(None, description="Comes back in the answer.")
    parameters: dict[str, Any] | None = Field(
        None, description="`timeout` in microseconds, `priority` (1 high, more is low), `binary_data_output`: true for all outputs."
    )


class V2Answer(BaseModel):
    """What infer answers. Boxes are x1, y1, x2, y2; rows beyond `num_detections` are zeros; label 1 is the model's first class."""

    model_name: str
    model_version: str
    outputs: list[V2Tensor]
    id: str | None = None


SCHEMAS: tuple[type[BaseModel], ...] = (V2Error, V2Request, V2Answer)

_TENSORS = [
    {"name": "boxes", "datatype": "FP32", "shape": [-1, 100, 4]},
    {"name": "scores", "datatype": "FP32", "shape": [-1, 100]},
    {"name": "labels", "datatype": "INT64", "shape": [-1, 100]},
    {"name": "num_detections", "datatype": "INT64", "shape": [-1]},
]
_PICTURE = {"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1], "data": ["<base64>"]}
_STATISTICS = {"name": "blood-cells", "version": "1", "inference_count": 12, "execution_count": 5, "inference_stats": {}, "batch_stats": []}


def _errors(*kinds: type[errors.DetectorError]) -> dict[int | str, dict[str, Any]]:
    """As error_responses, in the protocol's shape."""
    responses = error_responses(kinds)
    for entry in responses.values():
        codes = entry["content"].pop(PROBLEM_TYPE)["examples"]
        examples = {code: {"summary": told["summary"], "value": {"error": "..."}} for code, told in codes.items()}
        entry["content"][JSON_TYPE] = {"schema": {"$ref": REF_TEMPLATE.format(model="V2Error")}, "examples": examples}
    return responses


def _route(
    path: str, description: str, example: Any, *kinds: type[errors.DetectorError], body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments of a route that answers JSON of this shape."""
    schema = {"type": "array", "items": {"type": "object"}} if isinstance(example, list) else {"type": "object"}
    good = {"description": description, "content": {JSON_TYPE: {"schema": schema, "example": example}}}
    return {"responses": {200: good, **_errors(*kinds)}, "openapi_extra": _extra(path, body)}


def _extra(path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    texts = {"name": "The model: `NAME` takes pictures, `NAME_tensor` takes pixels.", "version": "One version; the active one without."}
    parameters = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in texts.items()
        if f"{{{name}}}" in path
    ]
    return {"parameters": parameters} | ({"requestBody": body} if body is not None else {})


def _small_body(description: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "description": description, "properties": properties}
    return {"required": False, "content": {JSON_TYPE: {"schema": schema}}}


SERVER = _route(
    "",
    "Name, version, extensions.",
    {"name": "faster-rcnn-service", "version": "1.0.0", "extensions": ["binary_tensor_data"]},
    errors.Unauthorised,
)
LIVE = _route("", "Always.", {"live": True})
READY = _route("", "Ready.", {"ready": True}, errors.NotReady)
ALL_STATISTICS = _route("", "One entry a model and version.", {"model_stats": [_STATISTICS]}, errors.Unauthorised)
_SMALL_BODY_ERRORS = (errors.Unauthorised, errors.MalformedRequest, errors.SlowBody, errors.BodyTooLarge)
INDEX = _route(
    "",
    "One entry a model and version.",
    [{"name": "blood-cells", "version": "1", "state": "READY", "reason": ""}],
    *_SMALL_BODY_ERRORS,
    body=_small_body("May be empty.", {"ready": {"type": "boolean", "description": "Only what is served."}}),
)
_CHANGE_ERRORS = (*_SMALL_BODY_ERRORS, errors.Forbidden, errors.ModelNotFound, errors.LoadFailed, errors.NotReady)
LOAD = _route("{name}", "Done.", {}, *_CHANGE_ERRORS, body=_small_body("May be empty: nothing can be set.", {}))
UNLOAD = _route("{name}", "Done.", {}, *_CHANGE_ERRORS, body=_small_body("May be empty.", {"parameters": {"type": "object"}}))


def model_routes(prefix: str) -> dict[str, dict[str, Any]]:
    """Arguments of the routes of one model, by what follows the prefix, which is a model's or a version's path."""
    gone = errors.Unauthorised, errors.ModelNotFound, errors.NotReady
    metadata = {"name": "blood-cells", "versions": ["1"], "platform": "onnxruntime_onnx"}
    inputs = [{"name": "IMAGE", "datatype": "BYTES", "shape": [-1, 1]}]
    config = {"name": "blood-cells", "platform": "onnxruntime_onnx", "max_batch_size": 64, "input": [], "output": []}
    return {
        "": _route(prefix, "Inputs and outputs.", {**metadata, "inputs": inputs, "outputs": _TENSORS}, *gone),
        "/ready": _route(prefix, "Served.", {"name": "blood-cells", "ready": True}, *gone),
        "/config": _route(prefix, "Batching, inputs, outputs, devices.", config, *gone),
        "/stats": _route(prefix, "Cumulative counts and nanoseconds.", {"model_stats": [_STATISTICS]}, *gone),
        "/infer": _infer(prefix),
    }


def _infer(prefix: str) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    answer = {
        "model_name": "blood-cells",
        "model_version": "1",
        "outputs": [{"name": "num_detections", "datatype": "INT64", "shape": [1], "data": [12]}],
    }
    good = {
        "description": f"The outputs as JSON, or JSON and binary tensors behind it with `{HEADER_LENGTH}`.",
        "content": {JSON_TYPE: {"schema": {"$ref": REF_TEMPLATE.format(model="V2Answer")}, "example": answer}, BINARY_TYPE: binary},
    }
    asked = {"schema": {"$ref": REF_TEMPLATE.format(model="V2Request")}, "example": {"inputs": [_PICTURE]}}
    length = {
        "name": HEADER_LENGTH,
        "in": "header",
        "required": False,
        "description": "Bytes of JSON before binary tensors; `0`: the body is the picture itself.",
        "schema": {"type": "integer", "minimum": 0},
    }
    extra = _extra(prefix, {"required": True, "content": {JSON_TYPE: asked, BINARY_TYPE: binary}})
    extra["parameters"].append(length)
    return {"responses": {200: good, **_errors(*DETECT_ERRORS)}, "openapi_extra": extra}
