"""Pictures as people have them to upright RGB: limits held against the header, then decoding, colour, size and orientation.

Order matters for memory: the picture is made small first and turned afterwards, so the peak is the decoder's own.
Thread-safe: nothing global changes after import.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
)

from service.avif import check_streams
from service.colour import to_resizable, to_rgb
from service.errors import BadImage, BodyTooLarge, DetectorError, EmptyBody, TooManyPixels
from service.formats import MeteredFile, guard, sniff
from service.resampling import Box, resize

PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
"""Readers used directly: Image.open would try others and warn by a global limit."""

MAX_PIXELS_CEILING = 2 * 89_478_485
"""Some readers refuse more on their own, by a global limit of Pillow that is left as it is."""
DRAFT_MARGIN = 2
"""A scaled JPEG keeps at least this many times the target's sides, so that the resize that follows decides how it looks."""
LEAST_REDUCTION = 2
"""Pillow drafts by 2, 4 or 8; the factors below 2 that libjpeg also has take longer than the whole picture."""
MAX_PROGRESSIVE_PIXELS = 8_000_000
"""Of a JPEG that may be tried twice, by libjpeg alone and then by Pillow: each of its scans is a pass over the whole picture."""

_OTHER_DEPTH = re.compile(r"cannot handle (\d+)-bit layers")
"""Pillow's words for a JPEG whose samples have more than 8 bits."""
_ORIENTED_BY = {"exif", "xmp"}
"""Parts of a JPEG's header that may turn it."""
_TURNS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture with this EXIF orientation upright."""

# The decode pool is as wide as the CPU quota already.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
# A picture's oddities are its sender's and no news to the operator; catch_warnings cannot be used, as it is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
# libtiff would write what it thinks of a file into the log, raw and as often as a client likes; the decoder's return code says enough.
with contextlib.suppress(OSError, AttributeError):  # a Pillow that hides its libtiff keeps the chatter
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

HW = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may be at most.

    Attributes:
        max_bytes: of the encoded picture.
        max_pixels: width times height that the header claims, at most MAX_PIXELS_CEILING.
        min_side: pixels of the shorter side.
        max_aspect: longer side over shorter side.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000
    min_side: int = 2
    max_aspect: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= MAX_PIXELS_CEILING:
            raise ValueError(f"max_pixels must lie in 1..{MAX_PIXELS_CEILING}, got {self.max_pixels}")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says. `stored_hw` is (height, width) before orientation is applied."""

    format: str
    mode: str
    stored_hw: HW


@dataclass(frozen=True, slots=True)
class Decoded:
    """Upright RGB, perhaps smaller than the original, with the original's upright (height, width)."""

    upright: Image.Image | NDArray[np.uint8]
    original_hw: HW

    @property
    def image(self) -> Image.Image:
        """To draw on."""
        return self.upright if isinstance(self.upright, Image.Image) else Image.fromarray(self.upright)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """To compute with: uint8 [h, w, 3]."""
        return np.asarray(self.upright)


@contextmanager
def open_checked(data: bytes, limits: ImageLimits) -> Iterator[tuple[Image.Image, ImageInfo]]:
    """Read the header and hold it against the limits; nothing is decoded yet.

    Raises:
        EmptyBody, BodyTooLarge, UnsupportedType, TooManyPixels, BadImage.
    """
    if not data:
        raise EmptyBody("expected the bytes of a picture, got none")
    if len(data) > limits.max_bytes:
        raise BodyTooLarge(f"a picture may have {limits.max_bytes} bytes, got {len(data)}; send it smaller")
    name = sniff(data)
    guard(name, data)
    if name == "AVIF":
        check_streams(data, limits.max_pixels)
    with _blaming_the_picture(name, limits), PLUGINS[name](MeteredFile(data)) as image:
        info = ImageInfo(name, image.mode, (image.height, image.width))
        _check_size(info.stored_hw, limits)
        _check_tiles(image, info, limits)
        yield image, info


@contextmanager
def _blaming_the_picture(name: str, limits: ImageLimits) -> Iterator[None]:
    """Decoders raise almost anything on a broken file (SyntaxError, KeyError, struct.error, EOFError ...): one answer for all."""
    try:
        yield
    except DetectorError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"a picture may have {limits.max_pixels} pixels, this {name} claims more; send it smaller") from error
    except Exception as error:
        raise BadImage(_fault(name, error)) from error


def _fault(name: str, error: Exception) -> str:
    """What a decoder's error means to who sent the picture. Words about Python's own objects mean nothing to them."""
    bits = _OTHER_DEPTH.fullmatch(str(error)) if name == "JPEG" else None
    if bits is not None:
        return f"a JPEG may have 8 bits a sample, this one has {bits[1]}; save it as an ordinary JPEG or as PNG"
    origin = error.__cause__ or error
    reason = f" ({error})" if isinstance(origin, OSError | SyntaxError | ValueError) else ""
    return f"the {name} is truncated, corrupt or of a kind that is not decoded{reason}; send the whole file, or save it again"


def _check_size(stored_hw: HW, limits: ImageLimits) -> None:
    height, width = stored_hw
    if width * height > limits.max_pixels:
        raise TooManyPixels(f"a picture may have {limits.max_pixels} pixels, the header says {width} x {height}; send it smaller")
    if min(width, height) < limits.min_side:
        raise BadImage(f"both sides must be at least {limits.min_side} pixels, got {width} x {height}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadImage(f"the longer side may be {limits.max_aspect:g} times the shorter, got {width} x {height}; cut it into pieces")


def _check_tiles(image: ImageFile.ImageFile, info: ImageInfo, limits: ImageLimits) -> None:
    """A TIFF may name tiles larger than itself, or cover itself many times over."""
    if info.format != "TIFF":
        return
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    tile_area = int(tags.get(TiffImagePlugin.TILEWIDTH, 0)) * int(tags.get(TiffImagePlugin.TILELENGTH, 0))
    if tile_area > limits.max_pixels:
        raise TooManyPixels(f"a TIFF tile may have {limits.max_pixels} pixels, this one has {tile_area}; save it with smaller tiles")
    height, width = info.stored_hw
    covered = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (tile.extents for tile in image.tile if tile.extents is not None))
    if covered > width * height * len(image.getbands()):
        raise BadImage("the TIFF names more strips or tiles than its size holds; save it again")


def decode_rgb(data: bytes, limits: ImageLimits, target: Callable[[HW], HW] | None = None) -> Decoded:
    """Decode to upright sRGB.

    Args:
        data: the encoded picture.
        limits: held against the header before anything is decoded.
        target: from the original to the wanted (height, width), the same rule for a picture and the picture turned; None keeps the size.

    Raises:
        EmptyBody, BodyTooLarge, UnsupportedType, TooManyPixels, BadImage.
    """
    with open_checked(data, limits) as (image, info):
        upright, orientation = _decode_resized(data, image, target(info.stored_hw)) if target else _decode_any(image, None, None)
    return Decoded(upright, info.stored_hw[::-1] if orientation >= 5 else info.stored_hw)


def _decode_resized(data: bytes, image: Image.Image, target_hw: HW) -> tuple[Image.Image | NDArray[np.uint8], int]:
    """Upright RGB of the wanted size, and the orientation that the file had."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return _decode_any(image, target_hw, None)
    large = image.width * image.height > MAX_PROGRESSIVE_PIXELS
    box = _draft(image, target_hw)
    pixels = None if large and "progressive" in image.info else _decode_ordinary_jpeg(data, image)
    if pixels is None:
        return _decode_any(image, target_hw, box)
    return _finish(resize(pixels, target_hw, box), image)


def _decode_any(image: Image.Image, target_hw: HW | None, box: Box | None) -> tuple[Image.Image | NDArray[np.uint8], int]:
    """The same for every format, by Pillow; without a target in the original size."""
    image.load()
    pixels = to_resizable(image)
    if target_hw is None:
        return _finish(pixels, image)
    if pixels.mode in ("RGB", "L"):
        values = np.asarray(pixels)
        return _finish(resize(values.reshape(*values.shape[:2], -1), target_hw, box), image)
    return _finish(pixels.resize(target_hw[::-1], Image.Resampling.BILINEAR, box=box), image)


def _finish(pixels: Image.Image | NDArray[np.uint8], image: Image.Image) -> tuple[Image.Image | NDArray[np.uint8], int]:
    """To sRGB and upright, by what the file says of itself."""
    profile, orientation = image.info.get("icc_profile"), _orientation(image)
    if isinstance(pixels, np.ndarray):
        grey = pixels.shape[2] == 1
        if orientation == 1 and not profile:
            return (pixels.repeat(3, axis=2) if grey else pixels), orientation
        pixels = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    return _turn(to_rgb(pixels, profile), orientation), orientation


def _draft(image: JpegImagePlugin.JpegImageFile, target_hw: HW) -> Box | None:
    """Let the JPEG decoder itself scale by 1/2, 1/4 or 1/8; returns the part of the result that is the picture."""
    height, width = target_hw
    drafted = image.draft(None, (DRAFT_MARGIN * width, DRAFT_MARGIN * height))
    return drafted[1] if drafted is not None else None


def _decode_ordinary_jpeg(data: bytes, image: JpegImagePlugin.JpegImageFile) -> NDArray[np.uint8] | None:
    """Grey or RGB in the size that was drafted, uint8 [h, w, 1 or 3], the same bytes that Pillow would give, sooner.

    None for what is of another kind or has any fault: Pillow is more patient, and has the last word.
    """
    colours = {"RGB": "RGB", "L": "GRAY"}.get(image.mode)
    if colours is None:
        return None
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, colours, min_height=image.height, min_width=image.width, min_factor=LEAST_REDUCTION
        )
    except (ValueError, RuntimeError):
        return None
    return pixels if pixels.shape[:2] == (image.height, image.width) else None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 of a loaded picture; 1 where the tag is missing or broken. TIFF is turned while loading."""
    if image.format == "TIFF" or (image.format == "JPEG" and not _ORIENTED_BY & image.info.keys()):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block does not make a picture worse
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
