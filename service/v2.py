"""/v2: the Open Inference Protocol on the same detectors, pipeline and bounds as /v1. Thin: bodies are v2_codec's, documents v2_models'."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Request
from numpy.typing import NDArray
from starlette.responses import Response

from service import __version__, v2_openapi
from service.admin import require_admin
from service.errors import DetectorError, MalformedRequest, NotReady
from service.images import Prepared, choose_bucket, to_original_frame
from service.parts import Parts, parts_of
from service.pipeline import PriorityName, Result
from service.repository import Repository
from service.requests import DetectingRoute, context_of, held_body, unless_client_leaves
from service.v2_codec import HEADER_LENGTH, Encoded, InferRequest, encode_answer, parse_infer
from service.v2_models import Face, RequestTimes, Statistics, base_name, config, faces_of, find_face, index, metadata

P = ParamSpec("P")
T = TypeVar("T")

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "schedule_policy", "statistics")
JSON_TYPE, BINARY_TYPE = "application/json", "application/octet-stream"
LAST_HIGH_PRIORITY = 1
"""The protocol counts 1 as the highest and 0 as the default; what comes after yields to others."""
MAX_SMALL_BODY = 64 * 1024
"""Of a request about the repository."""
MAX_INLINE_JSON, MAX_INLINE_BODY, MAX_INLINE_RESULTS = 8 * 1024, 512 * 1024, 4
"""What is parsed and written on the event loop: a tenth of a millisecond at most."""
COMPRESSIONS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
UNLOAD_PARAMETERS = {"unload_dependents"}
"""Means nothing here: no model is made of others."""
RETRY_AFTER_S = 2.0


class NotOffered(DetectorError):
    """A part of the protocol that this server leaves out."""

    status, code, title = 501, "not_offered", "Not offered"


class OpenInference:
    """The protocol's routes over one service's parts, with the statistics that belong to them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._statistics = Statistics()

    def router(self) -> APIRouter:
        """Every route but those that change the repository."""
        router = APIRouter(prefix="/v2", tags=["open inference protocol"])
        router.add_api_route("", self.server_metadata, **v2_openapi.SERVER)
        router.add_api_route("/health/live", self.live, **v2_openapi.LIVE)
        router.add_api_route("/health/ready", self.ready, **v2_openapi.READY)
        router.add_api_route("/models/stats", self.all_statistics, **v2_openapi.ALL_STATISTICS)
        for prefix in ("/models/{name}", "/models/{name}/versions/{version}"):
            told = v2_openapi.model_routes(prefix)
            router.add_api_route(prefix, self.model_metadata, **told[""])
            for path, answer in (("/ready", self.model_ready), ("/config", self.model_config), ("/stats", self.model_statistics)):
                router.add_api_route(prefix + path, answer, **told[path])
            router.add_api_route(prefix + "/infer", self.infer, methods=["POST"], route_class_override=DetectingRoute, **told["/infer"])
        router.add_api_route("/repository/index", self.repository_index, methods=["POST"], **v2_openapi.INDEX)
        for path in ("/trace/setting", "/models/{name}/trace/setting", "/logging", "/{kind}sharedmemory/{rest:path}"):
            router.add_api_route(path, not_offered, methods=["GET", "POST"], include_in_schema=False)
        return router

    async def server_metadata(self) -> Response:
        """Name, version and what of the protocol is offered."""
        return _json({"name": "faster-rcnn-service", "version": __version__, "extensions": EXTENSIONS})

    async def live(self) -> Response:
        """The process answers."""
        return _json({"live": True})

    async def ready(self) -> Response:
        """Requests are welcome."""
        reason = await self._parts.why_not_ready()
        if reason is not None:
            raise NotReady(f"not ready: {reason}", retry_after_s=RETRY_AFTER_S)
        return _json({"ready": True})

    async def model_metadata(self, request: Request) -> Response:
        """Inputs and outputs."""
        return _json(metadata(self._face(request), self._parts.repository))

    async def model_ready(self, request: Request) -> Response:
        """The model is served."""
        return _json({"name": self._face(request).name, "ready": True})

    async def model_config(self, request: Request) -> Response:
        """How the model is batched."""
        return _json(config(self._face(request), self._parts.settings.max_batch_images))

    async def model_statistics(self, request: Request) -> Response:
        """Counts and times of one model."""
        return _json(self._statistics.describe([self._face(request)]))

    async def all_statistics(self) -> Response:
        """Counts and times of every model."""
        return _json(self._statistics.describe(faces_of(self._parts.repository)))

    async def repository_index(self, request: Request) -> Response:
        """What is served, and what lies in the repository besides."""
        document = await _small_document(request)
        return _json(index(self._parts.repository, ready_only=document.get("ready") is True))

    async def infer(self, request: Request) -> Response:
        """Detect on one or many pictures. One that cannot be answered fails the request, since the protocol has no place for its error.

        Every model has two names. `NAME` takes `IMAGE`, `BYTES [B, 1]`: whole files, in any format that /v1 takes; boxes are in pixels of
        the picture. `NAME_tensor` takes `images`, `UINT8 [B, H, W, 3]`, and `image_sizes_hw`, `INT64 [B, 2]`: pixels that the client
        resized and padded; boxes are in that frame. Both give `boxes`, `scores`, `labels` and `num_detections`.
        """
        face = self._face(request)
        try:
            with face.served.lease():
                return await self._infer(request, face)
        except DetectorError:
            self._statistics.failed(face, time.perf_counter() - context_of(request).started)
            raise

    async def _infer(self, request: Request, face: Face) -> Response:
        parts = self._parts
        deadline = parts.deadline(None)
        parts.pipeline.check_room(face.served, deadline)
        async with held_body(request, parts) as body:
            header_length = request.headers.get(HEADER_LENGTH)
            max_batch = parts.settings.max_batch_images
            small = _json_bytes(body, header_length) <= MAX_INLINE_JSON and len(body) <= MAX_INLINE_BODY
            wanted = await self._compute(small, parse_infer, body, header_length, face.inputs, face.outputs, max_batch)
            if wanted.timeout_us:
                deadline = min(deadline, parts.deadline(-(-wanted.timeout_us // 1000)))
            results = await unless_client_leaves(request.receive, self._detect_all(face, wanted, deadline))
        inferred = time.perf_counter()
        encoding = _accepted_encoding(request.headers.get("accept-encoding", ""))
        answer = await self._compute(len(results) <= MAX_INLINE_RESULTS and encoding is None, _encode, face, wanted, results, encoding)
        encoded = time.perf_counter()
        parts.metrics.stage_seconds["serialise"].observe(encoded - inferred)
        times = RequestTimes(
            total_s=encoded - context_of(request).started,
            queue_s=max(result.queue_s for result in results),
            input_s=max(result.decode_s for result in results),
            infer_s=max(result.infer_s for result in results),
            output_s=encoded - inferred,
        )
        self._statistics.succeeded(face, [result.batch_size for result in results], times)
        context_of(request).fields.update(model=face.served.reference, images=len(results))
        return _infer_response(answer, encoding)

    async def _compute(self, small: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What takes less than a queue for the pool is done at once; everything else goes to the pool."""
        return function(*args, **kwargs) if small else await self._parts.pipeline.compute(function, *args, **kwargs)

    async def _detect_all(self, face: Face, wanted: InferRequest, deadline: float) -> list[Result]:
        """Each picture's result, in order. Only a few are in the house at a time, so that others have room."""
        pipeline, served = self._parts.pipeline, face.served
        priority: PriorityName = "high" if wanted.priority <= LAST_HIGH_PRIORITY else "low"
        if face.takes_tensors:
            items = _prepare_tensors(wanted, face)
            works = [partial(pipeline.infer, item, served, deadline=deadline, priority=priority) for item in items]
        else:
            works = [partial(pipeline.detect, picture, served, deadline=deadline, priority=priority) for picture in wanted.inputs["IMAGE"]]
        return await _run_all(works, at_once=2 * self._parts.settings.max_batch_size)

    def _face(self, request: Request) -> Face:
        return find_face(self._parts.repository, request.path_params["name"], request.path_params.get("version"))


async def not_offered(request: Request) -> Response:
    """Tracing, logging and shared memory."""
    raise NotOffered(f"{request.url.path[:120]!r} is a part of the protocol that this server does not offer; GET /v2 lists what it does")


admin_router = APIRouter(prefix="/v2/repository/models", tags=["admin"], dependencies=[Depends(require_admin)])
"""Exists only where admin keys do."""


@admin_router.post("/{name}/load", **v2_openapi.LOAD)
async def load(request: Request) -> Response:
    """Load the newest version aside, warm and check it, then let it answer."""
    document = await _small_document(request)
    if _parameters(document):
        raise MalformedRequest(
            "a model is loaded from the service's own repository as it is; files and configurations in a request are refused"
        )
    repository = parts_of(request).repository
    await repository.load(_known_name(repository, request.path_params["name"]))
    return _json({})


@admin_router.post("/{name}/unload", **v2_openapi.UNLOAD)
async def unload(request: Request) -> Response:
    """Take a model, under both its names, out of service until it is loaded again. What is in flight finishes."""
    unknown = set(_parameters(await _small_document(request))) - UNLOAD_PARAMETERS
    if unknown:
        raise MalformedRequest(f"parameter {min(unknown)[:80]!r} of unload is not known; expected {', '.join(UNLOAD_PARAMETERS)}")
    repository = parts_of(request).repository
    await repository.unload(_known_name(repository, request.path_params["name"]))
    return _json({})


def _known_name(repository: Repository, name: str) -> str:
    """The detector behind a name, served or not."""
    return base_name({*repository.on_disk(), *(served.name for served in repository.served)}, name)[0]


def _parameters(document: dict[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise MalformedRequest(f"'parameters' must be an object, got {type(parameters).__name__}")
    return parameters


def _json_bytes(body: bytes, header_length: str | None) -> int:
    """How much of the body is JSON; all of it where the header makes no sense."""
    known = header_length is not None and header_length.isascii() and header_length.isdigit() and len(header_length) < 10
    return int(header_length) if header_length is not None and known else len(body)


def _prepare_tensors(wanted: InferRequest, face: Face) -> list[Prepared]:
    """Cut each picture out of its padding.

    Raises:
        MalformedRequest: a size outside the tensor. BadImage: no input of the model holds it.
    """
    images, sizes = wanted.inputs["images"], wanted.inputs["image_sizes_hw"]
    assert isinstance(images, np.ndarray)
    assert isinstance(sizes, np.ndarray)
    height, width = images.shape[1:3]
    prepared = []
    for image, (h, w) in zip(images, sizes.tolist(), strict=True):
        if not (0 < h <= height and 0 < w <= width):
            raise MalformedRequest(f"image_sizes_hw {h}x{w} does not lie within 1x1 and the images' {height}x{width}")
        prepared.append(Prepared(image[:h, :w], choose_bucket((h, w), face.served.manifest.input), (h, w)))
    return prepared


async def _run_all(works: Sequence[Callable[[], Coroutine[Any, Any, Result]]], *, at_once: int) -> list[Result]:
    """Results in order. Raises the first error, after ending the rest."""
    places = asyncio.Semaphore(at_once)

    async def one(work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with places:
            return await work()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(work)) for work in works]
    except ExceptionGroup as errors:
        raise next((error for error in errors.exceptions if isinstance(error, DetectorError)), errors.exceptions[0]) from None
    return [task.result() for task in tasks]


def _encode(face: Face, wanted: InferRequest, results: Sequence[Result], encoding: str | None) -> Encoded:
    answer = encode_answer(wanted, face.name, face.served.version, _tensors(face, results), face.outputs)
    if encoding is None:
        return answer
    squeezer = zlib.compressobj(1, wbits=COMPRESSIONS[encoding])
    return Encoded(squeezer.compress(answer.body) + squeezer.flush(), answer.header_length)


def _tensors(face: Face, results: Sequence[Result]) -> dict[str, NDArray[Any]]:
    """The four outputs with all rows: zeros beyond an image's detections."""
    rows = face.served.manifest.detections_per_image
    boxes, scores = np.zeros((len(results), rows, 4), np.float32), np.zeros((len(results), rows), np.float32)
    labels = np.zeros((len(results), rows), np.int64)
    counts = np.array([len(result.detections.scores) for result in results], np.int64)
    for i, (result, n) in enumerate(zip(results, counts.tolist(), strict=True)):
        boxes[i, :n] = to_original_frame(result.detections.boxes, result.prepared)
        scores[i, :n], labels[i, :n] = result.detections.scores, result.detections.labels
    return {"boxes": boxes, "scores": scores, "labels": labels, "num_detections": counts}


def _infer_response(answer: Encoded, encoding: str | None) -> Response:
    headers = {"vary": "accept-encoding"}
    if encoding is not None:
        headers["content-encoding"] = encoding
    if answer.header_length is not None:
        headers[HEADER_LENGTH] = str(answer.header_length)
    return Response(answer.body, headers=headers, media_type=JSON_TYPE if answer.header_length is None else BINARY_TYPE)


def _accepted_encoding(header: str) -> str | None:
    """The first of gzip and deflate that the header names and does not refuse."""
    for entry in header.lower().split(","):
        name, _, weight = entry.partition(";")
        if name.strip() in COMPRESSIONS and weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            return name.strip()
    return None


async def _small_document(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body is an empty one."""
    body = await request.body()
    if len(body) > MAX_SMALL_BODY:
        raise MalformedRequest(f"expected a JSON object of at most {MAX_SMALL_BODY} bytes, got {len(body)}")
    try:
        document = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise MalformedRequest(f"expected a JSON object, got {type(document).__name__}")
    return document


def _json(document: Any) -> Response:
    return Response(orjson.dumps(document), media_type=JSON_TYPE)
