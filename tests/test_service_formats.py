"""Files that claim more than they hold: refused before, or soon after, a decoder believes them."""

from __future__ import annotations

import gc
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from service_pictures import JPEG, encoded, scene

from service.decoding import ImageLimits, decode_rgb
from service.errors import BadImage, DetectorError, TooManyPixels
from service.formats import (
    MAX_JPEG2000_TILES,
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    MAX_READS,
    MAX_RLE_PIXELS,
    MAX_TIFF_ENTRIES,
    MAX_TIFF_VALUES,
    sniff,
)

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

LIMITS = ImageLimits()
PNG, GIF = encoded(scene(), "PNG"), encoded(scene("P"), "GIF")
SHORT, LONG = 3, 4
"""TIFF's types of 2 and 4 bytes."""


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    picture = encoded(scene(), "JPEG", progressive=True)
    first = picture.index(b"\xff\xda")
    already = picture.count(b"\xff\xda", first)
    last = picture[picture.rindex(b"\xff\xda") : -2]
    return picture[:-2] + last * (count - already) + picture[-2:]


def tiff(width: int, height: int, tags: dict[int, tuple[int, list[int]]], data: bytes = bytes(1000), order: str = "<") -> bytes:
    """One directory, and `data` at offset 8."""
    entries = {256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [8]), 262: (SHORT, [1]), 277: (SHORT, [1]), **tags}
    at = 8 + len(data)
    beyond, directory = b"", b""
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        where = struct.pack(order + "I", at + 6 + 12 * len(entries) + len(beyond))
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + (packed.ljust(4, b"\0") if len(packed) <= 4 else where)
        beyond += packed if len(packed) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    return head + data + struct.pack(order + "H", len(entries)) + directory + bytes(4) + beyond


def codestream(width: int, height: int, tile: int, components: int = 3) -> bytes:
    """A JPEG 2000 whose header claims this size."""
    real = encoded(scene(), "JPEG2000", no_jp2=True)
    return real[:8] + struct.pack(">8IH", width, height, 0, 0, tile, tile, 0, 0, components) + real[42:]


def rle_bmp(side: int) -> bytes:
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 54 + 1024, 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    return header + bytes(range(256)) * 4 + b"\0\0" * side


def hidden_codestream() -> bytes:
    """A container that says 60 x 40 around a codestream of 20 000 x 20 000 in tiles of one pixel."""
    picture = encoded(scene(), "JPEG2000")
    at = picture.index(b"\xff\x4f\xff\x51") + 8
    return picture[:at] + struct.pack(">8I", 20_000, 20_000, 0, 0, 1, 1, 0, 0) + picture[at + 32 :]


STRIPS = {259: (SHORT, [1]), 278: (LONG, [6999])}
LZW = {259: (SHORT, [5]), 324: (LONG, [8]), 325: (LONG, [1000])}

BOMBS = {
    "JPEG of many scans": (scans(MAX_JPEG_SCANS + 1), BadImage),
    "JPEG of many segments": (JPEG[:2] + b"\xff\xec\0\2" * (MAX_JPEG_SEGMENTS + 1) + JPEG[2:], BadImage),
    "JPEG of filling bytes": (JPEG[:2] + b"\xff" * 3_000_000 + JPEG[2:], BadImage),
    "PNG of empty chunks": (PNG[:33] + chunk(b"teSt") * (MAX_READS // 2) + PNG[33:], BadImage),
    "PNG whose text inflates": (PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000))) + PNG[33:], BadImage),
    "PNG whose profile inflates": (PNG[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000))) + PNG[33:], BadImage),
    "GIF of tiny comments": (GIF[:-1].replace(b",", b"!\xfe\1a\0" * 200_000 + b",", 1) + b";", BadImage),
    "PGM of comments": (b"P5\n" + b"#\n" * 1_000_000 + b"60 40 255\n" + bytes(2400), BadImage),
    "TIFF of many tags": (tiff(60, 40, {tag: (SHORT, [1]) for tag in range(40_000, 40_001 + MAX_TIFF_ENTRIES)}), BadImage),
    "TIFF of many strips": (tiff(7000, 7000, {**STRIPS, 273: (LONG, [8] * (MAX_TIFF_VALUES + 1))}), BadImage),
    "TIFF whose strips cover it often": (tiff(7000, 7000, {**STRIPS, 273: (LONG, [8] * 60_000)}), BadImage),
    "TIFF with a huge tile": (tiff(60, 40, {**LZW, 322: (LONG, [46_336]), 323: (LONG, [46_336])}), TooManyPixels),
    "TIFF directory outside the file": (b"II*\0" + struct.pack("<I", 4_000_000_000) + bytes(100), BadImage),
    "BigTIFF of many tags": (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**40) + bytes(100), BadImage),
    "JPEG 2000 of many tiles": (codestream(1000, 1000, 30), BadImage),
    "JPEG 2000 of no tile": (codestream(1000, 1000, 0), BadImage),
    "JPEG 2000 inside a smaller one": (hidden_codestream(), BadImage),
    "run-length coded BMP": (rle_bmp(int(MAX_RLE_PIXELS**0.5) + 1), BadImage),
    "WebP of 16 383 x 16 383": (b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xfe\xbf\xff\x0f" + bytes(20), TooManyPixels),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name: str) -> None:
    data, error = BOMBS[name]
    gc.disable()  # what other tests left behind may take seconds to collect
    try:
        started = time.process_time()
        with pytest.raises(DetectorError) as caught:
            decode_rgb(data, LIMITS)
        spent_s = time.process_time() - started
    finally:
        gc.enable()
    assert type(caught.value) is error, caught.value.detail
    assert spent_s < 3


def test_what_lies_just_within_the_limits_is_decoded() -> None:
    for data in (
        scans(MAX_JPEG_SCANS),
        JPEG[:2] + b"\xff\xec\0\2" * (MAX_JPEG_SEGMENTS - 20) + JPEG[2:],
        PNG[:33] + chunk(b"teSt") * 20_000 + PNG[33:],
        GIF[:-1].replace(b",", b"!\xfe\1a\0" * 20_000 + b",", 1) + b";",
        tiff(60, 40, {273: (LONG, [8]), 279: (LONG, [2400]), 259: (SHORT, [1])}, bytes(2400)),
        tiff(60, 40, {273: (LONG, [8]), 279: (LONG, [2400]), 259: (SHORT, [1])}, bytes(2400), order=">"),
    ):
        assert decode_rgb(data, LIMITS).original_hw == (40, 60)


def test_scans_of_a_second_picture_do_not_count() -> None:
    assert decode_rgb(JPEG + scans(MAX_JPEG_SCANS) * 3, LIMITS).original_hw == (40, 60)


def test_tiles_of_a_large_picture_do_count() -> None:
    tile = 100
    tiled = encoded(Image.linear_gradient("L").resize((3200, 2400)), "JPEG2000", tile_size=(tile, tile), quality_layers=[60])
    assert 3200 // tile * 2400 // tile <= MAX_JPEG2000_TILES
    assert decode_rgb(tiled, LIMITS).original_hw == (2400, 3200)


def test_format_is_told_by_content() -> None:
    names = {
        "JPEG": "JPEG",
        "PNG": "PNG",
        "WEBP": "WEBP",
        "GIF": "GIF",
        "BMP": "BMP",
        "TIFF": "TIFF",
        "PPM": "PPM",
        "AVIF": "AVIF",
        "JPEG2000": "JPEG2000",
    }
    assert {name: sniff(encoded(scene(), name)) for name in names} == names
    big = io.BytesIO()
    scene().save(big, "TIFF", big_tiff=True)
    assert sniff(big.getvalue()) == "TIFF"
    assert np.array_equal(np.asarray(decode_rgb(big.getvalue(), LIMITS).image), np.asarray(scene()))
    generic = bytearray(encoded(scene(), "AVIF"))
    generic[8:12] = b"mif1"  # a generic brand; avif stays among the compatible ones
    assert sniff(bytes(generic)) == "AVIF"
