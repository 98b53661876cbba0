"""Golden images: small drawn pictures with the file's own answers, so that a service can tell a sound start from a broken one."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from export import pictures
from export.pictures import Picture
from service.images import assemble, prepare_pixels, to_original_frame
from service.manifest import GoldenDetection, GoldenImage, Tolerance
from service.runtime import Runtime

# Wide enough for TF32, fp16 and another vendor's convolutions; a wrong weight, resize or channel order moves boxes much further.
TOLERANCE = Tolerance(box_px=2.0, score=0.05)
LOWEST_MIN_SCORE, HIGHEST_MIN_SCORE = 0.25, 0.75


def golden_pictures() -> list[Picture]:
    """One picture of each kind; odd sides, landscape and portrait."""
    return [pictures.smear((181, 241), seed=1, cells=14), pictures.street((225, 171), seed=2, blocks=10)]


def golden_images(runtime: Runtime) -> list[GoldenImage]:
    """The drawn pictures with what `runtime` answers to each."""
    return [_golden(runtime, picture) for picture in golden_pictures()]


def _golden(runtime: Runtime, picture: Picture) -> GoldenImage:
    prepared = prepare_pixels(picture, runtime.manifest.input)
    answer = runtime.run(*assemble([prepared]))
    count = int(answer.num_detections[0])
    scores = answer.scores[0, :count]
    boxes = to_original_frame(answer.boxes[0, :count], prepared)
    min_score = clear_threshold(scores.tolist())
    detections = [
        GoldenDetection(box=tuple(round(float(side), 3) for side in box), label=int(label), score=round(float(score), 5))
        for box, label, score in zip(boxes, answer.labels[0, :count], scores, strict=True)
        if score > min_score
    ]
    return GoldenImage(image=_png(picture), detections=detections, min_score=min_score, tolerance=TOLERANCE)


def clear_threshold(scores: Sequence[float]) -> float:
    """The middle of the widest gap between scores, so that no detection can slip over the threshold by rounding."""
    inside = [score for score in scores if LOWEST_MIN_SCORE < score < HIGHEST_MIN_SCORE]
    edges = np.array(sorted({LOWEST_MIN_SCORE, HIGHEST_MIN_SCORE, *inside}))
    widest = int(np.argmax(np.diff(edges)))
    return round(float(edges[widest] + edges[widest + 1]) / 2, 6)


def _png(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
