"""/v1/detect: detection on one picture and on many. Which models there are is catalogue.py's."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service import openapi
from service.answers import answer_document, choose, dump, server_timing, timing_ms
from service.bodies import Parsed, Picture, is_raw, parse_body
from service.drawing import Drawn, draw, negotiate
from service.errors import BadOption, DetectorError
from service.images import ImageLimits, decode
from service.options import DetectOptions, parse_options, select_labels
from service.parts import Parts, parts_of
from service.pipeline import Result
from service.problems import problem
from service.repository import ServedVersion
from service.requests import DetectingRoute, context_of, held_body, query_pairs, unless_client_leaves

detecting = APIRouter(prefix="/v1", tags=["detection"], route_class=DetectingRoute)

JSON_TYPE = "application/json"


@detecting.post("/detect", **openapi.DETECT)
async def detect(request: Request) -> Response:
    """Find the objects in one picture.

    The picture is the body itself (`image/*` or `application/octet-stream`), the field `image` of a form, or base64 in JSON.
    Options stand in the query, in the form or in the JSON object. Boxes refer to the picture as a person sees it, EXIF orientation applied.
    """
    parts = parts_of(request)
    options = parse_options(query_pairs(request), also_known=("image",))
    deadline = parts.deadline(options.timeout_ms)
    parts.pipeline.check_room(parts.repository.resolve(options.model), deadline)
    async with held_body(request, parts) as body:
        content_type = request.headers.get("content-type", "")
        if is_raw(content_type):
            picture: Picture = body
        else:
            parsed = await parts.pipeline.compute(parse_body, body, content_type, name="image", max_pictures=1)
            options = _merged(request, parsed, "image")
            deadline = min(deadline, parts.deadline(options.timeout_ms))
            picture = parsed.pictures[0]
        if isinstance(picture, DetectorError):
            raise picture
        served = parts.repository.resolve(options.model)
        labels = select_labels(options.classes, served.manifest.class_names)
        accept = request.headers.get("accept", "")
        work = _detect_one(parts, picture, served, options, labels, deadline=deadline, accept=accept)
        result, drawn = await unless_client_leaves(request.receive, work)
    if drawn is not None:
        return _drawn_response(request, result, drawn)
    return _json_response(request, parts, result, options, labels)


@detecting.post("/detect/batch", **openapi.BATCH)
async def detect_batch(request: Request) -> Response:
    """Find the objects in many pictures.

    Pictures come as repeated form fields `images`, or as base64 in JSON `{"images": [...]}`. The answer holds one result a picture, in
    order; a picture that cannot be answered has `error` in its place, and its neighbours are not touched.
    """
    parts = parts_of(request)
    options = parse_options(query_pairs(request), also_known=("images",))
    deadline = parts.deadline(options.timeout_ms)
    parts.pipeline.check_room(parts.repository.resolve(options.model), deadline)
    async with held_body(request, parts) as body:
        content_type = request.headers.get("content-type", "")
        parsed = await parts.pipeline.compute(parse_body, body, content_type, name="images", max_pictures=parts.settings.max_batch_images)
        options = _merged(request, parsed, "images")
        if options.format != "json":
            raise BadOption("option 'format': a batch is answered in JSON; ask for pictures one by one at /v1/detect")
        deadline = min(deadline, parts.deadline(options.timeout_ms))
        served = parts.repository.resolve(options.model)
        labels = select_labels(options.classes, served.manifest.class_names)
        work = _detect_all(parts, parsed.pictures, served, options, deadline)
        outcomes = await unless_client_leaves(request.receive, work)
    context = context_of(request)
    context.fields.update(model=served.reference, images=len(outcomes))
    payload = await parts.pipeline.compute(_batch_payload, outcomes, options, labels, time.perf_counter() - context.started)
    return Response(payload, media_type=JSON_TYPE)


async def _detect_one(
    parts: Parts,
    picture: bytes,
    served: ServedVersion,
    options: DetectOptions,
    labels: frozenset[int] | None,
    *,
    deadline: float,
    accept: str,
) -> tuple[Result, Drawn | None]:
    """The result, and where it is asked for the picture with its boxes."""
    result = await parts.pipeline.detect(picture, served, deadline=deadline, priority=options.priority)
    if options.format == "json":
        return result, None
    return result, await parts.pipeline.compute(_draw, picture, result, options, labels, parts.pipeline.limits, negotiate(accept))


def _draw(
    picture: bytes, result: Result, options: DetectOptions, labels: frozenset[int] | None, limits: ImageLimits, media_type: str
) -> Drawn:
    """Decoded once more, in full size: that is rare, and keeping every picture in case it is drawn would cost memory for all."""
    chosen = choose(result, options, labels)
    names = result.served.manifest.class_names
    return draw(decode(picture, limits), chosen.boxes, chosen.scores, chosen.labels, names, media_type=media_type)


def _merged(request: Request, parsed: Parsed, name: str) -> DetectOptions:
    """Options of the query and of the body together; a name in both is a contradiction and refused."""
    return parse_options([*query_pairs(request), *parsed.options], also_known=(name,))


async def _detect_all(
    parts: Parts, pictures: list[Picture], served: ServedVersion, options: DetectOptions, deadline: float
) -> list[Result | DetectorError]:
    """Each picture's result or error, in order. Only a few are in the house at a time, so that one batch leaves room for others."""
    places = asyncio.Semaphore(2 * parts.settings.max_batch_size)

    async def one(picture: Picture) -> Result | DetectorError:
        try:
            if isinstance(picture, DetectorError):
                raise picture
            async with places:
                return await parts.pipeline.detect(picture, served, deadline=deadline, priority=options.priority)
        except DetectorError as error:
            parts.pipeline.count_refusal(error)
            return error

    with served.lease():
        return await asyncio.gather(*(one(picture) for picture in pictures))


def _batch_payload(outcomes: list[Result | DetectorError], options: DetectOptions, labels: frozenset[int] | None, total_s: float) -> bytes:
    results: list[dict[str, Any]] = []
    for outcome in outcomes:
        if isinstance(outcome, DetectorError):
            results.append({"error": problem(outcome)})
        else:
            results.append(answer_document(outcome, choose(outcome, options, labels), options, total_s))
    return dump({"results": results})


def _json_response(request: Request, parts: Parts, result: Result, options: DetectOptions, labels: frozenset[int] | None) -> Response:
    context = context_of(request)
    started = time.perf_counter()
    chosen = choose(result, options, labels)
    chose = time.perf_counter()
    document = answer_document(result, chosen, options, chose - context.started)
    payload = dump(document)
    parts.metrics.stage_seconds["postprocess"].observe(chose - started)
    parts.metrics.stage_seconds["serialise"].observe(time.perf_counter() - chose)
    timing = document["timing_ms"]
    context.fields.update(model=result.served.reference, image=document["image"], batch_size=result.batch_size, timing_ms=timing)
    return Response(payload, headers={"server-timing": server_timing(timing)}, media_type=JSON_TYPE)


def _drawn_response(request: Request, result: Result, drawn: Drawn) -> Response:
    context = context_of(request)
    timing = timing_ms(result, time.perf_counter() - context.started)
    context.fields.update(model=result.served.reference, batch_size=result.batch_size, timing_ms=timing)
    headers = {"server-timing": server_timing(timing), "vary": "accept"}
    return Response(drawn.data, headers=headers, media_type=drawn.media_type)
