"""Pictures of where two versions disagree most: A's detections on the left, B's on the right, the truth thin and white in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from export.compare_agreement import PictureAgreement
from model.data.images import read_rgb
from model.data.records import DetectionSet
from model.metrics.predictions import Prediction
from model.visualize import draw_detections

ALONE_COLOUR = "#facc15"
HEADER_PX, GAP_PX, MAX_SIDE_PX = 26, 8, 1000
JPEG_QUALITY = 88


def draw_disagreements(
    folder: Path,
    dataset: DetectionSet,
    predictions: tuple[Sequence[Prediction], Sequence[Prediction]],
    agreements: Sequence[PictureAgreement],
    *,
    titles: tuple[str, str],
    score_threshold: float,
    count: int,
    mark: str = "",
) -> dict[int, str]:
    """Draws the pictures with the largest disagreement, and only those where there is one.

    Args:
        folder: made where it is missing.
        predictions: A's and B's, in the records' order.
        titles: of A and of B.
        mark: the end of every name, with which they replace no file of an earlier run.

    Returns:
        Position of the picture -> name of its file in the folder, largest disagreement first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(agreements)), key=lambda i: (-agreements[i].disagreement, i))
    names = {}
    for index in [i for i in order if agreements[i].disagreement > 0][:count]:
        record, one = dataset.records[index], agreements[index]
        rgb = read_rgb(record.path)
        sides = []
        for title, prediction, alone in zip(titles, (predictions[0][index], predictions[1][index]), (one.missed, one.extra), strict=True):
            drawn = draw_detections(rgb, prediction, dataset.class_names, truth=record.boxes, score_thresh=score_threshold)
            _ring(drawn, [prediction["boxes"][row] for row in alone], drawn.width / rgb.shape[1])
            sides.append(_titled(drawn, title))
        names[index] = f"{index:05d}_{''.join(c if c.isalnum() or c in '-_.' else '_' for c in record.image_id)}{mark}.jpg"
        _beside(sides).save(folder / names[index], quality=JPEG_QUALITY)
    return names


def _ring(canvas: Image.Image, boxes: Iterable[Sequence[float]], factor: float) -> None:
    """A wide frame around what only this version finds."""
    draw = ImageDraw.Draw(canvas)
    for x1, y1, x2, y2 in boxes:
        outer = [float(x1) * factor - 4, float(y1) * factor - 4, float(x2) * factor + 4, float(y2) * factor + 4]
        draw.rectangle(outer, outline=ALONE_COLOUR, width=3)


def _titled(picture: Image.Image, title: str) -> Image.Image:
    if max(picture.size) > MAX_SIDE_PX:
        picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (picture.width, picture.height + HEADER_PX), "#111827")
    ImageDraw.Draw(canvas).text((8, 5), title, fill="white", font=ImageFont.load_default(14))
    canvas.paste(picture, (0, HEADER_PX))
    return canvas


def _beside(sides: Sequence[Image.Image]) -> Image.Image:
    width, height = sum(side.width for side in sides) + GAP_PX * (len(sides) - 1), max(side.height for side in sides)
    canvas = Image.new("RGB", (width, height), "white")
    left = 0
    for side in sides:
        canvas.paste(side, (left, 0))
        left += side.width + GAP_PX
    return canvas
