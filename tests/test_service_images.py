"""The input frame: resize rule, buckets, batches, and boxes on their way back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.errors import BadImage, TooManyPixels
from service.images import (
    ImageLimits,
    Prepared,
    assemble,
    choose_bucket,
    decode,
    prepare,
    prepare_pixels,
    probe,
    resized_hw,
    to_original_frame,
)
from service.manifest import InputSpec

SPEC = InputSpec(short_side=320, long_side=416, buckets=[(320, 416), (416, 320), (320, 320), (416, 416)])
LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("original_hw", "expected"),
    [
        ((480, 640), (312, 416)),  # touches the long side: 416 / 640 = 0.65
        ((640, 480), (416, 312)),
        ((400, 480), (320, 384)),  # touches the short side
        ((32, 40), (320, 400)),  # small pictures grow
        ((320, 320), (320, 320)),
        ((1000, 21), (416, 9)),  # 8.736 rounds up
        ((2, 4000), (1, 416)),  # 0.208 would vanish
        ((833, 640), (416, 320)),  # 0.4994: 415.99 and 319.6
        ((416, 3), (416, 3)),
        ((832, 5), (416, 3)),  # 2.5 rounds up
    ],
)
def test_resize_keeps_the_aspect_and_rounds_halves_up(original_hw: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_hw(original_hw, SPEC) == expected


@given(st.integers(2, 5000), st.integers(2, 5000))
def test_resize_is_the_same_for_a_picture_on_its_side(height: int, width: int) -> None:
    """Decoding relies on it: a picture is resized as it is stored and turned afterwards."""
    h, w = resized_hw((height, width), SPEC)
    assert resized_hw((width, height), SPEC) == (w, h)
    assert 1 <= min(h, w) <= 320
    assert max(h, w) <= 416


@pytest.mark.parametrize(
    ("hw", "bucket"),
    [((312, 416), (320, 416)), ((416, 312), (416, 320)), ((320, 320), (320, 320)), ((1, 1), (320, 320)), ((400, 400), (416, 416))],
)
def test_smallest_bucket_that_holds_the_picture(hw: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose_bucket(hw, SPEC) == bucket


def test_no_bucket_is_a_bad_image_that_names_the_buckets() -> None:
    landscape = InputSpec(short_side=320, long_side=416, buckets=[(320, 416)])
    with pytest.raises(BadImage, match=r"416x312.*320x416"):
        prepare(encoded(photo(480, 640)), landscape, LIMITS)


def test_prepare_resizes_like_pillow() -> None:
    image = photo(640, 480)
    prepared = prepare(encoded(image), SPEC, LIMITS)
    by_pillow = np.asarray(image.resize((416, 312), Image.Resampling.BILINEAR), np.int16)
    assert np.abs(prepared.pixels - by_pillow).max() <= 2
    assert abs((prepared.pixels - by_pillow).mean()) < 0.02
    assert (prepared.bucket, prepared.original_hw, prepared.h, prepared.w) == ((320, 416), (480, 640), 312, 416)
    assert prepared.pixels.dtype == np.uint8


def test_decoded_pixels_prepare_to_the_same_as_the_file() -> None:
    image = photo(500, 300)
    from_file, from_pixels = prepare(encoded(image), SPEC, LIMITS), prepare_pixels(np.asarray(image), SPEC)
    assert np.array_equal(from_file.pixels, from_pixels.pixels)
    assert (from_file.bucket, from_file.original_hw) == (from_pixels.bucket, from_pixels.original_hw)


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = photo(400, 320)
    assert np.array_equal(prepare(encoded(image), SPEC, LIMITS).pixels, np.asarray(image))


def test_batch_is_padded_right_and_bottom() -> None:
    first, second = (prepare_pixels(np.asarray(photo(width, height)), SPEC) for width, height in ((640, 480), (416, 300)))
    images, sizes = assemble([first, second])
    assert (images.shape, images.dtype) == ((2, 320, 416, 3), np.uint8)
    assert (sizes.tolist(), sizes.dtype) == ([[312, 416], [300, 416]], np.int64)
    assert np.array_equal(images[0, :312], first.pixels)
    assert np.array_equal(images[1, :300], second.pixels)
    assert not images[0, 312:].any()
    assert not images[1, 300:].any()


@pytest.mark.parametrize("shapes", [[], [(640, 480), (480, 640)]])
def test_a_batch_has_one_bucket(shapes: list[tuple[int, int]]) -> None:
    batch = [prepare_pixels(np.asarray(photo(width, height)), SPEC) for width, height in shapes]
    with pytest.raises(ValueError, match="one bucket"):
        assemble(batch)


def test_boxes_come_back_per_axis_and_clipped() -> None:
    prepared = Prepared(np.zeros((200, 416, 3), np.uint8), (320, 416), (401, 832))
    boxes = np.array([[10, 20, 30, 40], [0, 0, 416, 200], [400, 190, 420, 210], [-5, -5, 3, 3]], np.float32)
    expected = [[20, 40.1, 60, 80.2], [0, 0, 832, 401], [800, 380.95, 832, 401], [0, 0, 6, 6.015]]
    original = to_original_frame(boxes, prepared)
    assert original.dtype == np.float32
    np.testing.assert_allclose(original, expected, rtol=1e-6)
    assert to_original_frame(np.zeros((0, 4), np.float32), prepared).shape == (0, 4)


@given(st.integers(2, 3000), st.integers(2, 3000), st.floats(0, 1), st.floats(0, 1))
def test_a_box_survives_the_way_there_and_back(height: int, width: int, across: float, down: float) -> None:
    h, w = resized_hw((height, width), SPEC)
    prepared = Prepared(np.zeros((h, w, 3), np.uint8), SPEC.buckets[0], (height, width))
    box = np.array([[0, 0, across * width, down * height]])
    there = (box * np.array([w / width, h / height] * 2)).astype(np.float32)
    np.testing.assert_allclose(to_original_frame(there, prepared), box, rtol=1e-5, atol=1e-3)


def test_probe_reads_the_header_only() -> None:
    whole = encoded(photo(640, 480), "JPEG")
    info = probe(whole[: len(whole) // 2], LIMITS)  # cut in the scan: decoding would fail
    assert (info.format, info.mode, info.stored_hw) == ("JPEG", "RGB", (480, 640))
    with pytest.raises(BadImage):
        decode(whole[: len(whole) // 2], LIMITS)
    with pytest.raises(TooManyPixels):
        probe(whole, ImageLimits(max_pixels=640 * 480 - 1))


def test_limits_cannot_exceed_what_the_decoders_allow() -> None:
    with pytest.raises(ValueError, match="178956970"):
        ImageLimits(max_pixels=200_000_000)
