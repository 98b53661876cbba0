"""Pictures with boxes: what was found and what should have been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from model.data.images import read_rgb
from model.data.records import DetectionSet
from model.metrics.errors import HIT_IOU
from model.metrics.matching import TRUE, match_detections
from model.metrics.predictions import Prediction

SHOWN_SCORE = 0.5
PALETTE = ("#2563eb", "#dc2626", "#16a34a", "#d97706", "#9333ea", "#0891b2", "#db2777", "#65a30d")
TRUTH_COLOUR = "#ffffff"
LEAST_SIDE_PX = 480
"""Smaller pictures are enlarged, so that labels can be read."""


def draw_detections(
    image: NDArray[np.uint8],
    prediction: Prediction,
    class_names: Sequence[str],
    *,
    truth: NDArray[np.floating] | None = None,
    score_thresh: float = SHOWN_SCORE,
) -> Image.Image:
    """Draws detections with class and score, and the ground truth as thin white boxes beneath.

    Args:
        image: uint8 [H, W, 3], in the frame of the boxes.
        truth: boxes [G, 4].
    """
    factor = max(1, round(LEAST_SIDE_PX / min(image.shape[:2])))
    canvas = Image.fromarray(image).resize((image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for box in np.zeros((0, 4)) if truth is None else truth:
        draw.rectangle([float(v) * factor for v in box], outline=TRUTH_COLOUR, width=1)
    rows = zip(prediction["boxes"], prediction["scores"], prediction["labels"], strict=True)
    for box, score, label in sorted(rows, key=lambda row: float(row[1])):  # the surest on top
        if score >= score_thresh:
            text = f"{class_names[int(label) - 1]} {score:.2f}"
            _labelled_box(draw, [float(v) * factor for v in box], text, PALETTE[(int(label) - 1) % len(PALETTE)])
    return canvas


def _labelled_box(draw: ImageDraw.ImageDraw, box: list[float], text: str, colour: str) -> None:
    draw.rectangle(box, outline=colour, width=2)
    font = ImageFont.load_default(12)
    x, y = box[0], max(0.0, box[1] - 15)
    draw.rectangle(draw.textbbox((x + 2, y), text, font=font), fill=colour)
    draw.text((x + 2, y), text, fill="white", font=font)


def save_samples(folder: Path, dataset: DetectionSet, predictions: Sequence[Prediction], indices: Sequence[int]) -> list[Path]:
    """Writes pictures with their detections and truth, named by position and id; returns the files."""
    paths = []
    for index in indices:
        record = dataset.records[index]
        picture = draw_detections(read_rgb(record.path), predictions[index], dataset.class_names, truth=record.boxes)
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in record.image_id)
        paths.append(folder / f"{index:05d}_{name}.png")
        picture.save(paths[-1])
    return paths


def worst_pictures(dataset: DetectionSet, predictions: Sequence[Prediction], count: int) -> list[int]:
    """Positions of the pictures with most mistakes: detections over the shown score that hit nothing, and objects not found."""
    mistakes = []
    for record, prediction in zip(dataset.records, predictions, strict=True):
        kept = np.asarray(prediction["scores"]) >= SHOWN_SCORE
        sure = Prediction(boxes=prediction["boxes"][kept], scores=prediction["scores"][kept], labels=prediction["labels"][kept])
        outcome = match_detections(record, sure, iou_thresh=HIT_IOU).outcome
        hits = int((outcome == TRUE).sum())
        mistakes.append(int((outcome == 0).sum()) + int(record.plain.sum()) - hits)
    return [int(i) for i in np.argsort(-np.array(mistakes), kind="stable")[:count]]
