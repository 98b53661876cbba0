"""Pictures of every kind that people send, made here, with what must come of them: the rows of the README's table."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from service.decoding import ImageLimits, decode_rgb
from service.errors import BadImage, BodyTooLarge, DetectorError, EmptyBody, TooManyPixels, UnsupportedType

LIMITS = ImageLimits(max_bytes=4_000_000, max_pixels=8_000_000)
WIDTH, HEIGHT = 60, 40
CORNERS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (30, 50, 200), "grey": (128, 128, 128)}
ORIENTATION_TAG = 0x0112


def scene(mode: str = "RGB") -> Image.Image:
    """Red, green over blue, grey: every turn and mirror of it differs."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for index, colour in enumerate(CORNERS.values()):
        left, top = index % 2 * WIDTH // 2, index // 2 * HEIGHT // 2
        image.paste(colour, (left, top, left + WIDTH // 2, top + HEIGHT // 2))
    return image.convert(mode)


def encoded(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def pixels(data: bytes, limits: ImageLimits = LIMITS) -> NDArray[np.int16]:
    return np.asarray(decode_rgb(data, limits).image, dtype=np.int16)


def corners(data: bytes) -> list[tuple[int, ...]]:
    """The four areas' middles, row by row."""
    array = pixels(data)
    height, width = array.shape[:2]
    return [tuple(array[height * y // 4, width * x // 4].tolist()) for y in (1, 3) for x in (1, 3)]


def like(found: list[tuple[int, ...]], expected: list[tuple[int, int, int]], tolerance: int = 12) -> bool:
    return bool(np.abs(np.array(found) - np.array(expected)).max() <= tolerance)


def turned(orientation: int) -> Image.Image:
    """The scene as a camera held that way stores it: the inverse of what the tag asks for."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    return scene().transpose(inverse[orientation]) if orientation in inverse else scene()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = orientation
    return tags


def see_through() -> Image.Image:
    image = scene("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)).point(lambda value: 0 if value < 128 else 255))
    return image


def frames(name: str) -> bytes:
    return encoded(scene(), name, save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("black", "white")])


def sixteen_bits(name: str, **options: object) -> bytes:
    ramp = np.tile(np.linspace(0, 65_535, WIDTH).astype(np.uint16), (HEIGHT, 1))
    return encoded(Image.fromarray(ramp), name, **options)


def floats(low: float, high: float) -> bytes:
    return encoded(Image.fromarray(np.tile(np.linspace(low, high, WIDTH, dtype=np.float32), (HEIGHT, 1))), "TIFF")


def is_grey_ramp(data: bytes) -> bool:
    """Dark on the left, bright on the right, nothing clipped between."""
    array = pixels(data)
    return bool(
        array.shape == (HEIGHT, WIDTH, 3)
        and np.abs(array[HEIGHT // 2, :, 0] - np.linspace(0, 255, WIDTH)).max() <= 2
        and np.ptp(array, axis=2).max() == 0
    )


def swapped_profile() -> bytes:
    """sRGB with red and green exchanged: what is stored as red is green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def lab(image: Image.Image) -> Image.Image:
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + encoded(scene())[33:]


SCENE = list(CORNERS.values())
OVER_WHITE = [(255, 255, 255), (255, 255, 255), *SCENE[2:]]
GREYS = [(round(0.299 * r + 0.587 * g + 0.114 * b),) * 3 for r, g, b in SCENE]
JPEG = encoded(scene(), "JPEG", quality=95)
SWAPPED = [(green, red, blue) for red, green, blue in SCENE]
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
ORIENTED = ("JPEG", "PNG", "WEBP", "TIFF")
Check = Callable[[bytes], bool]


def shows(expected: list[tuple[int, int, int]], tolerance: int = 12) -> Check:
    return lambda data: like(corners(data), expected, tolerance)


# README's words, the picture, and what must come out.
ACCEPTED: list[tuple[str, bytes, Check]] = [
    *[(f"EXIF orientation {n} in {f}", encoded(turned(n), f, exif=exif(n)), shows(SCENE)) for n in range(1, 9) for f in ORIENTED],
    ("EXIF orientation in AVIF", encoded(turned(6), "AVIF", exif=exif(6), quality=95, subsampling="4:4:4"), shows(SCENE)),
    ("EXIF orientation out of range", encoded(scene(), "PNG", exif=exif(77)), shows(SCENE)),
    ("grey JPEG", encoded(scene("L"), "JPEG"), shows(GREYS)),
    ("grey PNG", encoded(scene("L"), "PNG"), shows(GREYS)),
    ("1-bit PNG", encoded(scene("L").point(lambda value: 255 * (value > 90)).convert("1"), "PNG"), shows([BLACK, WHITE, BLACK, WHITE])),
    ("1-bit TIFF, CCITT G4", encoded(scene("1"), "TIFF", compression="group4"), lambda data: set(np.unique(pixels(data))) <= {0, 255}),
    ("palette PNG", encoded(scene("P"), "PNG"), shows(SCENE, 30)),
    ("palette GIF", encoded(scene(), "GIF"), shows(SCENE, 30)),
    ("CMYK JPEG with Adobe's inversion", encoded(scene("CMYK"), "JPEG", quality=95), shows(SCENE)),
    ("CMYK TIFF", encoded(scene("CMYK"), "TIFF"), shows(SCENE)),
    ("YCbCr TIFF", encoded(scene("YCbCr"), "TIFF"), shows(SCENE)),
    ("L*a*b* TIFF", encoded(lab(scene()), "TIFF"), shows(SCENE)),
    ("alpha in PNG", encoded(see_through(), "PNG"), shows(OVER_WHITE)),
    ("alpha in WebP", encoded(see_through(), "WEBP", lossless=True), shows(OVER_WHITE)),
    ("alpha in TIFF", encoded(see_through(), "TIFF"), shows(OVER_WHITE)),
    ("grey with alpha", encoded(see_through().convert("LA"), "PNG"), shows([(255,) * 3, (255,) * 3, *GREYS[2:]])),
    ("transparent palette entry", encoded(Image.new("P", (WIDTH, HEIGHT)), "PNG", transparency=0), shows([(255,) * 3] * 4)),
    ("transparent colour of an RGB PNG", encoded(scene(), "PNG", transparency=CORNERS["red"]), shows([(255,) * 3, *SCENE[1:]])),
    ("16-bit grey PNG", sixteen_bits("PNG"), is_grey_ramp),
    ("16-bit grey TIFF", sixteen_bits("TIFF"), is_grey_ramp),
    ("16-bit grey JPEG 2000", sixteen_bits("JPEG2000"), is_grey_ramp),
    ("16-bit PGM", b"P5 60 40 65535\n" + np.tile(np.linspace(0, 65_535, WIDTH), (HEIGHT, 1)).astype(">u2").tobytes(), is_grey_ramp),
    ("floats from 0 to 1", floats(0, 1), is_grey_ramp),
    ("floats of any range", floats(-7, 300), is_grey_ramp),
    ("animated GIF", frames("GIF"), shows(SCENE, 30)),
    ("animated WebP", frames("WEBP"), shows(SCENE, 20)),
    ("animated PNG", frames("PNG"), shows(SCENE)),
    ("animated AVIF", frames("AVIF"), shows(SCENE, 30)),
    ("multi-page TIFF", frames("TIFF"), shows(SCENE)),
    ("MPO (two photos in one JPEG)", frames("MPO"), shows(SCENE)),
    ("progressive JPEG", encoded(scene(), "JPEG", progressive=True, quality=95), shows(SCENE)),
    ("BMP", encoded(scene(), "BMP"), shows(SCENE)),
    ("PPM", encoded(scene(), "PPM"), shows(SCENE)),
    ("AVIF", encoded(scene(), "AVIF", quality=95, subsampling="4:4:4"), shows(SCENE)),
    ("JPEG 2000", encoded(scene(), "JPEG2000"), shows(SCENE)),
    ("JPEG 2000 codestream", encoded(scene(), "JPEG2000", no_jp2=True), shows(SCENE)),
    ("ICC profile, converted to sRGB", encoded(scene(), "PNG", icc_profile=swapped_profile()), shows(SWAPPED, 45)),
    ("ICC profile with alpha", encoded(see_through(), "PNG", icc_profile=swapped_profile()), shows([WHITE, WHITE, *SWAPPED[2:]], 45)),
    ("broken ICC profile, ignored", encoded(scene(), "PNG", icc_profile=swapped_profile()[:200]), shows(SCENE, 0)),
    ("ICC profile of another colour model, ignored", encoded(scene("L"), "PNG", icc_profile=swapped_profile()), shows(GREYS)),
    ("trailing garbage", JPEG + bytes(range(256)) * 8, shows(SCENE)),
    ("a second picture behind the first", JPEG + encoded(Image.new("RGB", (9, 7)), "JPEG"), shows(SCENE)),
    ("2 pixels", encoded(Image.new("RGB", (2, 2), "red"), "PNG"), lambda data: pixels(data).shape == (2, 2, 3)),
    ("50 times as wide as high", encoded(Image.new("RGB", (100, 2), "red"), "PNG"), lambda data: pixels(data).shape == (2, 100, 3)),
]  # fmt: skip

REFUSED: list[tuple[str, bytes, type[DetectorError]]] = [
    ("nothing", b"", EmptyBody),
    ("more bytes than the limit", JPEG + bytes(LIMITS.max_bytes), BodyTooLarge),
    ("more pixels than the limit, by the header", png_claiming(4000, 2001), TooManyPixels),
    ("a header of 100 000 x 100 000", png_claiming(100_000, 100_000), TooManyPixels),
    ("a GIF frame larger than its canvas", b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2\x44\1\0;", TooManyPixels),
    ("truncated JPEG", JPEG[: len(JPEG) // 2], BadImage),
    ("truncated PNG", encoded(scene(), "PNG")[:80], BadImage),
    ("truncated WebP", encoded(scene(), "WEBP")[:60], BadImage),
    ("truncated TIFF", encoded(scene(), "TIFF")[:-2000], BadImage),
    ("truncated AVIF", encoded(scene(), "AVIF")[:-40], BadImage),
    ("truncated JPEG 2000", encoded(scene(), "JPEG2000")[:110], BadImage),
    ("first bytes of a JPEG only", b"\xff\xd8", BadImage),
    ("corrupt PNG", encoded(scene(), "PNG")[:60] + b"\0" * 20 + encoded(scene(), "PNG")[80:], BadImage),
    ("1 pixel wide", encoded(Image.new("RGB", (1, 40)), "PNG"), BadImage),
    ("1 pixel high", encoded(Image.new("RGB", (40, 1)), "JPEG"), BadImage),
    ("over 50 times as wide as high", encoded(Image.new("RGB", (202, 4)), "PNG"), BadImage),
    ("over 50 times as high as wide", encoded(Image.new("RGB", (4, 202)), "PNG"), BadImage),
    ("text", b"the quick brown fox jumps over the lazy dog", UnsupportedType),
    ("HTML", b"<!DOCTYPE html><html><body>hello</body></html>", UnsupportedType),
    ("SVG", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UnsupportedType),
    ("EPS", encoded(scene(), "EPS"), UnsupportedType),
    ("PDF", encoded(scene(), "PDF"), UnsupportedType),
    ("Photoshop", b"8BPS\0\1" + bytes(200), UnsupportedType),
    ("icon", encoded(scene(), "ICO"), UnsupportedType),
    ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), UnsupportedType),
    ("JPEG XL", b"\xff\x0a" + bytes(100), UnsupportedType),
    ("TGA", encoded(scene(), "TGA"), UnsupportedType),
    ("plain-text PPM", b"P3 2 2 255 " + b"0 " * 12, UnsupportedType),
    ("random bytes", bytes(range(1, 255)), UnsupportedType),
    ("a word that begins like a BMP", b"BMW makes cars, not pictures", UnsupportedType),
]  # fmt: skip
