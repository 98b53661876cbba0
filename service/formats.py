"""What a picture is, told from its bytes alone, and the claims in its header that would cost more than its size suggests.

A file of a few kilobytes can name thousands of scans, millions of strips or tiles: decoders believe it. The guards read headers only,
before any decoder allocates, and `MeteredFile` ends whatever takes the file apart in too small pieces. File names and Content-Type are
never consulted.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable

from service.errors import BadImage, UnsupportedType

MAX_JPEG_SCANS = 100
"""Progressive files have about ten. Every scan is one pass over the whole picture, however few bytes it has."""
MAX_JPEG_SEGMENTS = 4_096
MAX_TIFF_ENTRIES = 512
MAX_TIFF_VALUES = 65_536
"""Numbers in one TIFF tag: as many strips or tiles. Readers make an object of each."""
MAX_JPEG2000_TILES = 1_024
MAX_RLE_PIXELS = 4_000_000
"""Pixels of a run-length coded BMP, which is decoded byte by byte."""

MAX_READS = 500_000
"""Calls to `read` for one picture, about a second of them. Ordinary files need hundreds, a PNG of 20 MB in small chunks ten thousand."""

ACCEPTED = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or binary Netpbm (PGM, PPM)"

_BMP_HEADER_SIZES = {12, 40, 52, 56, 64, 108, 124}
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JPEG_MARKER = re.compile(rb"\xff+([\xc0-\xcf\xd8-\xfe])")
_JPEG_MARK = re.compile(rb"\xff(?=([^\0]))", re.DOTALL)
_CODESTREAM = b"\xff\x4f\xff\x51"

_REFUSED: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg\b", re.DOTALL), "an SVG drawing"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript drawing"),
    (re.compile(rb"%PDF-"), "a PDF document"),
    (re.compile(rb"8BPS"), "a Photoshop document"),
    (re.compile(rb"\0\0[\1\2]\0"), "an icon file"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL picture"),
    (re.compile(rb"P[123]\s"), "a plain-text Netpbm picture"),
    (re.compile(rb"\s*[<{\[]"), "text (HTML, XML or JSON)"),
    (re.compile(rb"[\t\n\r\x20-\x7e]{16}"), "text"),
)


def sniff(data: bytes) -> str:
    """Name the format from the first bytes.

    Raises:
        UnsupportedType: none that is decoded; the message names what it is, where that can be told.
    """
    for matches, name in _MAGIC:
        if matches(data):
            return name
    found = next((what for pattern, what in _REFUSED if pattern.match(data[:4096])), None)
    if _major_brand(data) in _HEIF_BRANDS:
        found = "a HEIC picture"
    raise UnsupportedType(f"expected the bytes of a {ACCEPTED} picture, got {found or 'something else'}; convert it and send it again")


def _major_brand(data: bytes) -> bytes:
    return data[8:12] if data[4:8] == b"ftyp" else b""


def _is_avif(data: bytes) -> bool:
    """The major brand, or one of the compatible brands behind a generic one."""
    brand = _major_brand(data)
    if brand in _AVIF_BRANDS:
        return True
    listed = data[16 : min(int.from_bytes(data[:4], "big"), 256)] if brand in (b"mif1", b"msf1") else b""
    return any(listed[at : at + 4] in _AVIF_BRANDS for at in range(0, len(listed), 4))


def _is_bmp(data: bytes) -> bool:
    return data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES


_MAGIC: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda data: data.startswith(b"\xff\xd8"), "JPEG"),
    (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), "PNG"),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", "WEBP"),
    (lambda data: data[:6] in (b"GIF87a", b"GIF89a"), "GIF"),
    (_is_bmp, "BMP"),
    (lambda data: data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
    (lambda data: re.match(rb"(P[456]|Pf)\s", data) is not None, "PPM"),
    (_is_avif, "AVIF"),
    (lambda data: data.startswith((_CODESTREAM, b"\0\0\0\x0cjP  \r\n\x87\n")), "JPEG2000"),
)


def guard(name: str, data: bytes) -> None:
    """Hold the claims in a header against the limits above.

    Raises:
        BadImage: a claim that no honest picture makes.
    """
    check = _GUARDS.get(name)
    if check is not None:
        check(data)


class MeteredFile(io.BytesIO):
    """The picture as a file that may be read a bounded number of times: header loops cost by the piece, not by the byte."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As BytesIO.

        Raises:
            BadImage: after MAX_READS calls.
        """
        self._reads += 1
        if self._reads > MAX_READS:
            raise BadImage(f"the picture is made of more than {MAX_READS} pieces (chunks, blocks or runs); save it again as PNG or JPEG")
        return super().read(size)


def _guard_jpeg(data: bytes) -> None:
    """Count the scans and segments of the first picture in the file; what follows its end is ignored."""
    if _has_few_marks(data):
        return
    at, scans = 2, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        found = _JPEG_MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":
            return
        at = found.end()
        scans += found[1] == b"\xda"
        if scans > MAX_JPEG_SCANS:
            raise BadImage(f"a JPEG may have {MAX_JPEG_SCANS} scans, this one has more; save it again as an ordinary JPEG")
        if found[1] != b"\xd8":  # every other marker has a segment behind it, whose bytes are no markers
            at += int.from_bytes(data[at : at + 2], "big")
    raise BadImage(f"a JPEG may have {MAX_JPEG_SEGMENTS} segments, this one has more; save it again as an ordinary JPEG")


def _has_few_marks(data: bytes) -> bool:
    """A quick bound from above: inside coded data 0xFF is followed by 0x00, so what else follows it is a marker or in a header."""
    scans = 0
    for count, mark in enumerate(_JPEG_MARK.finditer(data), start=1):
        scans += mark[1] == b"\xda"
        if count > MAX_JPEG_SEGMENTS or scans > MAX_JPEG_SCANS:
            return False
    return True


def _guard_tiff(data: bytes) -> None:
    """The first directory: entries, and values in each. Later directories are other pages, which are not read."""
    order: str = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        entries = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
        if entries > MAX_TIFF_ENTRIES:
            raise BadImage(f"a TIFF may have {MAX_TIFF_ENTRIES} tags, this one has {entries}; save it again")
        size, layout = (20, order + "HHQ") if big else (12, order + "HHI")
        for index in range(entries):
            tag, kind, count = struct.unpack_from(layout, data, at + (8 if big else 2) + index * size)
            if count > MAX_TIFF_VALUES and kind not in (1, 2, 7):  # bytes, text and undefined stay one object
                raise BadImage(f"a TIFF tag may hold {MAX_TIFF_VALUES} numbers, tag {tag} has {count}; save it with larger strips or tiles")
    except (struct.error, OverflowError) as error:
        raise BadImage("the TIFF's first directory is cut off or lies outside the file") from error


def _guard_jpeg2000(data: bytes) -> None:
    """Every codestream header in the file, since a container may hold a decoy."""
    for found in re.finditer(re.escape(_CODESTREAM), data):
        try:
            xsize, ysize, x0, y0, tile_w, tile_h, tile_x0, tile_y0, components = struct.unpack_from(">8IH", data, found.end() + 4)
        except struct.error as error:
            raise BadImage("the JPEG 2000 header is cut off") from error
        if not tile_w or not tile_h or xsize <= x0 or ysize <= y0 or tile_x0 > x0 or tile_y0 > y0:
            raise BadImage("the JPEG 2000 header names an empty picture or tile")
        tiles = -(-(xsize - tile_x0) // tile_w) * -(-(ysize - tile_y0) // tile_h)
        if tiles > MAX_JPEG2000_TILES or components > 4:
            raise BadImage(
                f"a JPEG 2000 picture may have {MAX_JPEG2000_TILES} tiles and 4 components, this one has {tiles} and {components}"
            )


def _guard_bmp(data: bytes) -> None:
    if len(data) >= 34 and int.from_bytes(data[14:18], "little") >= 40:
        width, height, _planes, _bits, compression = struct.unpack_from("<iiHHI", data, 18)
        if compression in (1, 2) and abs(width * height) > MAX_RLE_PIXELS:
            raise BadImage(f"a run-length coded BMP may have {MAX_RLE_PIXELS} pixels, this one has {abs(width * height)}; save it as PNG")


_GUARDS: dict[str, Callable[[bytes], None]] = {
    "JPEG": _guard_jpeg,
    "TIFF": _guard_tiff,
    "JPEG2000": _guard_jpeg2000,
    "BMP": _guard_bmp,
}
