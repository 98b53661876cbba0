"""Drawn detections: where, in which colour, in which type, readable at every size."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.drawing import PALETTE, Drawn, colour_of, draw, encode, ink_on, negotiate

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("RBC", "WBC", "Platelets")
GREY = (128, 128, 128)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def drawn(size: tuple[int, int], boxes: list[list[float]], labels: list[int] | None = None, names: tuple[str, ...] = NAMES) -> np.ndarray:
    labels = labels or [1] * len(boxes)
    answer = draw(
        Image.new("RGB", size, GREY),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.linspace(0.99, 0.5, len(boxes)).astype(np.float32),
        np.array(labels, np.int64),
        names,
        media_type="image/png",
    )
    return np.asarray(Image.open(io.BytesIO(answer.data)))


def where(array: np.ndarray, colour: str) -> np.ndarray:
    return (array == rgb(colour)).all(axis=2)


@pytest.mark.parametrize("width", [160, 640, 1280, 4000])
def test_box_lies_where_it_was_found(width: int) -> None:
    height = width * 3 // 4
    box = [width * 0.25, height * 0.5, width * 0.75, height * 0.9]
    coloured = where(drawn((width, height), [box]), colour_of("RBC"))
    rows, columns = np.flatnonzero(coloured[:, int(width * 0.6)]), np.flatnonzero(coloured[int(height * 0.7)])
    assert abs(columns.min() - box[0]) <= 1
    assert abs(columns.max() + 1 - box[2]) <= 1
    assert abs(rows.max() + 1 - box[3]) <= 1
    assert abs(rows[rows > height * 0.45].min() - box[1]) <= 1


def label_height(size: tuple[int, int]) -> int:
    """Rows of the filled label, told by its left edge above the box."""
    width, height = size
    array = drawn(size, [[width * 0.3, height * 0.5, width * 0.8, height * 0.9]])
    above = where(array, colour_of("RBC"))[: int(height * 0.5) - 1, int(width * 0.3) + 1]
    return int(above.sum())


def test_letters_and_lines_grow_with_the_picture() -> None:
    heights = [label_height(size) for size in ((320, 240), (1280, 960), (4000, 3000))]
    assert heights[0] >= 10
    assert heights[0] < heights[1] < heights[2]
    assert 0.02 < heights[2] / 3000 < 0.06
    lines = [int(where(drawn((4 * s, 3 * s), [[s, s, 3 * s, 2.5 * s]]), colour_of("RBC"))[2 * s, : 2 * s].sum()) for s in (80, 320, 1000)]
    assert lines == [1, 4, 14]


def test_label_is_readable() -> None:
    """Ink on the class's colour, in an area of the label's shape, with a contrast of at least 4.5 to 1 for every colour."""
    array = drawn((640, 480), [[100, 200, 300, 400]])
    label = array[175:200, 100:170]
    colours = Counter(map(tuple, label.reshape(-1, 3).tolist()))
    assert colours.most_common(1)[0][0] == rgb(colour_of("RBC"))
    assert colours[rgb(ink_on(colour_of("RBC")))] > 20
    for colour in PALETTE:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb(colour))]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        contrast = 1.05 / (luminance + 0.05) if ink_on(colour) == "#ffffff" else (luminance + 0.05) / 0.05
        assert contrast >= 4.5, colour


def test_the_best_lies_on_top_and_labels_keep_apart() -> None:
    boxes = [[100, 100, 300, 300], [102, 102, 302, 302]]
    array = drawn((640, 480), boxes, [1, 2])
    assert where(array, colour_of("RBC"))[200, 100]
    first, second = (where(array, colour_of(name)) for name in ("RBC", "WBC"))
    filled = [np.flatnonzero(np.convolve(mask.sum(axis=1), [1], "same") > 30) for mask in (first, second)]
    assert all(len(rows) > 10 for rows in filled), "both labels are there"


@pytest.mark.parametrize("size", [(2, 2), (3, 90), (31, 20), (64, 48), (9, 400)])
def test_tiny_pictures_are_drawn_without_covering_them(size: tuple[int, int]) -> None:
    width, height = size
    array = drawn(size, [[0, 0, width, height], [width / 4, height / 4, width / 2, height / 2]], [1, 3])
    assert array.shape == (height, width, 3)
    if min(size) > 20:
        assert (array == GREY).all(axis=2).mean() > 0.3


@given(
    st.tuples(st.integers(2, 300), st.integers(2, 300)),
    st.lists(st.tuples(*[st.floats(-50, 400, width=32)] * 4), max_size=6),
    st.text(min_size=1, max_size=300),
)
def test_any_box_and_any_name_can_be_drawn(size: tuple[int, int], boxes: list[tuple[float, ...]], name: str) -> None:
    assert drawn(size, [list(box) for box in boxes], names=(name,)).shape == (size[1], size[0], 3)


def test_the_picture_given_is_not_changed() -> None:
    picture = Image.new("RGB", (60, 40), GREY)
    array = np.asarray(picture).copy()
    for given_picture in (picture, array):
        draw(given_picture, np.array([[5, 5, 30, 30]], np.float32), np.ones(1, np.float32), np.ones(1, np.int64), NAMES)
    assert picture.getcolors() == [(2400, GREY)]
    assert (array == 128).all()


@pytest.mark.parametrize(("media_type", "name"), [("image/jpeg", "JPEG"), ("image/png", "PNG"), ("image/webp", "WEBP")])
def test_encoded_as_asked(media_type: str, name: str) -> None:
    answer = encode(Image.new("RGB", (60, 40), GREY), media_type)
    with Image.open(io.BytesIO(answer.data)) as image:
        assert (answer.media_type, image.format, image.size) == (media_type, name, (60, 40))


def test_too_long_for_webp_becomes_png() -> None:
    answer = encode(Image.new("RGB", (16_384, 2)), "image/webp")
    assert answer.media_type == "image/png"
    assert isinstance(answer, Drawn)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "image/jpeg"),
        ("", "image/jpeg"),
        ("*/*", "image/jpeg"),
        ("image/*", "image/jpeg"),
        ("image/png", "image/png"),
        ("IMAGE/WebP", "image/webp"),
        ("image/png;q=0.2, image/webp;q=0.9", "image/webp"),
        ("image/avif,image/webp,image/apng,*/*;q=0.8", "image/webp"),
        ("text/html,*/*;q=0.8,image/png;q=0.5", "image/jpeg"),
        ("image/png;q=0, image/*;q=0.1", "image/jpeg"),
        ("*/*, image/png", "image/png"),
        ("application/json", "image/jpeg"),
        ("image/png;q=high", "image/jpeg"),
        ("image/png;q=nan, image/webp;q=0.1", "image/webp"),
        (";;,,=;q", "image/jpeg"),
    ],
)
def test_accept(accept: str | None, expected: str) -> None:
    assert negotiate(accept) == expected


def test_colours_are_those_of_the_pages() -> None:
    script = (ROOT / "service/pages/palette.js").read_text()
    assert tuple(re.findall(r'"(#[0-9a-f]{6})"', script.split("PALETTE", 1)[1].split("]", 1)[0])) == PALETTE


def test_colours_follow_fnv_1a() -> None:
    """Reference values of the hash: "" is the offset, "a" and "foobar" from the authors' test vectors."""
    for text, digest in {"": 0x811C9DC5, "a": 0xE40C292C, "foobar": 0xBF9CF968}.items():
        assert colour_of(text) == PALETTE[digest % 12]
    assert len({colour_of(name) for name in NAMES}) == 3
    assert len(set(PALETTE)) == 12
