"""The picture with its detections drawn, and the type to send it in.

One colour a class, the same in every picture and on the pages: FNV-1a (32 bit) of the UTF-8 class name, modulo 12, picks from PALETTE.
`service/pages/palette.js` holds the same list and rule. N detections; boxes in the original frame, xyxy.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PALETTE = (
    "#c2410c", "#22a565", "#9a5cf5", "#d4a100", "#00a0a8", "#f5820b",
    "#e0459b", "#7a9a1c", "#e5484d", "#0ea5e9", "#2563eb", "#8d6e63",
)  # fmt: skip
FNV_OFFSET, FNV_PRIME = 0x811C9DC5, 0x01000193
EVEN_LUMINANCE = 0.179
"""Where black and white contrast alike (WCAG relative luminance)."""

SHORT_SIDE_PER_LINE = 220
SHORT_SIDE_PER_FONT = 30
"""Lines and letters grow with the picture, so that it can be read when it is shown as a whole."""
MIN_FONT_PX = 10
MAX_LABEL_SHARE = 0.3
"""Of the picture's area: in tiny or crowded pictures the lesser detections keep their colour and lose their label."""

_ENCODERS: dict[str, tuple[str, int, dict[str, int | bool]]] = {
    "image/jpeg": ("JPEG", 65_500, {"quality": 90}),
    "image/png": ("PNG", 2**31 - 1, {"compress_level": 3}),
    "image/webp": ("WEBP", 16_383, {"quality": 85, "method": 2}),
}
"""Media type to Pillow's format, the longest side it can hold, and options; the first is the default."""
DEFAULT_TYPE = next(iter(_ENCODERS))

Rectangle = tuple[int, int, int, int]


class Drawn(NamedTuple):
    """An encoded picture and its media type."""

    data: bytes
    media_type: str


class _Label(NamedTuple):
    text: str
    colour: str
    size: tuple[int, int]  # width, height with the padding
    box: Rectangle


def draw(
    picture: Image.Image | NDArray[np.uint8],
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    *,
    media_type: str = DEFAULT_TYPE,
) -> Drawn:
    """Draw boxes and labels and encode.

    Args:
        picture: upright, RGB: an image, or uint8 [height, width, 3]. It is not changed.
        boxes: [N, 4], pixels of this picture.
        scores: [N], best first: the best lie on top.
        labels: [N], 1..K.
        class_names: of labels 1..K.
        media_type: as `negotiate` returns; a picture too long for it is sent as PNG.
    """
    image = picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)
    names = [class_names[label - 1] for label in labels.tolist()]
    _draw_detections(image, boxes, scores, names)
    return encode(image, media_type)


def encode(image: Image.Image, media_type: str) -> Drawn:
    """Encode as the media type asked for, or as PNG where its sides are too long for that."""
    if max(image.size) > _ENCODERS[media_type][1]:
        media_type = "image/png"
    name, _, options = _ENCODERS[media_type]
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return Drawn(buffer.getvalue(), media_type)


def negotiate(accept: str | None) -> str:
    """The media type for a request's Accept header: the best of JPEG, PNG and WebP that it names; JPEG where it does not care.

    A type named beats a wildcard of the same weight. What accepts none of the three gets JPEG too: the request asked for a picture.
    """
    best, best_rank = DEFAULT_TYPE, (0.0, 1)
    for entry in (accept or "").split(","):
        kind, _, parameters = entry.strip().lower().partition(";")
        kind = kind.strip()
        offered, named = (kind, 1) if kind in _ENCODERS else (DEFAULT_TYPE, 0)
        if (named or kind in ("image/*", "*/*")) and (rank := (_weight(parameters), named)) > best_rank:
            best, best_rank = offered, rank
    return best


def _weight(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def colour_of(class_name: str) -> str:
    """The class's colour, `#rrggbb`."""
    digest = FNV_OFFSET
    for byte in class_name.encode("utf-8", "surrogatepass"):
        digest = (digest ^ byte) * FNV_PRIME & 0xFFFFFFFF
    return PALETTE[digest % len(PALETTE)]


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on the colour."""
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > EVEN_LUMINANCE else "#ffffff"


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else float(((channel + 0.055) / 1.055) ** 2.4)


def _draw_detections(image: Image.Image, boxes: NDArray[np.float32], scores: NDArray[np.float32], names: Sequence[str]) -> None:
    """Boxes first, then labels, so that no line crosses a label; the best last, so that it lies on top."""
    canvas = ImageDraw.Draw(image)
    short = min(image.size)
    width = max(1, round(short / SHORT_SIDE_PER_LINE))
    font = ImageFont.load_default(max(MIN_FONT_PX, short / SHORT_SIDE_PER_FONT))
    rectangles = [_whole_pixels(box, image.size) for box in boxes.tolist()]
    for rectangle, name in reversed(list(zip(rectangles, names, strict=True))):
        _draw_box(canvas, rectangle, colour_of(name), width)
    fitted = (_fit_label(font, *one, image.width) for one in zip(names, scores.tolist(), rectangles, strict=True))
    shown = _best_that_fit([label for label in fitted if label is not None], MAX_LABEL_SHARE * image.width * image.height)
    for label, place in reversed(list(zip(shown, _place_labels(shown, image.size), strict=True))):
        canvas.rectangle(place, fill=label.colour)
        canvas.text(((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), label.text, ink_on(label.colour), font, anchor="mm")


def _whole_pixels(box: Sequence[float], size: tuple[int, int]) -> Rectangle:
    """First and last pixel that the box covers, inside the picture."""
    x1, y1, x2, y2 = box
    left, top = min(max(int(x1), 0), size[0] - 1), min(max(int(y1), 0), size[1] - 1)
    return left, top, min(max(round(x2) - 1, left), size[0] - 1), min(max(round(y2) - 1, top), size[1] - 1)


def _draw_box(canvas: ImageDraw.ImageDraw, box: Rectangle, colour: str, width: int) -> None:
    """The colour inside a thin line of its ink, which shows on ground of any colour."""
    if width > 1:
        rim = max(1, width // 4)
        canvas.rectangle((box[0] - rim, box[1] - rim, box[2] + rim, box[3] + rim), outline=ink_on(colour), width=width + 2 * rim)
    canvas.rectangle(box, outline=colour, width=width)


def _fit_label(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, name: str, score: float, box: Rectangle, room: int) -> _Label | None:
    """The longest of: name and score, name, the name's beginning, that fits the picture's width."""
    ascent_box = font.getbbox("Xg")
    padding = max(1, round((ascent_box[3] - ascent_box[1]) * 0.2))
    height = int(ascent_box[3] - ascent_box[1]) + 2 * padding
    shortened = (f"{name[:length]}…" for length in range(min(len(name) - 1, 24), 0, -1))
    for text in (f"{name} {score:.2f}", name, *shortened):
        if (width := int(font.getlength(text[:200])) + 2 * padding) <= room and len(text) <= 200:
            return _Label(text, colour_of(name), (width, height), box)
    return None


def _best_that_fit(labels: Sequence[_Label], area: float) -> list[_Label]:
    covered = accumulate(width * height for width, height in (label.size for label in labels))
    return [label for label, total in zip(labels, covered, strict=True) if total <= area]


def _place_labels(labels: Sequence[_Label], size: tuple[int, int]) -> list[Rectangle]:
    """For each label, best first, the place at its box that covers least of the labels before it."""
    placed: list[Rectangle] = []
    for label in labels:
        (width, height), (x1, y1, x2, y2) = label.size, label.box
        corners = ((x1, y1 - height), (x1, y1), (x2 - width + 1, y1), (x1, y2 - height + 1), (x1, y2 + 1), (x2 - width + 1, y1 - height))
        places = [_moved_inside(x, y, width, height, size) for x, y in corners]
        placed.append(min(places, key=lambda place: sum(_overlap(place, other) for other in placed)))
    return placed


def _moved_inside(x: int, y: int, width: int, height: int, size: tuple[int, int]) -> Rectangle:
    left, top = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
    return left, top, left + width - 1, top + height - 1


def _overlap(a: Rectangle, b: Rectangle) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
