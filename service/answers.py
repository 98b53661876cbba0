"""From detections in the input frame to the answer a client asked for.

N detections of one image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from service.images import to_original_frame
from service.options import BoxFormat, DetectOptions
from service.pipeline import Result

PIXEL_DECIMALS = 2
NORMALIZED_DECIMALS = 6
SCORE_DECIMALS = 4


class ModelIdentity(BaseModel):
    """The version that answered."""

    name: str
    version: str


class ImageSize(BaseModel):
    """Size of the picture as a person sees it."""

    width: int
    height: int


class Detection(BaseModel):
    """One object."""

    box: list[float] = Field(description="Four numbers in the box_format asked for, in the upright picture.")
    class_: str = Field(alias="class")
    class_id: int = Field(description="1..K, the position of the class in the model's list.")
    score: float = Field(ge=0, le=1)


class Timing(BaseModel):
    """Milliseconds of this request's stages."""

    decode: float
    queue: float
    infer: float
    total: float


class DetectAnswer(BaseModel):
    """What /v1/detect answers."""

    model: ModelIdentity
    image: ImageSize
    detections: list[Detection] = Field(description="Best first.")
    timing_ms: Timing


class Chosen:
    """The detections that a request asked for, in the original frame."""

    __slots__ = ("boxes", "labels", "scores")

    def __init__(self, boxes: NDArray[np.float32], scores: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        self.boxes = boxes  # [N, 4] xyxy
        self.scores = scores  # [N], best first
        self.labels = labels  # [N]


def choose(result: Result, options: DetectOptions, labels: frozenset[int] | None) -> Chosen:
    """Cut by score, class and count, and turn to the original frame.

    Args:
        labels: those asked for, or None for all.
    """
    found = result.detections
    above = int(np.count_nonzero(found.scores >= options.score_threshold))
    boxes, scores, found_labels = found.boxes[:above], found.scores[:above], found.labels[:above]  # best first, so these are they
    if labels is not None:
        keep = np.isin(found_labels, list(labels))
        boxes, scores, found_labels = boxes[keep], scores[keep], found_labels[keep]
    count = options.max_detections
    return Chosen(to_original_frame(boxes[:count], result.prepared), scores[:count], found_labels[:count])


def format_boxes(boxes: NDArray[np.float32], box_format: BoxFormat, original_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes [N, 4] from xyxy in pixels to what was asked for, rounded to what pictures can tell."""
    exact = boxes.astype(np.float64)
    if box_format == "xyxy":
        return exact.round(PIXEL_DECIMALS)
    x1, y1, x2, y2 = exact.T
    if box_format == "xywh":
        columns = (x1, y1, x2 - x1, y2 - y1)
    elif box_format == "cxcywh":
        columns = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
    else:
        height, width = original_hw
        columns = (x1 / width, y1 / height, x2 / width, y2 / height)
    return np.stack(columns, axis=1).round(NORMALIZED_DECIMALS if box_format == "normalized" else PIXEL_DECIMALS)


def answer_document(result: Result, chosen: Chosen, options: DetectOptions, total_s: float) -> dict[str, Any]:
    """The fields of DetectAnswer."""
    height, width = result.prepared.original_hw
    names = result.served.manifest.class_names
    boxes = format_boxes(chosen.boxes, options.box_format, (height, width)).tolist()
    scores = chosen.scores.astype(np.float64).round(SCORE_DECIMALS).tolist()
    return {
        "model": {"name": result.served.name, "version": result.served.version},
        "image": {"width": width, "height": height},
        "detections": [
            {"box": box, "class": names[label - 1], "class_id": label, "score": score}
            for box, score, label in zip(boxes, scores, chosen.labels.tolist(), strict=True)
        ],
        "timing_ms": timing_ms(result, total_s),
    }


def timing_ms(result: Result, total_s: float) -> dict[str, float]:
    """The fields of Timing."""
    seconds = {"decode": result.decode_s, "queue": result.queue_s, "infer": result.infer_s, "total": total_s}
    return {stage: round(value * 1e3, 2) for stage, value in seconds.items()}


def server_timing(timing: dict[str, float]) -> str:
    """The Server-Timing header."""
    return ", ".join(f"{stage};dur={value}" for stage, value in timing.items())


def dump(document: Any) -> bytes:
    """JSON."""
    return orjson.dumps(document)
